"""The model's forward pass with what the losses need, and which of its parameters a run trains."""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe3d_deploy.errors import InputError
from moe3d_deploy.model import MoE3D
from moe3d_deploy.model.dpt import DptHead, Grid, activate_depth
from moe3d_deploy.model.experts import mix
from moe3d_deploy.model.moe3d import Backbone
from moe3d_deploy.training.options import TRAINED_PARTS

_NEVER_TRAINED = ("point_head.", "aggregator.patch_embed.mask_token")  # no loss reads them
_BACKBONE = ("aggregator.", "camera_head.")
_LAST_STAGE = ("depth_head.experts.", "depth_head.gate.", "depth_head.scratch.output_conv2.")


class Outputs(NamedTuple):
    """A forward pass; float32 or wider. K is 1 in `log_sigma` of a model without experts."""

    depth: Tensor  # (B, S, H, W)
    confidence: Tensor  # (B, S, H, W), >= 1
    weights: Tensor | None  # (B, S, K, H, W), None without experts
    candidates: Tensor | None  # (B, S, K, H, W), None without experts
    log_sigma: Tensor  # (B, S, K, H, W), of an expert's depth: -c_k, see `losses.mixture_nll`
    pose_iterations: list[Tensor]  # (B, S, 9) per iteration of the camera head; empty where it was skipped
    levels: Sequence[Tensor] = ()  # (B S, P, D), what the depth head has read; empty where the backbone is frozen


def trainable_parameters(model: MoE3D, train: str = "head") -> dict[str, nn.Parameter]:
    """Set `requires_grad` all over `model`, and return what is trained, by state-dict key in the model's order.

    head       the experts and the gate (of a model without experts: VGGT's last two convolutions of the depth head)
    backbone   encoder, aggregator and camera head, but for the mask token
    all        everything but VGGT's point head and the encoder's mask token, which no loss reads
    """
    if train not in TRAINED_PARTS:
        raise InputError(f"train {train!r} is unknown; choose from {', '.join(TRAINED_PARTS)}")
    _require_separate(model)
    prefixes = {"head": _LAST_STAGE, "backbone": _BACKBONE, "all": ("",)}[train]
    chosen = {}
    for name, parameter in model.named_parameters():
        keep = name.startswith(prefixes) and not name.startswith(_NEVER_TRAINED)
        parameter.requires_grad_(keep)
        if keep:
            chosen[name] = parameter
    return chosen


def training_forward(
    model: MoE3D, images: Tensor, temperature: float | None = None, *, half_dense: bool = False
) -> Outputs:
    """What `model(images)` computes, with every camera iteration and the experts' own predictions.

    images       (B, S, 3, H, W) float in [0, 1]; H and W multiples of the patch size
    temperature  of the gate; None: the checkpoint's. A model without experts has none and ignores it
    half_dense   under autocast, run the depth head in 16 bits too; by default both heads are float32, as in VGGT's
                 training. Activations and the mix are float32 in any case
    """
    _require_separate(model)
    (levels, _, grid), poses = backbone_forward(model, images)
    with contextlib.nullcontext() if half_dense else _float32(images):
        features = model.depth_head.features(levels, grid)
        outputs = _last_stage(model.depth_head, features, images.shape[1], temperature, poses)
    return outputs._replace(levels=levels)


def backbone_forward(model: MoE3D, images: Tensor) -> tuple[Backbone, list[Tensor]]:
    """`training_forward` without the depth head: what that would read, and the cameras (B, S, 9) per iteration."""
    backbone = model.backbone(images)
    with _float32(images):
        return backbone, model.camera_head(backbone.camera_tokens)


def frozen_levels(model: MoE3D, images: Tensor) -> list[Tensor]:
    """What `head_forward` reads, (B, S, P, D) for each of the four levels, without gradients: worth caching.

    These rather than the full-resolution features F: they hold 4 dim_in numbers per patch, F patch_size^2 features / 2,
    which is three times as much for moe3d-1b.
    """
    with torch.no_grad():
        levels = model.backbone(images).levels
    return [level.unflatten(0, images.shape[:2]) for level in levels]


def head_forward(
    model: MoE3D, levels: Sequence[Tensor], grid: Grid | tuple[int, int], temperature: float | None = None
) -> Outputs:
    """Depth from `frozen_levels`, for training the last stage alone; the camera head is skipped.

    levels   four of (B, S, P, D), any float type
    grid     patches of a view, (rows, columns); P is their product

    The body of the depth head runs too; of a frozen one no activation is kept for a backward pass.
    """
    _require_separate(model)
    views = levels[0].shape[1]
    if len({level.shape for level in levels}) != 1 or levels[0].shape[2] != grid[0] * grid[1]:
        shapes = ", ".join(str(tuple(level.shape)) for level in levels)
        raise InputError(f"levels of shapes {shapes} do not fit a grid of {grid[0]}x{grid[1]} patches")
    head = model.depth_head
    with _float32(levels[0]):
        features = head.features([level.flatten(0, 1) for level in levels], Grid(*grid))
        return _last_stage(head, features, views, temperature, [])


def _last_stage(
    head: DptHead, features_NCHW: Tensor, views: int, temperature: float | None, poses: list[Tensor]
) -> Outputs:
    def of_scenes(x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, views))

    if head.moe is None:
        raw = head.raw(features_NCHW)
        depth, confidence = (of_scenes(x) for x in activate_depth(raw))
        return Outputs(depth, confidence, None, None, of_scenes(-raw[:, 1:].to(depth.dtype)), poses)
    branches, logits = head.branches(features_NCHW)
    mixture = mix(branches, logits, head.moe.temperature if temperature is None else temperature)
    depth, confidence, weights, candidates = (of_scenes(x) for x in mixture)
    return Outputs(depth, confidence, weights, candidates, of_scenes(-branches[:, :, 1].to(depth.dtype)), poses)


def _require_separate(model: MoE3D) -> None:
    if model.depth_head.merged is not None:
        raise InputError("the experts of this model are merged for deployment; train the checkpoint it came from")


def _float32(like: Tensor) -> torch.autocast:
    """No autocast: every layer then computes in the dtype of its weights."""
    return torch.autocast(like.device.type, enabled=False)

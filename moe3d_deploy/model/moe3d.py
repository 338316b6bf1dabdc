"""The whole model: images in, depth, confidence and cameras out."""

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moe3d_deploy.config import ModelConfig
from moe3d_deploy.errors import InputError
from moe3d_deploy.model.aggregator import Aggregator
from moe3d_deploy.model.camera import CameraHead, cameras_from_pose, unproject
from moe3d_deploy.model.dpt import DptHead, Grid, activate_depth, activate_points
from moe3d_deploy.model.experts import gate_entropy, mixture_variance

ALWAYS = ("depth", "depth_conf", "extrinsics", "intrinsics", "pose_enc")
OF_POINT_HEAD = ("point_map", "point_map_conf")
OF_EXPERTS = ("expert_weights", "expert_depths", "expert_entropy", "depth_variance")
ON_REQUEST = ("world_points", *OF_POINT_HEAD, *OF_EXPERTS)


class Backbone(NamedTuple):
    """What the heads read."""

    levels: list[Tensor]  # (N, P, D): the patch tokens of the four aggregator outputs of the dense heads
    camera_tokens: Tensor  # (B, S, D)
    grid: Grid


class MoE3D(nn.Module):
    """VGGT, with the MoE3D expert head where `config.moe` says so."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.aggregator = Aggregator(config)
        self.camera_head = CameraHead(config.camera_head)
        if config.point_head:
            self.point_head = DptHead(config.dpt_head, config.patch_size, 4, None)
        self.depth_head = DptHead(config.dpt_head, config.patch_size, 2, config.moe)

    def forward(
        self, images: Tensor, *, outputs: Sequence[str] = (), view_chunk: int | None = None
    ) -> dict[str, Tensor]:
        """Depth and cameras of every view of every scene.

        images      (B, S, 3, H, W) or (S, 3, H, W), float in [0, 1], RGB; H and W multiples of the patch size
        outputs     what to add to `depth, depth_conf (B,S,H,W), pose_enc (B,S,9), extrinsics (B,S,3,4),
                    intrinsics (B,S,3,3)`: names of ON_REQUEST
        view_chunk  run the dense heads on this many views at a time: the same result, less memory
        """
        if images.dim() == 4:
            images = images[None]
        self._check(images, outputs)
        if view_chunk is not None and view_chunk < 1:
            raise InputError(f"view_chunk must be at least 1, got {view_chunk}")
        grid = self._grid(images.shape[-2:])
        batch, views = images.shape[:2]
        tokens = self.aggregate(self.aggregator.encode(images), grid)
        size = (images.shape[-2], images.shape[-1])
        return self._outputs(tokens, (batch, views), grid, size, outputs, view_chunk)

    def decode(self, patches_BSPC: Tensor, size: tuple[int, int], *, outputs: Sequence[str] = ()) -> dict[str, Tensor]:
        """`forward` from the encoder's patch tokens on; `size` is the height and width of the views in pixels."""
        grid = self._grid(size)
        batch, views = patches_BSPC.shape[:2]
        return self._outputs(self.aggregate(patches_BSPC, grid), (batch, views), grid, size, outputs, None)

    def _outputs(
        self,
        tokens: dict[int, Tensor],
        scenes: tuple[int, int],
        grid: Grid,
        size: tuple[int, int],
        outputs: Sequence[str],
        view_chunk: int | None,
    ) -> dict[str, Tensor]:
        """Everything that a run gives, from the aggregator outputs, which are dropped as soon as that can be."""
        result = self.cameras(tokens, size)
        levels = self._levels(tokens)
        tokens.clear()
        chunks = [self.dense(part, grid, outputs) for part in _chunks(levels, view_chunk)]
        for name in list(chunks[0]):
            parts = [chunk.pop(name) for chunk in chunks]
            whole = parts[0] if len(parts) == 1 else torch.cat(parts)
            result[name] = whole.unflatten(0, scenes)
        if "world_points" in outputs:
            result["world_points"] = unproject(result["depth"], result["extrinsics"], result["intrinsics"])
        return result

    def backbone(self, images: Tensor) -> Backbone:
        """What the camera head and the dense heads read of images (B, S, 3, H, W), as `forward` takes them."""
        if images.dim() == 4:
            images = images[None]
        self._check(images, ())
        grid = self._grid(images.shape[-2:])
        tokens = self.aggregate(self.aggregator.encode(images), grid)
        return Backbone(self._levels(tokens), self._camera_tokens(tokens), grid)

    def features(self, images: Tensor) -> dict[str, Any]:
        """`patch_tokens` (B, S, P, C) of the encoder and `aggregated`, every aggregator output (B, S, T, 2C)."""
        if images.dim() == 4:
            images = images[None]
        self._check(images, ())
        patch_tokens = self.aggregator.encode(images)
        depth = self.config.aggregator.depth
        kept = self.aggregator(patch_tokens, *self._grid(images.shape[-2:]), keep=range(depth))
        return {"patch_tokens": patch_tokens, "aggregated": [kept[i] for i in range(depth)]}

    def aggregate(self, patches_BSPC: Tensor, grid: Grid) -> dict[int, Tensor]:
        """The aggregator outputs (B, S, T, 2C) that a head reads, from the encoder's patch tokens."""
        needed = {*self.config.dpt_head.intermediate_layer_idx, self.config.aggregator.depth - 1}
        return self.aggregator(patches_BSPC, *grid, keep=needed)

    def _camera_tokens(self, tokens: dict[int, Tensor]) -> Tensor:
        return tokens[self.config.aggregator.depth - 1][:, :, 0]

    def _levels(self, tokens: dict[int, Tensor]) -> list[Tensor]:
        return [
            tokens[i][:, :, self.aggregator.patch_start :].flatten(0, 1)
            for i in self.config.dpt_head.intermediate_layer_idx
        ]

    def cameras(self, tokens: dict[int, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """`pose_enc`, `extrinsics` and `intrinsics` from the aggregator outputs, for views of `size` (H, W) pixels."""
        pose = self.camera_head(self._camera_tokens(tokens))[-1]
        extrinsics, intrinsics = cameras_from_pose(pose, *size)
        return {"pose_enc": pose, "extrinsics": extrinsics, "intrinsics": intrinsics}

    def dense(self, levels: Sequence[Tensor], grid: Grid, outputs: Collection[str]) -> dict[str, Tensor]:
        """Per-pixel outputs of some views, from the patch tokens (N, P, D) of the dense heads' four layers."""
        result: dict[str, Tensor] = {}
        features = self.depth_head.features(levels, grid)
        if self.config.moe is None:
            result["depth"], result["depth_conf"] = activate_depth(self.depth_head.raw(features))
        else:
            mixture = self.depth_head.mixture(features)
            result["depth"], result["depth_conf"] = mixture.depth, mixture.confidence
            if "expert_weights" in outputs:
                result["expert_weights"] = mixture.weights
            if "expert_depths" in outputs:
                result["expert_depths"] = mixture.candidates
            if "expert_entropy" in outputs:
                result["expert_entropy"] = gate_entropy(mixture.weights)
            if "depth_variance" in outputs:
                result["depth_variance"] = mixture_variance(mixture)
        del features
        if not set(OF_POINT_HEAD).isdisjoint(outputs):
            points, confidence = activate_points(self.point_head.raw(self.point_head.features(levels, grid)))
            asked = {"point_map": points, "point_map_conf": confidence}
            result |= {name: value for name, value in asked.items() if name in outputs}
        return result

    def _grid(self, size: Sequence[int]) -> Grid:
        height, width = size
        return Grid(height // self.config.patch_size, width // self.config.patch_size)

    def _check(self, images: Tensor, outputs: Sequence[str]) -> None:
        if images.dim() != 5 or images.shape[2] != 3:
            raise InputError(f"images: expected (B, S, 3, H, W), got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise InputError(f"images: expected floats in [0, 1], got {images.dtype}; divide by 255 first")
        patch = self.config.patch_size
        if 0 in images.shape:
            least = f"at least one view of at least {patch}x{patch}"
            raise InputError(f"images: {tuple(images.shape)} holds no pixel; pass {least}")
        if images.shape[-2] % patch or images.shape[-1] % patch:
            height, width = images.shape[-2:]
            raise InputError(f"images: {width}x{height} is not a multiple of {patch} on both sides; resize them")
        check_outputs(self.config, outputs)


def check_outputs(config: ModelConfig, outputs: Sequence[str]) -> None:
    """Raise InputError for an output that does not exist or that this model has no head for."""
    for name in outputs:
        if name not in ON_REQUEST and name not in ALWAYS:
            raise InputError(f"output {name!r} is unknown; choose from {', '.join((*ALWAYS, *ON_REQUEST))}")
        if name in OF_EXPERTS and config.moe is None:
            raise InputError(f"output {name!r} needs experts; this model has none (moe is null)")
        if name in OF_POINT_HEAD and not config.point_head:
            raise InputError(f"output {name!r} needs the point head; this model has none")


def _chunks(levels: list[Tensor], size: int | None) -> Iterator[list[Tensor]]:
    if size is None:
        yield levels
        return
    for start in range(0, levels[0].shape[0], size):
        yield [level[start : start + size] for level in levels]

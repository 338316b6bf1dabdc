"""The loss of a batch of scenes, as a module, as that is what DistributedDataParallel takes.

It is the mean of its scenes' losses, so that it is the same however a step is split into micro-batches and processes;
what a scene's loss is, `losses.scene_objectives` says.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe3d_deploy.model import MoE3D
from moe3d_deploy.model.dpt import Grid
from moe3d_deploy.training.aids import Aids
from moe3d_deploy.training.data import Batch
from moe3d_deploy.training.forward import Outputs, backbone_forward, head_forward, training_forward
from moe3d_deploy.training.losses import LossOptions, camera_loss, scene_objectives
from moe3d_deploy.training.options import TrainOptions
from moe3d_deploy.training.targets import unchecked_targets

Levels = Callable[[MoE3D, Batch], list[Tensor]]
"""The frozen backbone's features of a batch, (B, S, P, D) for each of four levels."""


class Losses(NamedTuple):
    """total: to minimise; per_scene (B,); parts: each a mean over the batch; usage (K,) or None: mean gate weights."""

    total: Tensor
    per_scene: Tensor
    parts: dict[str, Tensor]
    usage: Tensor | None


class SceneLoss(nn.Module):
    def __init__(self, model: MoE3D, options: TrainOptions, levels: Levels | None) -> None:
        """`levels` for a run with a frozen backbone, else None."""
        super().__init__()
        self.model = model
        self.levels = levels
        weights = {"point_weight": options.point_weight, "match_weight": options.match_weight}
        self.aids = Aids(model.config, **weights) if any(weights.values()) else None
        self.options = loss_options(options)
        self.amp = options.amp
        self.backbone_alone = options.train == "backbone"

    def forward(self, batch: Batch, temperature: float) -> Losses:
        targets = unchecked_targets(batch.depth, batch.extrinsics, batch.intrinsics)
        weights = None
        if self.backbone_alone:
            with self._half(batch):
                (levels, *_), poses = backbone_forward(self.model, batch.images)
            camera, parts = camera_loss(poses, targets.pose_enc, self.options)
            per_scene, parts = self.options.camera_weight * camera, {"camera": camera.detach(), **_detached(parts)}
        else:
            outputs = self.predict(batch, temperature)
            levels, weights = list(outputs.levels), outputs.weights
            per_scene, parts = scene_objectives(outputs, targets, self.options)
        if self.aids is not None:
            aid, of_aids = self.aids(self.model, levels, self._grid(batch), targets)
            per_scene, parts = per_scene + aid, parts | of_aids
        means = {name: part.mean() for name, part in parts.items()}
        usage = None if weights is None else weights.detach().float().mean((0, 1, 3, 4))
        return Losses(per_scene.mean(), per_scene.detach(), means, usage)

    def predict(self, batch: Batch, temperature: float) -> Outputs:
        if self.levels is None:
            with self._half(batch):
                return training_forward(self.model, batch.images, temperature, half_dense=self.amp == "bf16-heads")
        with torch.no_grad(), self._half(batch):
            levels = self.levels(self.model, batch)
        return head_forward(self.model, levels, self._grid(batch), temperature)

    def _half(self, batch: Batch) -> torch.autocast:
        return torch.autocast(batch.images.device.type, dtype=torch.bfloat16, enabled=self.amp != "off")

    def _grid(self, batch: Batch) -> Grid:
        patch = self.model.config.patch_size
        return Grid(batch.images.shape[-2] // patch, batch.images.shape[-1] // patch)


def _detached(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: part.detach() for name, part in parts.items()}


def loss_options(options: TrainOptions) -> LossOptions:
    return LossOptions(
        depth=options.depth_loss,
        depth_weight=options.depth_weight,
        camera_weight=options.camera_weight,
        entropy_weight=options.entropy_weight,
        gradient_weight=options.gradient_weight,
    )

"""The loss of a batch of scenes, as a module, as that is what DistributedDataParallel takes.

It is the mean of its scenes' losses, so that it is the same however a step is split into micro-batches and processes;
within a scene it is what `losses.objective` says.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe3d_deploy.errors import InputError
from moe3d_deploy.model import MoE3D
from moe3d_deploy.training.data import Batch
from moe3d_deploy.training.forward import Outputs, head_forward, training_forward
from moe3d_deploy.training.losses import LossOptions, objective
from moe3d_deploy.training.options import TrainOptions
from moe3d_deploy.training.targets import Targets, normalised_targets

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
        self.options = loss_options(options)
        self.dtype = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}[options.amp.removesuffix("-heads")]
        self.half_dense = options.amp.endswith("-heads")

    def forward(self, batch: Batch, temperature: float) -> Losses:
        targets = _targets(batch)
        outputs = self.predict(batch, temperature)
        totals, parts = [], []
        for i in range(batch.images.shape[0]):
            total, of_scene = objective(_scene(outputs, i), Targets(*(t[i : i + 1] for t in targets)), self.options)
            totals.append(total)
            parts.append(of_scene)
        per_scene = torch.stack(totals)
        means = {name: torch.stack([of_scene[name] for of_scene in parts]).mean() for name in parts[0]}
        usage = None if outputs.weights is None else outputs.weights.detach().float().mean((0, 1, 3, 4))
        return Losses(per_scene.mean(), per_scene.detach(), means, usage)

    def predict(self, batch: Batch, temperature: float) -> Outputs:
        device = batch.images.device.type
        half = nullcontext() if self.dtype is None else torch.autocast(device, dtype=self.dtype)
        if self.levels is None:
            with half:
                return training_forward(self.model, batch.images, temperature, half_dense=self.half_dense)
        with torch.no_grad(), half:
            levels = self.levels(self.model, batch)
        patch = self.model.config.patch_size
        grid = (batch.images.shape[-2] // patch, batch.images.shape[-1] // patch)
        return head_forward(self.model, levels, grid, temperature)


def loss_options(options: TrainOptions) -> LossOptions:
    return LossOptions(
        depth=options.depth_loss,
        depth_weight=options.depth_weight,
        camera_weight=options.camera_weight,
        entropy_weight=options.entropy_weight,
        gradient_weight=options.gradient_weight,
    )


def _targets(batch: Batch) -> Targets:
    try:
        return normalised_targets(batch.depth, batch.extrinsics, batch.intrinsics)
    except InputError as error:
        listed = ", ".join(f"{plan.number} (scene {plan.seed})" for plan in batch.plans)
        raise InputError(f"samples {listed}: {error}") from error


def _scene(outputs: Outputs, index: int) -> Outputs:
    kept = slice(index, index + 1)
    poses = [pose[kept] for pose in outputs.pose_iterations]
    return outputs._replace(
        **{name: x[kept] for name, x in outputs._asdict().items() if isinstance(x, Tensor)}, pose_iterations=poses
    )

"""Views for training heads, as the frozen model sees them: full-resolution features and true depth, all in memory."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe3d_deploy.benchmarks.heads.variants import Plan
from moe3d_deploy.config import ModelConfig
from moe3d_deploy.errors import InputError, Moe3dError
from moe3d_deploy.machine import available_memory_bytes
from moe3d_deploy.model import MoE3D
from moe3d_deploy.training.data import batches
from moe3d_deploy.training.options import TrainOptions
from moe3d_deploy.training.targets import Targets, normalised_targets

_DATA_SEED = 0  # of the samples and of their order: one for all heads and all seeds of weights
_SHARE = 0.7  # of the free memory that the features may take


@dataclass(frozen=True, eq=False)
class Pool:
    """features (N, C, H, W) float32, depth (N, H, W) in units of its scene's scale, 0 where there is no truth."""

    features: Tensor
    depth: Tensor

    def batch(self, index: Tensor) -> tuple[Tensor, Targets]:
        """Features of some views, and their truth, each view as a scene of its own; the cameras are left out."""
        depth = self.depth[index][:, None]
        nothing = depth.new_empty(0)
        return self.features[index], Targets(depth, depth > 0, nothing, nothing)


def build_pool(model: MoE3D, plan: Plan, on_scene: Callable[[int], None], on_note: Callable[[str], None]) -> Pool:
    """The views of the first `plan.scenes` training samples, drawn as `moe3d train` draws them.

    A scene's views go through the model together, and are normalised together. Raises InputError where the features do
    not fit into memory, Moe3dError for features that are not finite.
    """
    require_memory(model.config, plan)
    count = plan.scenes * plan.views
    features = torch.empty(count, model.config.dpt_head.features // 2, plan.height, plan.width)
    depth = torch.empty(count, plan.height, plan.width)
    for number, batch in enumerate(batches(_samples(plan), 0)):
        for note in batch.notes:
            on_note(note)
        views = slice(number * plan.views, (number + 1) * plan.views)
        with torch.inference_mode():
            levels, _, grid = model.backbone(batch.images)
            features[views] = model.depth_head.features(levels, grid)
        depth[views] = normalised_targets(batch.depth, batch.extrinsics, batch.intrinsics).depth[0]
        on_scene(number + 1)
    if not features.isfinite().all():
        raise Moe3dError("the features of these weights are not finite; nothing can be trained on them")
    return Pool(features, depth)


def require_memory(config: ModelConfig, plan: Plan) -> None:
    """Raise InputError unless the features of `plan` fit."""
    values = plan.scenes * plan.views * plan.height * plan.width * (config.dpt_head.features // 2)
    needed, free = values * torch.float32.itemsize, available_memory_bytes()
    if needed > _SHARE * free:
        raise InputError(
            f"the features of {plan.scenes} scenes take {needed / 1e9:.1f} GB, of memory {free / 1e9:.1f} GB are free; "
            "use fewer --scenes, or a smaller --height and --width"
        )


def view_order(plan: Plan, views: int) -> Tensor:
    """Which views a step takes, (steps, batch): all of the pool in a random order, then again in another."""
    stream = np.random.Generator(np.random.PCG64(_DATA_SEED))
    needed = plan.steps * plan.batch
    passes = [stream.permutation(views) for _ in range(-(-needed // views))]
    return torch.from_numpy(np.concatenate(passes)[:needed].reshape(plan.steps, plan.batch))


def _samples(plan: Plan) -> TrainOptions:
    """A run of one step per scene, each with all of its views."""
    return TrainOptions(
        source="frozen",
        seed=_DATA_SEED,
        steps=plan.scenes,
        batch=1,
        scenes=plan.scenes,
        scene_views=plan.views,
        views=(plan.views, plan.views),
        shapes=((plan.height, plan.width),),
    )

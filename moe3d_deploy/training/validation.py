"""A glance at held-out scenes during training: depth errors after a scale by the median, on the averaged weights.

The measures of the evaluation are `moe3d_deploy.metrics`; these are their plain torch form.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from moe3d_deploy.model import MoE3D
from moe3d_deploy.training.data import Plan, make_sample, scene_store
from moe3d_deploy.training.options import TrainOptions
from moe3d_deploy.training.scene_cache import StoredScene

SPLIT = "test-seeds"
FIRST_SEED = 1_000_000  # far from the scenes that evaluations judge, which begin at 0: a run may be chosen by these
_LIMIT = 1.25  # of the ratio that delta counts


def held_out_scenes(options: TrainOptions) -> tuple[list[StoredScene], list[str]]:
    """Scenes of the held-out split, from FIRST_SEED on, in the run's first shape with its most views; cache notes."""
    height, width = options.shapes[0]
    count = options.views[1]
    store = scene_store(options, height, width, split=SPLIT, views=count)
    scenes, notes = [], []
    for seed in range(FIRST_SEED, FIRST_SEED + options.validation_scenes):
        scene, told = store.get(seed)
        notes += told
        scenes.append(make_sample(Plan(seed, seed, seed, height, width, tuple(range(count)), False, None), scene))
    return scenes, notes


def depth_errors(predicted: Tensor, true: Tensor) -> tuple[float, float]:
    """AbsRel and the share of pixels within a ratio of 1.25, of the depth (S, H, W) of one scene.

    The prediction is scaled by median(true) / median(predicted) over the valid pixels (true > 0) of all views.
    """
    valid = true > 0
    predicted, true = predicted[valid].double(), true[valid].double()
    scaled = predicted * (true.median() / predicted.median())
    ratio = torch.maximum(scaled / true, true / scaled)
    return float(((scaled - true).abs() / true).mean()), float((ratio < _LIMIT).double().mean())


@torch.no_grad()
def validate(model: MoE3D, scenes: Sequence[StoredScene], device: torch.device) -> dict[str, float]:
    """Means over the scenes: `abs_rel`, `delta1`."""
    errors = []
    for scene in scenes:
        depth = model(scene.images[None].to(device))["depth"][0]
        errors.append(depth_errors(depth.float().cpu(), scene.depth))
    abs_rel, delta = (sum(values) / len(errors) for values in zip(*errors, strict=True))
    return {"abs_rel": abs_rel, "delta1": delta}

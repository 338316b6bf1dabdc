"""A glance at held-out scenes during training, on the averaged weights: depth errors after one scale, and cameras.

The measures are those of `moe3d_deploy.metrics`, scene by scene; the evaluation has more of them.
"""

from collections.abc import Sequence

import numpy as np
import torch

from moe3d_deploy.errors import InputError
from moe3d_deploy.metrics import align_median, auc, depth_errors, relative_pose_errors
from moe3d_deploy.model import MoE3D
from moe3d_deploy.training.data import Plan, make_sample, scene_store
from moe3d_deploy.training.options import TrainOptions
from moe3d_deploy.training.scene_cache import StoredScene

SPLIT = "test-seeds"
FIRST_SEED = 1_000_000  # far from the scenes that evaluations judge, which begin at 0: a run may be chosen by these


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


@torch.no_grad()
def validate(model: MoE3D, scenes: Sequence[StoredScene], device: torch.device) -> dict[str, float]:
    """Means over the scenes: `abs_rel` and `delta1`, and `auc30` where scenes have more than one view.

    A figure is NaN where the prediction of one scene cannot be judged, such as depth that overflows: the run goes on.
    """
    figures = [_figures(model, scene, device) for scene in scenes]
    return {key: float(np.mean([scene[key] for scene in figures])) for key in figures[0]}


def _figures(model: MoE3D, scene: StoredScene, device: torch.device) -> dict[str, float]:
    outputs = model(scene.images[None].to(device))
    depth, cameras = (outputs[name][0].float().cpu() for name in ("depth", "extrinsics"))
    figures = _depth_figures(depth.double().numpy(), scene.depth.numpy())
    if len(cameras) > 1:
        figures["auc30"] = _camera_figure(cameras.numpy(), scene.extrinsics.numpy())
    return figures


def _depth_figures(depth: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """One scale for all views (S, H, W) of the scene."""
    try:
        errors = depth_errors(depth * align_median(depth, true), true)
    except InputError:
        return {"abs_rel": np.nan, "delta1": np.nan}
    return {"abs_rel": errors.abs_rel, "delta1": errors.delta1}


def _camera_figure(cameras: np.ndarray, true: np.ndarray) -> float:
    try:
        return auc(relative_pose_errors(cameras, true).worst_deg)
    except InputError:
        return np.nan

"""Judge trained heads on held-out scenes: the features of a scene are computed once, for all heads."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from moe3d_deploy.benchmarks.heads.training import LastStage
from moe3d_deploy.evaluation import EvaluationScene, evaluate
from moe3d_deploy.metrics import gate_statistics
from moe3d_deploy.metrics.scene import EXPERT_SHARE
from moe3d_deploy.model import MoE3D
from moe3d_deploy.model.camera import cameras_from_pose

MEASURES = (
    "abs_rel", "delta1", "boundary_f1", "boundary_precision", "boundary_recall", "edge_miou", "flying", "gate_entropy"
)  # fmt: skip
EFFECTIVE_EXPERTS = "effective_experts"

Scores = dict[str, dict[str, float]]
"""Figures of a head by scene."""


def judge(
    model: MoE3D,
    heads: Mapping[str, LastStage],
    scenes: Iterable[EvaluationScene],
    on_scene: Callable[[int], None],
) -> dict[str, Scores]:
    """The figures of every head on every scene: MEASURES of `metrics.scene_quality`, the share of pixels in which each
    expert is the strongest, and the effective number of experts. What a scene cannot tell is missing.

    Raises Moe3dError as `evaluate`.
    """
    scores: dict[str, Scores] = {name: {} for name in heads}
    for number, scene in enumerate(scenes):
        for name, prediction in predictions(model, heads, scene).items():
            metrics = _of_heads(scene, prediction)
            scores[name][scene.name] = metrics
        on_scene(number + 1)
    return scores


def predictions(
    model: MoE3D, heads: Mapping[str, LastStage], scene: EvaluationScene
) -> dict[str, dict[str, NDArray[Any]]]:
    """What `MoE3D` with each of the heads gives for a scene: depth, cameras, and expert_weights where there are any."""
    result = {}
    with torch.inference_mode():
        images = torch.from_numpy(scene.images)[None]
        levels, camera_tokens, grid = model.backbone(images)
        pose = model.camera_head(camera_tokens)[-1]
        extrinsics, intrinsics = cameras_from_pose(pose, *images.shape[-2:])
        features = model.depth_head.features(levels, grid)
        for name, head in heads.items():
            outputs = head(features)
            prediction = {"depth": outputs.depth[:, 0], "extrinsics": extrinsics[0], "intrinsics": intrinsics[0]}
            if outputs.weights is not None:
                prediction["expert_weights"] = outputs.weights[:, 0]
            result[name] = {key: tensor.numpy() for key, tensor in prediction.items()}
    return result


def _of_heads(scene: EvaluationScene, prediction: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    found = evaluate(lambda _: prediction, [scene], points=False).results[0].metrics
    metrics = {key: value for key, value in found.items() if key in MEASURES or key.startswith(EXPERT_SHARE)}
    if "expert_weights" in prediction:
        weights = np.asarray(prediction["expert_weights"])
        metrics[EFFECTIVE_EXPERTS] = gate_statistics(weights).effective_experts
    return metrics

"""Run a model over scenes with truth and keep each scene's figures; means, medians and the worst scene of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe3d_deploy.errors import InputError, Moe3dError
from moe3d_deploy.evaluation.measures import in_order, measure
from moe3d_deploy.evaluation.scenes import EvaluationScene
from moe3d_deploy.metrics import gate_statistics, scene_quality
from moe3d_deploy.metrics.inputs import extrinsics_of, intrinsics_of

if TYPE_CHECKING:
    from moe3d_deploy.model import MoE3D

Predictor = Callable[[NDArray[np.float32]], Mapping[str, NDArray[Any]]]
"""Images (S, 3, H, W) -> depth (S, H, W), extrinsics, intrinsics, and what else the model gives: `Session.run`."""


class Summary(NamedTuple):
    """One measure over the scenes that have it; `worst` is the name of the scene, `worst_value` what it has.

    Both are None where no way is better.
    """

    mean: float
    median: float
    scenes: int
    worst: str | None
    worst_value: float | None


@dataclass(frozen=True, eq=False)
class SceneResult:
    """The figures of one scene, and which expert has the largest weight, (S, H, W) uint8, where the model tells."""

    name: str
    metrics: dict[str, float]
    experts: NDArray[np.uint8] | None = None


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The results of all scenes, in their order."""

    results: tuple[SceneResult, ...]

    def summary(self) -> dict[str, Summary]:
        """By key of `scene_quality`, in the order of tables. A scene without a measure does not count in it."""
        keys = in_order({key for result in self.results for key in result.metrics})
        return {key: self._summary(key) for key in keys}

    def _summary(self, key: str) -> Summary:
        found = [(result.metrics[key], result.name) for result in self.results if key in result.metrics]
        values = [value for value, _ in found]
        better = measure(key).better
        value, worst = None, None
        if better:
            choose = max if better == "lower" else min
            value, worst = choose(found, key=lambda pair: pair[0])
        return Summary(float(np.mean(values)), float(np.median(values)), len(values), worst, value)


def evaluate(
    predict: Predictor,
    scenes: Iterable[EvaluationScene],
    *,
    points: bool = True,
    on_scene: Callable[[EvaluationScene, Mapping[str, NDArray[Any]], SceneResult], None] | None = None,
) -> Evaluation:
    """The figures of every scene; scenes are taken one by one, and only their figures and expert maps are kept.

    points     with the measures of point clouds, which take most of the time
    on_scene   called after each scene with the scene, the prediction and its result

    Raises Moe3dError for a prediction that cannot be judged (not finite, depth or focal lengths not above 0, cameras
    without a rotation, gate weights that are none), InputError for images that the model does not take and a truth that
    cannot be used, each with the scene's name, and where there is no scene; MissingExtraError without SciPy.
    """
    results = []
    for scene in scenes:
        try:
            prediction = predict(scene.images)
            _check(prediction, scene)
            metrics = scene_quality(prediction, scene.truth, points=points)
        except InputError as error:
            raise InputError(f"scene {scene.name}: {error}") from error
        results.append(SceneResult(scene.name, metrics, _strongest(prediction)))
        if on_scene:
            on_scene(scene, prediction, results[-1])
    if not results:
        raise InputError("there is no scene to evaluate on; name one or more")
    return Evaluation(tuple(results))


def model_predictor(model: "MoE3D", outputs: Sequence[str] = ()) -> Predictor:
    """A PyTorch model as a predictor, on the device that it is on; `outputs` beyond those it always gives."""
    import torch

    device = next(model.parameters()).device

    def predict(images: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        with torch.inference_mode():
            result = model(torch.from_numpy(images).to(device)[None], outputs=outputs)
        return {name: tensor[0].float().cpu().numpy() for name, tensor in result.items()}

    return predict


def _check(prediction: Mapping[str, NDArray[Any]], scene: EvaluationScene) -> None:
    depth = prediction["depth"]
    if depth.shape != scene.truth["depth"].shape:
        raise Moe3dError(
            f"scene {scene.name}: the model gives depth {depth.shape} for a truth of {scene.truth['depth'].shape}"
        )
    bad = int(np.count_nonzero(~(np.isfinite(depth) & (depth > 0))))
    if bad:
        raise Moe3dError(
            f"scene {scene.name}: the predicted depth is not finite and above 0 at {bad} of {depth.size} pixels; "
            "these weights, or their precision, cannot be judged"
        )
    try:
        cameras = extrinsics_of(prediction["extrinsics"], "predicted extrinsics")
        if len(cameras) != len(depth):
            raise InputError(f"there are predicted extrinsics of {len(cameras)} views and depth of {len(depth)}")
        intrinsics_of(prediction["intrinsics"], "predicted intrinsics", len(depth))
        if "expert_weights" in prediction:
            gate_statistics(prediction["expert_weights"])
    except InputError as error:  # of the model's, not of the user's making
        raise Moe3dError(f"scene {scene.name}: the prediction cannot be judged: {error}") from error


def _strongest(prediction: Mapping[str, NDArray[Any]]) -> NDArray[np.uint8] | None:
    if "expert_weights" not in prediction:
        return None
    return prediction["expert_weights"].argmax(axis=1).astype(np.uint8)

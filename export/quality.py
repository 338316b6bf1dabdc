"""Does the exported file see what the trained model sees? Both on scenes with exact truth, made on the spot.

`verify` asks whether the file computes what PyTorch does; this asks what is left of the depth's quality. The stages run
in processes of their own: `render` writes the scenes, `reference` judges the float32 model on them, and `executed` and
`rounded` the deployed one: the written file in ONNX Runtime, and the 16-bit model with real rounding. A CPU computes
16-bit files in float32 or not at all, so of 16 bits it is the second that says what a GPU will do.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe3d_deploy.child import ChildResult, Emit
from moe3d_deploy.config import ModelConfig
from moe3d_deploy.errors import ExportError, InputError
from moe3d_deploy.evaluation.compare import Change, Comparison, compare
from moe3d_deploy.evaluation.evaluate import Evaluation, Predictor, SceneResult, evaluate, model_predictor
from moe3d_deploy.evaluation.scenes import EvaluationScene, native_size, rendered_scene
from moe3d_deploy.export.precision import PrecisionPolicy
from moe3d_deploy.export.static import StaticShape
from moe3d_deploy.export.verify import LABELS, MORE_EXACT, deployed_model, open_model, open_twin
from moe3d_deploy.manifest import ShapeRanges
from moe3d_deploy.runtime.pixels import to_pixels

SCENES = 16
VIEWS = 4
SPLIT = "test-seeds"
EXPERTS = ("expert_weights",)

# What the stages are called while they work.
STAGES = {
    "reference": "quality ref",
    "executed": "quality file",
    "twin": "quality twin",
    "rounded": "quality 16b",
}

_NAMES = {"abs_rel": "AbsRel", "boundary_f1": "boundary F1"}


@dataclass(frozen=True)
class QualityPlan:
    """The scenes of a check: seeds 0 .. scenes - 1 of a split, in a shape that the file takes.

    batch   how many scenes the file wants at once; the same one so often
    """

    scenes: int
    views: int
    height: int
    width: int
    batch: int = 1
    split: str = SPLIT

    @classmethod
    def of(cls, config: ModelConfig, static: StaticShape, scenes: int = SCENES) -> "QualityPlan":
        """VIEWS views of the model's own size, or what the file fixes. Raises InputError for views none can render."""
        from moe3d_deploy.training.scenes import SceneOptions

        height, width = native_size(config.img_size, config.patch_size, static.ranges(ShapeRanges.of(config)))
        views = static.views or VIEWS
        try:
            SceneOptions(height=height, width=width, views=views)
        except InputError as error:
            raise InputError(f"--verify-quality cannot render scenes for this file: {error}; leave it out") from error
        return cls(scenes, views, height, width, static.batch or 1)


def kinds_of(policy: PrecisionPolicy) -> tuple[str, ...]:
    """The stages that judge a file of this precision, beside the reference."""
    executed = () if policy.bfloat16 else ("executed",)
    return (*executed, *(("rounded",) if policy.sixteen_bit else ()))


def render(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Child stage: render the scenes of the plan into the folder."""
    plan = QualityPlan(**request["plan"])
    for seed in range(plan.scenes):
        emit({"step": seed})
        scene = rendered_scene(seed, split=plan.split, views=plan.views, height=plan.height, width=plan.width)
        np.savez(_scene_file(request, seed), images=scene.images, **scene.truth)  # type: ignore[arg-type]
    return {}


def reference(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Child stage: the float32 model as trained, on every scene."""
    from moe3d_deploy.export.source import SourceSpec

    outputs = request["outputs"]
    model = SourceSpec(**request["source"]).load(PrecisionPolicy("fp32"), outputs)
    return _judge(request, emit, model_predictor(model, outputs), "reference")


def rounded(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Child stage: the deployed model in torch with real rounding, on every scene."""
    from moe3d_deploy.export.half import SixteenBitRun

    model = deployed_model(request)
    with SixteenBitRun(model):
        return _judge(request, emit, model_predictor(model, request["outputs"]), "rounded")


def executed(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Child stage: the written file in ONNX Runtime, on every scene."""
    return _judge(request, emit, _file_predictor(request, open_model(request)), "executed")


def twin(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Child stage: the float32 twin of a bf16 file, which shows what its rounded weights alone do, on every scene."""
    return _judge(request, emit, _file_predictor(request, open_twin(request)), "twin")


def limits_of(precision: str) -> dict[str, float]:
    """The largest typical change of each measure that has a limit: relative for abs_rel, absolute for others."""
    table = json.loads(resources.files("moe3d_deploy.export").joinpath("limits.json").read_text(encoding="utf-8"))
    limits: dict[str, float] = table["quality"][precision.partition("-")[0]]
    return limits


def beyond(comparison: Comparison, precision: str) -> dict[str, float]:
    """The limits that a comparison does not keep. They are on the typical change, in which opposites do not cancel."""
    limits = {key: limit for key, limit in limits_of(precision).items() if key in comparison.changes}
    return {key: limit for key, limit in limits.items() if not comparison.changes[key].typical <= limit}


def quality_report(plan: QualityPlan, comparisons: Mapping[str, Comparison], precision: str) -> dict[str, Any]:
    """For the manifest: the scenes, the limits, and per stage the changes of every measure."""
    return {
        "split": plan.split,
        "scenes": plan.scenes,
        "shape": [plan.views, plan.height, plan.width],
        "limits": limits_of(precision),
        "runs": {
            kind: {"changes": comparison.to_dict()["changes"], "experts_agree": comparison.experts_agree}
            for kind, comparison in comparisons.items()
        },
    }


def require_quality(comparisons: Mapping[str, Comparison], precision: str, *, origin: str, licence: str) -> None:
    """Raise ExportError for the first stage whose scenes change beyond a limit, to better or worse: it sees otherwise.

    The mean size of a scene's change counts. The message tells the change of the mean and its interval as well: both
    small, and scenes change in either direction; both large, and all are shifted.
    """
    for kind, comparison in comparisons.items():
        for key, limit in beyond(comparison, precision).items():
            change = comparison.changes[key]
            raise ExportError(
                f"quality check failed: {LABELS[kind]} changes {_NAMES[key]} by "
                f"{amount(key, change.typical, sign=False)} per scene, on {comparison.scenes} scenes"
                f"{_of_mean(key, change)}, the limit is {amount(key, limit, sign=False)}; nothing was written. "
                f"{_remedy(precision, comparison.scenes)} (weights: {_weights(origin, licence)})"
            )


Run = Callable[[str, str, dict[str, Any], int], ChildResult]
"""Runs a stage in a process of its own: its name, "module:function", the request, and how many steps it tells."""


def judge_reference(plan: QualityPlan, request: dict[str, Any], run: Run) -> Evaluation:
    """Render the scenes into the request's folder, and judge the float32 model on them.

    The request is that of the export's stages, with `plan`, and with EXPERTS as `outputs` where the model has experts.
    """
    run("scenes", f"{__name__}:render", request, plan.scenes)
    return _judged("reference", plan, request, run)


def judge_deployed(
    kinds: Sequence[str], plan: QualityPlan, request: dict[str, Any], before: Evaluation, run: Run
) -> dict[str, Comparison]:
    """What changes from the reference `before` to each stage of `kinds`; the request has the file as `model`."""
    return {kind: compare(before, _judged(kind, plan, request, run)) for kind in kinds}


def amount(key: str, change: float, *, sign: bool = True) -> str:
    """A change as people read it: of AbsRel a percentage, of other measures a difference."""
    form = "+" if sign else ""
    return f"{100 * change:{form}.2g} %" if key == "abs_rel" else f"{change:{form}.2g}"


def quality_lines(report: Mapping[str, Any]) -> list[str]:
    """A line per stage of a report: what was, what is, and by how much that differs."""
    lines = []
    for kind, run in report["runs"].items():
        changes = {key: Change(**change) for key, change in run["changes"].items()}
        depth = changes["abs_rel"]
        amounts = f"{amount('abs_rel', depth.change)}, per scene {amount('abs_rel', depth.typical, sign=False)}"
        parts = [f"AbsRel {depth.reference:.4f} -> {depth.found:.4f} ({amounts})"]
        if edges := changes.get("boundary_f1"):
            parts.append(f"boundary F1 {edges.reference:.4f} -> {edges.found:.4f}")
        flying = changes["flying"]
        parts.append(f"flying points {100 * flying.reference:.2f} % -> {100 * flying.found:.2f} %")
        if run["experts_agree"] is not None:
            parts.append(f"experts agree {100 * run['experts_agree']:.2f} %")
        lines.append(f"{', '.join(parts)} ({LABELS[kind]}, {report['scenes']} scenes)")
    return lines


def _judged(kind: str, plan: QualityPlan, request: dict[str, Any], run: Run) -> Evaluation:
    """What a stage has found: the figures that it returns, with the expert maps that it leaves in the folder."""
    returned = run(STAGES[kind], f"{__name__}:{kind}", request, plan.scenes).value["results"]
    results = []
    for index, result in enumerate(returned):
        path = _experts_file(request, kind, index)
        experts = np.load(path) if path.exists() else None
        results.append(SceneResult(result["name"], result["metrics"], experts))
    return Evaluation(tuple(results))


def _judge(request: dict[str, Any], emit: Emit, predict: Predictor, kind: str) -> dict[str, Any]:
    plan = QualityPlan(**request["plan"])
    results: list[dict[str, Any]] = []

    def keep(scene: EvaluationScene, prediction: Mapping[str, NDArray[Any]], result: SceneResult) -> None:
        if result.experts is not None:
            np.save(_experts_file(request, kind, len(results)), result.experts)
        results.append({"name": result.name, "metrics": result.metrics})
        emit({"step": len(results)})

    emit({"step": 0})
    evaluate(predict, (_read_scene(request, seed) for seed in range(plan.scenes)), points=False, on_scene=keep)
    return {"results": results}


def _file_predictor(request: dict[str, Any], backend: Any) -> Predictor:
    batch = request["plan"]["batch"]

    def predict(images: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        views = to_pixels(images) if request["input"] == "uint8" else images
        result = backend.run(np.repeat(views[None], batch, axis=0))
        return {name: value[0] for name, value in result.items()}

    return predict


def _scene_file(request: dict[str, Any], seed: int) -> Path:
    return Path(request["folder"]) / f"scene_{seed}.npz"


def _experts_file(request: dict[str, Any], kind: str, index: int) -> Path:
    return Path(request["folder"]) / f"experts_{kind}_{index}.npy"


def _read_scene(request: dict[str, Any], seed: int) -> EvaluationScene:
    with np.load(_scene_file(request, seed)) as file:
        arrays = {name: file[name] for name in file}
    return EvaluationScene(str(seed), arrays.pop("images"), arrays)


def _of_mean(key: str, change: Change) -> str:
    if change.low is None or change.high is None:
        return ""
    interval = f"{amount(key, change.low)} to {amount(key, change.high)}"
    return f" (the mean of all by {amount(key, change.change)}, 95 % interval {interval})"


def _remedy(precision: str, scenes: int) -> str:
    if precision == "fp32":
        return "A wrong graph: please report it with the model"
    more_exact = f"Try --precision {MORE_EXACT[precision]}"
    return more_exact + (
        f"; so few scenes do not settle it, more do: --verify-quality {SCENES}" if scenes < SCENES else ""
    )


def _weights(origin: str, licence: str) -> str:
    from moe3d_deploy.weight_sources import SEEDED_LICENCE

    if licence == SEEDED_LICENCE:
        return f"{origin}, seeded random ones, whose quality is that of noise and says nothing of trained weights"
    return origin

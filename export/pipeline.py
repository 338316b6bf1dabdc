"""Checkpoint -> verified bundle: the stages in their order, each in a process of its own."""

import contextlib
import importlib.metadata
import json
import platform
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from moe3d_deploy import __version__
from moe3d_deploy.bundle import Bundle, BundleWriter
from moe3d_deploy.child import ChildResult, Emit, run_in_child
from moe3d_deploy.config import ModelConfig
from moe3d_deploy.errors import ExportError, InputError, require
from moe3d_deploy.export import quality, verify
from moe3d_deploy.export.compare import Limits
from moe3d_deploy.export.contract import (
    INPUTS,
    MODEL_FILE,
    OPSET,
    OPSETS,
    OPTIONAL_OUTPUTS,
    OUTPUTS,
    layout,
    output_names,
)
from moe3d_deploy.export.parts import model_inputs, model_outputs, part_file, parts_of
from moe3d_deploy.export.precision import PrecisionPolicy
from moe3d_deploy.export.quality import QualityPlan
from moe3d_deploy.export.source import SourceSpec
from moe3d_deploy.export.static import StaticShape
from moe3d_deploy.export.verify import SHAPES_IN_PATCHES, Shape
from moe3d_deploy.manifest import (
    FORMAT_VERSION,
    SINGLE_FILE_VERSION,
    SPLITS,
    Checkpoint,
    Manifest,
    Preprocessing,
    ShapeRanges,
    Verification,
)

OnEvent = Callable[[dict[str, Any]], None]
"""Receives {"stage", "step", "total", "detail"}: stages are export, reference, execute (or twin), round, bundle;
with a check of quality, before the bundle: scenes, and those of `quality.STAGES`.

The last event of a stage has its "cost" as well: seconds and peak_bytes.
"""


@dataclass(frozen=True)
class ExportOptions:
    """What a file is to be.

    merge    deploy the experts as one convolution and `moe3d::ExpertMix`
    outputs  names beyond the default four
    opset    one of OPSETS; the later one has attention as an operator
    input    type of the images: float32, or uint8 with the channels last
    static   the axes that the file fixes
    shapes   what is verified, as far as `static` lets it
    quality  on how many rendered scenes the file's quality is compared with PyTorch's; None: it is not
    split    a key of SPLITS: two files in place of one
    """

    policy: PrecisionPolicy = PrecisionPolicy("fp16")
    merge: bool = True
    outputs: tuple[str, ...] = ()
    verify: bool = True
    shapes: tuple[Shape, ...] = SHAPES_IN_PATCHES
    opset: int = OPSET
    input: str = "float32"
    static: StaticShape = StaticShape()
    quality: int | None = None
    split: str | None = None

    def __post_init__(self) -> None:
        if unknown := [name for name in self.outputs if name not in OUTPUTS]:
            raise InputError(f"output {unknown[0]!r} cannot be exported; choose from {', '.join(OPTIONAL_OUTPUTS)}")
        if self.opset not in OPSETS:
            raise InputError(f"opset {self.opset} cannot be exported; choose from {', '.join(map(str, OPSETS))}")
        if self.input not in INPUTS:
            raise InputError(f"input {self.input!r} cannot be exported; choose from {', '.join(INPUTS)}")
        if self.split is not None and self.split not in SPLITS:
            raise InputError(f"split {self.split!r} is unknown; choose from {', '.join(SPLITS)}")
        if self.quality is not None and not self.verify:
            raise InputError("a check of quality is a part of the verification: it cannot be had without that")
        if self.quality is not None and self.quality < 1:
            raise InputError(f"quality cannot be checked on {self.quality} scenes; pass 1 or more, such as 16")


@dataclass(frozen=True)
class ExportReport:
    """The bundle, and per stage its seconds and peak bytes."""

    bundle: Bundle
    stages: dict[str, dict[str, float]]


def export_bundle(
    source: SourceSpec, path: Path, options: ExportOptions, *, overwrite: bool = False, on_event: OnEvent | None = None
) -> ExportReport:
    """Export `source` to a new bundle at `path`, verified unless the options say not.

    Whatever fails, nothing is left at `path`. Raises CheckpointError and InputError before work begins, ExportError
    when the model cannot be exported or the file does not compute what PyTorch does.
    """
    require_packages(options.verify, options.quality is not None)
    tell = on_event or (lambda event: None)
    stages: dict[str, dict[str, float]] = {}

    def run(stage: str, function: str, request: dict[str, Any], total: int) -> ChildResult:
        def forward(event: dict[str, Any]) -> None:
            tell({"stage": stage, "total": total, "detail": "", **event})

        forward({"step": 0})
        title = f"stage {stage} of the export"
        try:
            result = run_in_child(function, request, title=title, on_event=forward, failure=ExportError)
        except OSError as error:
            raise ExportError(f"{title} could not write: {error.strerror}; make room, or choose another -o") from error
        stages[stage] = {"seconds": round(result.seconds, 2), "peak_bytes": result.peak_bytes}
        forward({"step": total, "cost": stages[stage]})
        return result

    with BundleWriter(path, overwrite) as writer:
        request = {
            "source": asdict(source),
            "policy": asdict(options.policy),
            "merge": options.merge,
            "outputs": list(options.outputs),
            "opset": options.opset,
            "input": options.input,
            "static": asdict(options.static),
            "split": options.split,
            "folder": str(writer.folder),
        }
        facts = run("export", f"{__name__}:export_stage", request, len(export_phases(options.split))).value
        config = ModelConfig.from_dict(facts["config"])
        model = _model_request(writer.folder, options.split)
        verification = Verification("skipped", limits=Limits.of(options.policy.precision).errors)
        if options.verify:
            with tempfile.TemporaryDirectory(prefix=".verify-", dir=writer.folder) as folder:
                verification = _verify(request, options, config, Path(folder), model, run)
        if options.quality is not None:
            with tempfile.TemporaryDirectory(prefix=".verify-", dir=writer.folder) as folder:
                plan = QualityPlan.of(config, options.static, options.quality)
                report = _quality(request, options, plan, facts, Path(folder), model, run)
            verification = replace(verification, quality=report)
        tell({"stage": "bundle", "step": 0, "total": 1, "detail": ""})
        bundle = writer.commit(_manifest(facts, config, options, verification))
        tell({"stage": "bundle", "step": 1, "total": 1, "detail": ""})
    return ExportReport(bundle, stages)


def require_packages(verify: bool, quality: bool = False) -> None:
    """Raise MissingExtraError for a package that the export needs and that is not installed."""
    more = (*(("onnxruntime",) if verify else ()), *(("scipy",) if quality else ()))
    for package in ("torch", "onnx", "onnxscript", "safetensors", *more):
        require(package)


def _model_request(folder: Path, split: str | None) -> str | dict[str, str]:
    """What a stage runs: the file, or of a split model the files of its parts by their roles."""
    if split is None:
        return str(folder / MODEL_FILE)
    return {role: str(folder / part_file(role)) for role in SPLITS[split]}


def _verify(
    request: dict[str, Any],
    options: ExportOptions,
    config: ModelConfig,
    folder: Path,
    model: str | dict[str, str],
    run: Callable[[str, str, dict[str, Any], int], ChildResult],
) -> Verification:
    precision = options.policy.precision
    names = list(output_names(options.outputs))
    shapes = options.static.verified(options.shapes, config.patch_size)
    request = {
        **request,
        "folder": str(folder),
        "model": model,
        "names": names,
        "outputs": [name for name in names if name in OPTIONAL_OUTPUTS],
        "shapes": [list(shape) for shape in shapes],
        "patch_size": config.patch_size,
    }
    stage_of = {"reference": "reference"}
    stage_of |= {} if options.policy.bfloat16 else {"execute": "executed"}
    stage_of |= {"twin": "twin"} if options.policy.has_twin else {}
    stage_of |= {"round": "rounded"} if options.policy.sixteen_bit else {}
    results = {
        stage: run(stage, f"{verify.__name__}:{function}", request, len(shapes)) for stage, function in stage_of.items()
    }
    kinds = [function for function in stage_of.values() if function != "reference"]
    headroom = {}
    if "round" in results:  # before the errors: an overflow explains them
        headroom = verify.headroom_report(results["round"].value["shares"], precision)
    cases = verify.check(folder, shapes, names, kinds, precision)
    return Verification("passed", verify.limits_report(precision, kinds), tuple(cases), headroom)


def _quality(
    request: dict[str, Any],
    options: ExportOptions,
    plan: QualityPlan,
    facts: dict[str, Any],
    folder: Path,
    model: str | dict[str, str],
    run: Callable[[str, str, dict[str, Any], int], ChildResult],
) -> dict[str, Any]:
    """The manifest's report on the file's quality. Raises ExportError beyond a limit."""
    request = {
        **request,
        "folder": str(folder),
        "model": model,
        "names": list(output_names(options.outputs)),
        "outputs": list(quality.EXPERTS) if facts["config"]["moe"] else [],
        "plan": asdict(plan),
    }
    precision, checkpoint = options.policy.precision, facts["checkpoint"]
    before = quality.judge_reference(plan, request, run)
    comparisons = quality.judge_deployed(quality.kinds_of(options.policy), plan, request, before, run)
    quality.require_quality(comparisons, precision, origin=checkpoint["origin"], licence=checkpoint["licence"])
    return quality.quality_report(plan, comparisons, precision)


_PHASES_OF_A_FILE = ("trace", "translate", "write", "check")


def export_phases(split: str | None) -> tuple[str, ...]:
    """The steps of the stage export."""
    if split is None:
        return ("load", *_PHASES_OF_A_FILE)
    return ("load", *(f"{phase} {role}" for role in SPLITS[split] for phase in _PHASES_OF_A_FILE))


def export_stage(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Child stage: load the weights in their final dtype and write the ONNX files; returns facts for the manifest."""
    import torch

    from moe3d_deploy.export import graph
    from moe3d_deploy.model.moe3d import check_outputs

    phases = export_phases(request["split"])

    def phase(name: str) -> None:
        emit({"step": phases.index(name), "detail": name})

    phase("load")
    source = SourceSpec(**request["source"])
    policy = PrecisionPolicy(**request["policy"])
    opened = source.open()
    check_outputs(opened.config, request["outputs"])
    static = StaticShape(**request["static"])
    static.check(opened.config.patch_size)
    model = source.load(policy, request["outputs"])
    facts = {
        "name": opened.name,
        "config": model.config.to_dict(),
        "checkpoint": {"origin": opened.origin, "sha256": opened.sha256(), "licence": opened.licence},
        "torch": torch.__version__,
    }
    metadata = {
        "moe3d.version": __version__,
        "moe3d.precision": policy.precision,
        "moe3d.model_config": json.dumps(facts["config"], sort_keys=True),
        "moe3d.checkpoint": json.dumps(facts["checkpoint"], sort_keys=True),
        "moe3d.tensors": graph.meanings(
            (*model_inputs(request["input"], static), *model_outputs(request["outputs"], model.config, static))
        ),
        "moe3d.preprocessing": json.dumps(
            asdict(_preprocessing(model.config, request["input"], static)), sort_keys=True
        ),
        "moe3d.shape_ranges": json.dumps(asdict(static.ranges(ShapeRanges.of(model.config))), sort_keys=True),
    }
    options = {
        "merge": request["merge"],
        "outputs": request["outputs"],
        "opset": request["opset"],
        "input_type": request["input"],
        "static": static,
        "policy": policy,
        "metadata": metadata,
        "progress": phase,
    }
    if request["split"]:
        graph.export_parts(model, Path(request["folder"]), request["split"], **options)
    else:
        graph.export_onnx(model, Path(request["folder"]), **options)
    return facts


def _manifest(
    facts: dict[str, Any], config: ModelConfig, options: ExportOptions, verification: Verification
) -> Manifest:
    versions = {"moe3d_deploy": __version__, "python": platform.python_version(), "torch": facts["torch"]}
    for name in ("onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    parts = parts_of(options.split, config, options.outputs, options.input, options.static)
    return Manifest(
        name=facts["name"],
        created_by=versions,
        model_config=facts["config"],
        checkpoint=Checkpoint(**facts["checkpoint"]),
        preprocessing=_preprocessing(config, options.input, options.static),
        inputs=model_inputs(options.input, options.static),
        outputs=model_outputs(options.outputs, config, options.static),
        precision=options.policy.precision,
        opset=options.opset,
        shape_ranges=options.static.ranges(ShapeRanges.of(config)),
        merged_experts=options.merge and config.moe is not None,
        verification=verification,
        parts=parts,
        model_file=parts[0].file if parts else MODEL_FILE,
        format_version=FORMAT_VERSION if parts else SINGLE_FILE_VERSION,
    )


def _preprocessing(config: ModelConfig, input_type: str, static: StaticShape) -> Preprocessing:
    return static.preprocessing(replace(Preprocessing.of(config), layout=layout(input_type)))

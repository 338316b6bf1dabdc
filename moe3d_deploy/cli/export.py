"""`moe3d export`, also `moe3d-export`: checkpoint -> verified ONNX file -> engine, in one bundle folder."""

import json
import math
from pathlib import Path
from typing import Any

import click

from moe3d_deploy.bundle import Bundle, is_bundle
from moe3d_deploy.cli.arguments import comma_list, given_flags
from moe3d_deploy.cli.export_engine import CHANNELS_LAST, EngineRequest, FileFacts, build_engine, engine_options
from moe3d_deploy.cli.export_events import Reporter
from moe3d_deploy.config import PRESETS
from moe3d_deploy.errors import InputError
from moe3d_deploy.export.contract import INPUTS, OPSET, OPSETS, OPTIONAL_OUTPUTS, layout
from moe3d_deploy.export.pipeline import ExportOptions, export_bundle, require_packages
from moe3d_deploy.export.precision import PRECISIONS, PrecisionPolicy
from moe3d_deploy.export.quality import SCENES, QualityPlan, quality_lines
from moe3d_deploy.export.source import SourceSpec
from moe3d_deploy.export.static import StaticShape
from moe3d_deploy.manifest import SPLITS, ShapeRanges, Verification

_OF_A_CHECKPOINT = (
    "precision", "outputs", "opset", "input_type", "static", "split", "no_merge", "no_verify", "verify_quality", "seed",
    "allow_pickle", "overwrite",
)  # fmt: skip


@click.command("export", short_help="Export a preset, checkpoint or bundle to a verified bundle")
@click.argument("source")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Bundle folder to write.")
@click.option(
    "--precision", type=click.Choice(PRECISIONS), default="fp16", show_default=True,
    help="What is 16-bit; ...-fp32heads and bf16 keep the dense heads in float32. bf16 has the range of float32, "
    "and runs in TensorRT only; int8 has matrix products in 8 bits, and is for ONNX Runtime on a CPU.",
)  # fmt: skip
@click.option(
    "--outputs", default="", metavar="NAMES",
    help="Outputs beyond depth, depth_conf, extrinsics and intrinsics, by commas: " + ", ".join(OPTIONAL_OUTPUTS) + ".",
)  # fmt: skip
@click.option(
    "--opset", type=click.Choice([str(opset) for opset in OPSETS]), default=str(OPSET), show_default=True,
    help="ONNX opset; 23 has attention as one operator, and needs TensorRT 10.14 or newer.",
)  # fmt: skip
@click.option(
    "--input", "input_type", type=click.Choice(list(INPUTS)), default="float32", show_default=True,
    help="Images as floats in [0,1], (B,S,3,H,W), or as 8-bit pixels, (B,S,H,W,3).",
)  # fmt: skip
@click.option(
    "--static", default=None, metavar="BxSxHxW",
    help="Numbers for what the file fixes, letters for what stays free: 1xSx392x518.  [default: all free]",
)  # fmt: skip
@click.option(
    "--split", type=click.Choice(list(SPLITS)), default=None,
    help="Two ONNX files in place of one: the dense heads apart, to run them on a few views at a time; or the encoder, "
    "to keep the tokens of views that come again.  [default: one file]",
)  # fmt: skip
@click.option("--no-merge", is_flag=True, help="Keep a convolution per expert and plain operations for the mix.")
@click.option("--no-verify", is_flag=True, help="Do not compare the file with PyTorch; the manifest records it.")
@click.option(
    "--verify-quality", type=click.IntRange(min=1), is_flag=False, flag_value=SCENES, default=None, metavar="[SCENES]",
    help="Also compare the file's quality with PyTorch's, on so many rendered scenes with exact truth; fails beyond a "
    f"limit. Write it after SOURCE.  [default without a number: {SCENES}]",
)  # fmt: skip
@engine_options
@click.option("--seed", type=click.IntRange(min=0), help="Take a preset's seeded random weights, not trained ones.")
@click.option("--allow-pickle", is_flag=True, help="Read a .pt checkpoint (weights only).")
@click.option("--overwrite", is_flag=True, help="Replace the bundle at -o.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with sizes, times, memory and errors.")
@click.option("--json-events", is_flag=True, help="Print a line of JSON per event; the last is the object of --json.")
def export_command(
    source: str,
    output: Path | None,
    precision: str,
    outputs: str,
    opset: str,
    input_type: str,
    static: str | None,
    split: str | None,
    no_merge: bool,
    no_verify: bool,
    verify_quality: int | None,
    seed: int | None,
    allow_pickle: bool,
    overwrite: bool,
    as_json: bool,
    json_events: bool,
    **engine: Any,
) -> None:
    """Export SOURCE, a preset, a checkpoint or a bundle, to a bundle: one ONNX file, verified, and an engine.

    Presets (vggt-1b, moe3d-1b, moe3d-tiny) without trained weights have seeded random ones. A bundle as SOURCE gets
    another engine.

    \b
    moe3d-export moe3d-tiny -o bundle --precision fp16 --views 1:2:4
    moe3d-export bundle --views 8 --height 392 --width 518
    moe3d-export my-moe3d -o wide --precision bf16 --opset 23
    moe3d-export my-moe3d -o camera --input uint8 --static 1x1x392x518
    moe3d-export my-moe3d -o many --split heads
    moe3d-export my-moe3d -o maps --outputs expert_weights,expert_entropy --builder none
    moe3d-export my-moe3d -o checked --verify-quality 32
    """
    reporter = Reporter(json_events)
    try:
        if as_json and json_events:
            raise InputError("--json and --json-events are two forms of one answer: leave one of them out")
        report: dict[str, Any] = {}
        is_preset = source.removeprefix("preset:") in PRESETS
        if not is_preset and not Path(source).exists():
            raise InputError(f"{source}: no such bundle or checkpoint, nor a preset ({', '.join(PRESETS)})")
        request = EngineRequest.of(**engine)
        if is_bundle(source):
            bundle = _open_bundle(source, output, request, reporter)
        else:
            if output is None:
                raise InputError("-o is missing: name the bundle folder to write")
            if (given := given_flags("seed")) and not is_preset:
                raise InputError(f"{given[0]} is for the weights of a preset, {source} has its own: leave it out")
            if no_verify and (given := given_flags("verify_quality")):
                raise InputError(
                    f"{given[0]} is a part of the verification that --no-verify leaves out: drop one of them"
                )
            spec = SourceSpec(source, seed, allow_pickle)
            options = ExportOptions(
                policy=PrecisionPolicy(precision),
                merge=not no_merge,
                outputs=comma_list(outputs),
                verify=not no_verify,
                opset=int(opset),
                input=input_type,
                static=StaticShape.parse(static) if static else StaticShape(),
                quality=verify_quality,
                split=split,
            )
            _check_before_work(request, spec, options, reporter)
            bundle = _export(spec, output, options, overwrite, reporter, report)
        if request.wanted:
            bundle, report["engine"] = build_engine(bundle, request, reporter)
        _finish(bundle, report, reporter, as_json, json_events)
    except BaseException as error:
        reporter.failed(error)
        raise


def _open_bundle(source: str, output: Path | None, request: EngineRequest, reporter: Reporter) -> Bundle:
    if output is not None:
        raise InputError(f"{source} is a bundle: its engines are built in place; leave -o out")
    if not request.wanted:
        raise InputError(f"{source} is a bundle already and --builder none builds no engine: nothing to do")
    if given := given_flags(*_OF_A_CHECKPOINT):
        raise InputError(f"{source} is a bundle, its model is exported already; leave {given[0]} out")
    bundle = Bundle.open(source, engines=False)  # a damaged engine is what this may be about to replace
    request.check(FileFacts.of(bundle.manifest), reporter, exported=True)
    return bundle


def _check_before_work(request: EngineRequest, spec: SourceSpec, options: ExportOptions, reporter: Reporter) -> None:
    """Fail before minutes of work, not after: the weights' keys and shapes, the builder, the shapes."""
    require_packages(verify=False, quality=options.quality is not None)
    checkpoint = spec.open()
    config, parameters = checkpoint.config, sum(math.prod(shape) for shape in checkpoint.shapes().values())
    experts = f"{config.moe.num_experts} experts" if config.moe else "no experts"
    reporter.line("checkpoint", f"{checkpoint.origin}, {parameters / 1e6:.1f} M parameters, {experts}")
    reporter.line("licence", checkpoint.licence)
    options.static.check(config.patch_size)
    if options.quality is not None:
        QualityPlan.of(config, options.static, options.quality)
    if request.wanted:
        file = FileFacts(
            config,
            options.static.ranges(ShapeRanges.of(config)),
            options.policy.precision,
            options.opset,
            options.merge,
            layout(options.input) == CHANNELS_LAST,
            options.split,
        )
        request.check(file, reporter, exported=False)


def _export(
    spec: SourceSpec, output: Path, options: ExportOptions, overwrite: bool, reporter: Reporter, report: dict[str, Any]
) -> Bundle:
    def on_event(event: dict[str, Any]) -> None:
        if cost := event.get("cost"):
            reporter.line(event["stage"], f"{cost['seconds']:6.1f} s   peak {cost['peak_bytes'] / 1e9:.1f} GB")
        else:
            reporter.report(event["stage"], event["step"], event["total"], event["detail"])

    result = export_bundle(spec, output, options, overwrite=overwrite, on_event=on_event)
    verification = result.bundle.manifest.verification
    reporter.line("verify", _verification_summary(verification))
    for line in quality_lines(verification.quality) if verification.quality else ():
        reporter.line("quality", line)
    report["stages"] = result.stages
    return result.bundle


def _verification_summary(verification: Verification) -> str:
    if verification.status != "passed":
        return "skipped (--no-verify); the manifest says so"
    worst = {
        kind: max(case["errors"][name]["depth"][kind] for case in verification.cases for name in case["errors"])
        for kind in ("max", "mean")
    }
    bounds = verification.limits.get("depth", verification.limits["*"])
    allowed = ", ".join(f"{kind} {bound:g}" for kind, bound in bounds.items())
    off = f"depth off by max {worst['max']:.1e}, mean {worst['mean']:.1e}"
    return f"{len(verification.cases)} shapes, {off} (limits: {allowed})"


def _finish(bundle: Bundle, report: dict[str, Any], reporter: Reporter, as_json: bool, json_events: bool) -> None:
    files = bundle.manifest.files
    size = sum(entry.size for entry in files.values())
    if as_json or json_events:
        report |= {
            "bundle": str(bundle.path),
            "files": {name: entry.size for name, entry in files.items()},
            "verification": {
                "status": bundle.manifest.verification.status,
                "cases": list(bundle.manifest.verification.cases),
                **({"quality": quality} if (quality := bundle.manifest.verification.quality) else {}),
            },
        }
        if json_events:
            reporter.result(report)
        else:
            click.echo(json.dumps(report, indent=2, sort_keys=True))
        return
    reporter.line("bundle", f"{bundle.path}: {len(files)} files, {size / 1e6:.1f} MB")
    only_engines = bundle.manifest.only_in_tensorrt  # `moe3d run` takes the ONNX file
    click.echo(f"moe3d doctor {bundle.path}" if only_engines else f"moe3d run {bundle.path} IMAGES... -o out")

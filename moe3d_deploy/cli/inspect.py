"""`moe3d inspect`: what is in a bundle. Reads the manifest and the digests; loads no model and needs no GPU."""

import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeGuard

import click

from moe3d_deploy.bundle import Bundle, Verify
from moe3d_deploy.errors import BundleError
from moe3d_deploy.manifest import EngineRecord, Manifest, Part, Range, Tensor, Verification
from moe3d_deploy.trt import accepted_findings, plugin_digest, rebuild_command

_LABEL_WIDTH = 14
_ONLY_TENSORRT = "; runs in TensorRT only, as an engine (no CPU runtime has bf16 kernels)"
_ONLY_ONNXRUNTIME = "; runs in ONNX Runtime on a CPU only"
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")


@click.command("inspect")
@click.argument("bundle", type=click.Path())
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object: bundle, digests, engine_faults, manifest."
)
@click.option("--no-digest", is_flag=True, help="Check names and sizes only; a few GB take seconds to digest.")
def inspect_command(bundle: str, as_json: bool, no_digest: bool) -> None:
    """Show what is in BUNDLE, after checking that it is whole.

    An engine that is missing or damaged is marked, and the exit code is 2; the ONNX file can be run without it.

    \b
    Example:
        moe3d inspect bundle --no-digest
    """
    verify: Verify = "sizes" if no_digest else "full"
    opened = Bundle.open(bundle, verify=verify, engines=False)
    faults = opened.engine_faults(verify)
    digests = "not checked" if no_digest else "checked"
    if as_json:
        manifest = json.loads(opened.manifest.to_json())
        document = {"bundle": bundle, "digests": digests, "engine_faults": faults, "manifest": manifest}
        click.echo(json.dumps(document, indent=2, sort_keys=True))
    else:
        for line in report(bundle, digests, opened.manifest, faults):
            click.echo(_CONTROL.sub("?", line))
    if faults:
        count = f"{len(faults)} of {len(opened.manifest.engines)} engines missing or damaged"
        first = next(engine for engine in opened.manifest.engines if engine.file in faults)
        raise BundleError(f"bundle {bundle} has {count}; build one again with: {rebuild_command(bundle, first)}")


def report(path: str, digests: str, manifest: Manifest, faults: Mapping[str, str]) -> list[str]:
    """The lines of the text form; `faults` is what is wrong with which engine."""
    config, checkpoint, prep = manifest.config, manifest.checkpoint, manifest.preprocessing
    experts = "no experts (VGGT head)"
    if config.moe:
        experts = f"K = {config.moe.num_experts} experts, {'merged' if manifest.merged_experts else 'separate'}"
    sizes = (
        f"encoder {config.vit.depth} x {config.vit.embed_dim}, "
        f"aggregator {config.aggregator.depth} x {config.aggregator.embed_dim}, "
        f"patch {config.patch_size}, image size {config.img_size}"
    )
    ranges = manifest.shape_ranges
    only_in = _ONLY_TENSORRT * manifest.only_in_tensorrt + _ONLY_ONNXRUNTIME * manifest.only_in_onnxruntime
    sections: list[tuple[str, list[str]]] = [
        ("bundle", [f"{path}, digests {digests}"]),
        ("model", [f"{manifest.name}, {experts}", sizes]),
        ("checkpoint", [checkpoint.origin, f"sha256 {checkpoint.sha256 or 'none (no file)'}"]),
        ("licence", [checkpoint.licence]),
        ("precision", [f"{manifest.precision}, opset {manifest.opset}{only_in}"]),
        ("images", [f"{prep.mode} to {prep.size}, multiples of {prep.patch_size}, {prep.layout}"]),
        ("inputs", _tensors(manifest.inputs)),
        ("outputs", _tensors(manifest.outputs)),
        ("parts", [line for part in manifest.parts for line in _part(part)]),
        ("shapes", [f"{name} {_range(getattr(ranges, name))}" for name in ("batch", "views", "height", "width")]),
        ("files", _columns((name, _size(entry.size)) for name, entry in sorted(manifest.files.items()))),
        (
            "engines",
            [line for engine in manifest.engines for line in _engine(engine, faults.get(engine.file))] or ["none"],
        ),
        ("verification", _verification(manifest.verification)),
        ("written by", [", ".join(f"{tool} {version}" for tool, version in sorted(manifest.created_by.items()))]),
    ]
    return [
        (label if first else "").ljust(_LABEL_WIDTH) + line
        for label, lines in sections
        for first, line in zip([True] + [False] * len(lines), lines, strict=False)
    ]


def _tensors(tensors: Iterable[Tensor]) -> list[str]:
    return _columns((t.name, t.dtype, f"({', '.join(map(str, t.shape))})", t.meaning) for t in tensors)


def _part(part: Part) -> list[str]:
    how = "view by view, in chunks of any size" if part.per_view else "all views of a scene together"
    lines = [f"{part.role}, {part.file}: {how}"]
    for verb, tensors in (("takes", part.inputs), ("gives", part.outputs)):
        lines += [f"  {verb}  {line}" for line in _tensors(tensors)]
    return lines


def _range(values: Range) -> str:
    if values.min == values.max:
        return str(values.min)
    step = f" in steps of {values.step}" if values.step > 1 else ""
    return (f"{values.min} and more" if values.max is None else f"{values.min}..{values.max}") + step


def _engine(engine: EngineRecord, fault: str | None) -> list[str]:
    capabilities = ", ".join(f"{value // 10}.{value % 10}" for value in engine.compute_capabilities)
    plugin = "needs its plugin library" if engine.plugin else "no plugin"
    of_part = f", part {engine.part}" if engine.part else ""
    if digest := plugin_digest(engine):
        plugin = f"needs the plugin library of sha256 {digest}"
    lines = [
        engine.file + of_part,
        f"  {engine.builder} {engine.builder_version}, {engine.precision}, compute capability {capabilities}, {plugin}",
    ]
    if isinstance(summary := engine.audit.get("summary"), str):
        lines.append(f"  {summary}")
    lines += [f"  accepted ({name}): {text}" for name, text in accepted_findings(engine).items()]
    if isinstance(flags := engine.build.get("flags"), dict) and flags:
        lines.append("  flags " + ", ".join(f"{name} {json.dumps(value)}" for name, value in sorted(flags.items())))
    planned = _object(engine.audit.get("plan"))
    rows = planned.get("profiles")
    for profile, row in itertools.zip_longest(engine.profiles, rows if isinstance(rows, list) else []):
        if profile is None:
            break
        shapes = ("x".join(map(str, shape)) for shape in (profile.min, profile.opt, profile.max))
        lines.append("  profile BxSxHxW {} / {} / {} (min / opt / max)".format(*shapes))
        work = _object(row).get("flops")
        of_largest = f" at the largest shape, {work / 1e12:.3g} TFLOP" if _is_count(work) else " at the largest shape"
        lines += _compared("activation memory" + of_largest, _object(row).get("activation_bytes"))
    lines += _compared("size of the engine, planned as its weights", planned.get("plan_bytes"))
    lines += [f"  note: {note}" for notes in (engine.audit.get("notes"), planned.get("notes")) for note in _list(notes)]
    if fault:
        lines.append(f"  CANNOT BE USED: {fault}")
    return lines


def _compared(what: str, figures: Any) -> list[str]:
    """A line with what `moe3d plan` predicts, what the builder says and their ratio; none without both."""
    predicted, found = (_object(figures).get(name) for name in ("predicted", "found"))
    if not _is_count(predicted) or not _is_count(found):
        return []
    return [f"    {what}: planned {_size(predicted)}, built {_size(found)}, {found / predicted:.2f} of the plan"]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _object(value: Any) -> dict[str, Any]:
    """An inner object of a record, whose form is free: what is none has no keys."""
    return value if isinstance(value, dict) else {}


def _is_count(value: Any) -> TypeGuard[int]:
    return type(value) is int and value > 0


def _verification(verification: Verification) -> list[str]:
    """The worst of all cases for every error that has a limit, and the tensor nearest to overflow."""
    worst: dict[tuple[str, ...], float] = {}
    for case in verification.cases:
        for path, error in _numbers(case.get("errors")):
            worst[path] = max(error, worst.get(path, error))
    limits = dict(_numbers(verification.limits))
    rows = []
    for (stage, output, figure), error in ((path, error) for path, error in sorted(worst.items()) if len(path) == 3):
        of_stage = verification.limits.get(stage)  # a stage may have limits of its own
        own, bounds = ((stage,), of_stage) if isinstance(of_stage, dict) else ((), verification.limits)
        limit = limits.get((*own, output, figure), None if output in bounds else limits.get((*own, "*", figure)))
        if limit is not None:
            rows.append((stage, output, figure, f"{error:.2g}", f"limit {limit:.2g}"))
    lines = [f"{verification.status}, {len(verification.cases)} cases", *_columns(rows)]
    if largest := dict(_numbers(verification.headroom.get("largest"))):
        path = max(largest, key=lambda key: largest[key])
        limit = dict(_numbers(verification.headroom)).get(("limit",))
        bound = "" if limit is None else f", limit {limit:.2g}"
        lines.append(f"largest share of the 16-bit range: {largest[path]:.2g} in {'.'.join(path)}{bound}")
    return lines


def _numbers(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    """The numbers in nested objects with the keys that lead to them; whatever else there is, is passed over."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(inner, (*path, key))
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield path, value


def _columns(rows: Iterable[tuple[str, ...]]) -> list[str]:
    table = list(rows)
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))] if table else []
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]


def _size(count: int) -> str:
    """A file size in decimal units, as disks and networks count."""
    if count < 1000:
        return f"{count} B"
    value = count / 1000
    for unit in ("kB", "MB", "GB"):
        if value < 999.95:
            return f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"

"""`moe3d doctor`: whether this machine can export, build and run, what of a bundle runs on it, and what to do."""

import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import click

from moe3d_deploy.doctor import examine
from moe3d_deploy.errors import BundleError, Moe3dError

_WIDTH, _LABEL_WIDTH = 100, 14
_HIDDEN = ("core", "dev")  # the one has a line of its own, the other is for work on this project
_LEVELS = ("error", "warning", "note")  # the worst first
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

Section = tuple[str, list[str]]


@click.command("doctor")
@click.argument("bundles", nargs=-1, type=click.Path(), metavar="[BUNDLE]...")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; docs/doctor.md lists its keys.")
@click.option(
    "--timeout", type=click.FloatRange(min=0.1), default=60, show_default=True,
    help="Seconds a library may take to load.",
)  # fmt: skip
def doctor_command(bundles: tuple[str, ...], as_json: bool, timeout: float) -> None:
    """Say what this machine can run, and what to do about the rest.

    With BUNDLEs: what of each can run here and why not otherwise. Names and sizes are checked; digests are for
    moe3d inspect. The exit code is 0 unless a BUNDLE is missing or broken (2) or the core does not work (1).

    \b
    Example:
        moe3d doctor
    """
    facts = examine(bundles, timeout_seconds=timeout)
    if as_json:
        click.echo(json.dumps(facts, indent=2, sort_keys=True))
    else:
        for line in report(facts):
            click.echo(line)
    if not facts["core_works"]:
        raise Moe3dError("the core does not work here, see the report; install moe3d-deploy again")
    if broken := [bundle["path"] for bundle in facts["bundles"] if bundle["fault"] or bundle["damaged_engines"]]:
        raise BundleError(f"{broken[0]}: missing or broken, see the report; copy the bundle again, or build it again")


def report(facts: dict[str, Any]) -> list[str]:
    """The lines of the text form, wrapped at 100 characters, but for what to do: that can be pasted."""
    sections = [*_software(facts), *_hardware(facts)]
    for bundle in facts["bundles"]:
        sections += [("", [""]), *_bundle(bundle)]
    lines = [line for label, paragraphs in sections for line in _wrapped(label, paragraphs)]
    return [*lines, "", *_to_do(facts["problems"])]


def _wrapped(label: str, paragraphs: Sequence[str]) -> Iterable[str]:
    """The label in a column of its own; a continued paragraph is indented by two more."""
    column = label.ljust(_LABEL_WIDTH)
    for paragraph in paragraphs:
        text = _CONTROL.sub("?", paragraph)
        lines = textwrap.wrap(
            text, _WIDTH - _LABEL_WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False
        )
        for line in lines or [""]:
            yield (column + line).rstrip()
            column = " " * _LABEL_WIDTH


def _software(facts: dict[str, Any]) -> list[Section]:
    python, libraries = facts["python"], facts["libraries"]
    return [
        ("moe3d-deploy", [facts["moe3d_deploy"]]),
        ("python", [f"{python['version']}, {python['system']}, {python['executable']}"]),
        *_packages(facts["extras"]),
        ("ONNX Runtime", [_state(libraries["onnxruntime"], "cpu", _providers)]),
        ("PyTorch", [_state(libraries["torch"], "export")]),
        ("TensorRT", [_state(libraries["tensorrt"], "trt", lambda _: "builds for a GPU of the building machine")]),
        ("TensorRT-RTX", [_state(libraries["tensorrt_rtx"], "rtx", lambda _: "builds engines without a GPU")]),
    ]


def _packages(extras: dict[str, Any] | None) -> list[Section]:
    if extras is None:
        return [("extras", ["unknown: moe3d-deploy is not installed, it runs from a folder"])]
    return [
        ("core", [_group("core", extras["core"])]),
        ("extras", [f"{extra}: {_group(extra, group)}" for extra, group in extras.items() if extra not in _HIDDEN]),
    ]


def _group(extra: str, group: dict[str, Any]) -> str:
    installed = ", ".join(f"{p['brought_by']} {p['version']}" for p in group["packages"] if p["version"])
    if group["state"] == "complete":
        return installed
    command = f"pip install 'moe3d-deploy[{extra}]'"
    if group["state"] == "absent" and extra == "gpu":
        return f"not installed; takes the place of cpu, never beside it ({command})"
    if group["state"] == "absent":
        return f"not installed ({command})"
    lacking = ", ".join(f"{p['name']} {p['fault']}" for p in group["packages"] if p["fault"])
    return f"incomplete: {lacking} ({command})"


def _state(library: dict[str, Any], extra: str, more: Any = None) -> str:
    if not library["installed"]:
        return f"not installed (pip install 'moe3d-deploy[{extra}]')"
    if library["fault"]:
        return f"installed, but {library['fault']}"
    return ", ".join([f"{library['version']}, loads", *([more(library)] if more else [])])


def _providers(library: dict[str, Any]) -> str:
    return "providers " + ", ".join(library["providers"])


def _hardware(facts: dict[str, Any]) -> list[Section]:
    cuda, machine = facts["cuda"], facts["machine"]
    driver = {
        "absent": "none (no libcuda.so.1): no engine runs here",
        "faulty": f"installed, but {cuda['fault']}",
        "working": f"{cuda['version'] or 'version unknown'}, up to CUDA {cuda['api'] or 'unknown'}",
    }[cuda["driver"]]
    gpus = [
        f"{gpu['name']}, compute capability {gpu['compute_capability']}, {_gb(gpu['memory_bytes'])}"
        for gpu in cuda["gpus"]
    ]
    cores = f"{machine['logical_cores']} logical cores, {machine['usable_cores']} usable by this process"
    if machine["core_limit"] is not None:
        cores += f", container limit {machine['core_limit']:g} cores"
    limit = machine["memory_limit_bytes"]
    memory = f"{_gb(machine['memory_bytes'])}, {_gb(machine['available_memory_bytes'])} available, container limit "
    return [
        ("CUDA driver", [driver]),
        ("GPUs", gpus or ["none visible"]),
        ("CPU", [f"{machine['cpu']}, {cores}"]),
        ("memory", [memory + ("none" if limit is None else _gb(limit))]),
        ("disk", [f"{_gb(d['free_bytes'])} free in {d['folder']} ({d['use']})" for d in facts["disk"]]),
    ]


def _bundle(bundle: dict[str, Any]) -> list[Section]:
    if bundle["fault"]:
        return [("bundle", [bundle["path"], f"cannot be used: {bundle['fault']}"])]
    size = f"ONNX file with weights {_gb(bundle['weight_bytes'])}"
    lines = [bundle["path"], f"{bundle['name']}, {bundle['precision']}, input {bundle['input']}, {size}"]
    sections = [("bundle", lines), _part("  ONNX file", bundle["model"], "can run here in ONNX Runtime on the CPU")]
    engines = [_part("  engine", engine, "nothing speaks against running it here") for engine in bundle["engines"]]
    return [*sections, *(engines or [("  engines", ["none"])])]


def _part(label: str, part: dict[str, Any], good: str) -> Section:
    reasons = [f"- {reason['why']}" for reason in part["reasons"]]
    cautions = [f"- caution: {reason['why']}" for reason in part["cautions"]]
    return label, [part["file"], good if part["runs"] else "does not run here:", *reasons, *cautions]


def _to_do(problems: Sequence[dict[str, str]]) -> Iterable[str]:
    """What to do, the worst first, each once; below it what it is good for."""
    if not problems:
        return _wrapped("to do", ["nothing: all that was looked at is fine"])
    found: dict[tuple[str, str], list[str]] = {}
    for problem in sorted(problems, key=lambda problem: _LEVELS.index(problem["level"])):
        found.setdefault((problem["level"], problem["remedy"]), []).append(problem["problem"])
    lines: list[str] = []
    for (level, remedy), texts in found.items():
        lines += [_CONTROL.sub("?", f"  {level}: {remedy}"), *_wrapped("    because", texts)]
    return ["to do", *lines]


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"

"""Every GPU check there is, in one command: `python -m moe3d_deploy.benchmarks.gpu_checks --out FILE`.

A new check is a function of a CheckRun in a module of its own and an entry of CHECKS. What each one shows is in
docs/gpu.md.
"""

import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click

from moe3d_deploy.benchmarks.checks import ERROR, FAILED, Check, Outcome, execute
from moe3d_deploy.benchmarks.environment import environment, without_paths
from moe3d_deploy.bundle import Bundle
from moe3d_deploy.cli.parameters import OutputFile
from moe3d_deploy.errors import InputError, Moe3dError
from moe3d_deploy.files import atomic_write

FORMAT_VERSION = 1
_HERE = "moe3d_deploy.benchmarks"

CHECKS: tuple[Check, ...] = (
    Check(
        "rtx_engine_runs",
        f"{_HERE}.checks_engines:rtx_engine_runs",
        900,
        "does a TensorRT-RTX engine run on this card and give PyTorch's depth?",
    ),
    Check(
        "tensorrt_plugin",
        f"{_HERE}.checks_tensorrt:tensorrt_plugin",
        1800,
        "do TensorRT's engines with and without the expert-mix plugin give PyTorch's depth, and how fast are they?",
    ),
    Check(
        "torch_golden",
        f"{_HERE}.checks_torch:torch_golden",
        300,
        "does the model on this card equal the golden files in float32?",
    ),
    Check(
        "expert_mix_memory",
        f"{_HERE}.checks_experts:expert_mix_memory",
        300,
        "what do four merged experts cost in time and memory over VGGT's head?",
    ),
    Check(
        "expert_mix_kernel",
        f"{_HERE}.checks_kernels:expert_mix_kernel",
        600,
        "does the expert-mix kernel give float64's values, in every type, layout and size?",
    ),
    Check(
        "expert_mix_bandwidth",
        f"{_HERE}.checks_kernels:expert_mix_bandwidth",
        600,
        "what share of a copy's bandwidth does the expert-mix kernel reach?",
    ),
    Check(
        "expert_mix_sanitizer",
        f"{_HERE}.checks_kernels:expert_mix_sanitizer",
        900,
        "does compute-sanitizer find anything in the expert-mix kernel?",
    ),
    Check(
        "expert_head_price",
        f"{_HERE}.checks_head_price:expert_head_price",
        900,
        "what do the experts add to the model's time, with and without the kernel, for what they add in arithmetic?",
    ),
    Check(
        "onnxruntime_cuda",
        f"{_HERE}.checks_onnxruntime:onnxruntime_cuda",
        600,
        "does ONNX Runtime run the file on this card, every product and convolution of it?",
    ),
    Check(
        "scenes",
        f"{_HERE}.checks_training:scenes",
        300,
        "are scenes that are rendered on this card those of the CPU?",
    ),
    Check(
        "training",
        f"{_HERE}.checks_training:training",
        900,
        "does a training run on this card, resume, compile and keep features, and is a step the CPU's?",
    ),
    Check(
        "torch_full_size",
        f"{_HERE}.checks_torch:torch_full_size",
        1800,
        "time, memory and error of the full-size model in PyTorch, float32 and 16-bit, eager and compiled",
    ),
    Check(
        "torch_many_views",
        f"{_HERE}.checks_torch:torch_many_views",
        600,
        "does fp16 hold at 47, 48 and 49 views, where attention sums over more keys than fp16 can count?",
    ),
    Check(
        "bench_parity",
        f"{_HERE}.checks_bench:bench_parity",
        1800,
        "how far is the full-size model in 16 bits from float32 on this card, at 41 shapes?",
    ),
    Check(
        "bench_peers",
        f"{_HERE}.checks_bench:bench_peers",
        1800,
        "what does the full-size model take on this card, beside what else runs it?",
    ),
)

Tell = Callable[[str], None]


def run_checks(
    checks: Sequence[Check],
    out: Path,
    *,
    facts: dict[str, Any],
    bundle: Path | None = None,
    tell: Tell = lambda line: None,
) -> dict[str, Any]:
    """Run `checks` one after the other and return the report, which is also in `out` at every moment.

    The file is replaced whenever a check records something: a check that is still at work stands there as an error,
    which is what it is if the run ends now. `facts` is the report's `environment`. OSError passes through.
    """
    report: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "environment": facts,
        "planned": [check.name for check in checks],
        "complete": False,
        "checks": {},
    }
    _write(out, report)
    with tempfile.TemporaryDirectory(prefix="moe3d-gpu-checks-") as work:
        for check in checks:
            _run_one(check, out, report, bundle, Path(work), tell)
    report["complete"] = True
    _write(out, report)
    return _plain(report)


def _run_one(check: Check, out: Path, report: dict[str, Any], bundle: Path | None, work: Path, tell: Tell) -> None:
    last = ""

    def on_change(outcome: Outcome) -> None:
        nonlocal last
        found = {key: value for key, value in asdict(outcome).items() if value not in (None, "", [])}
        report["checks"][check.name] = {"question": check.question, **found}
        _write(out, report)
        if outcome.step != last:
            last = outcome.step
            tell(f"{check.name}: {last}")

    tell(f"{check.name}: {check.question}")
    execute(check, bundle=bundle, work=work, on_change=on_change)


def table(report: dict[str, Any]) -> str:
    """The report's checks for people: a line each with status, seconds and reason, then its notes."""
    found = report["checks"]
    width = max(map(len, found))
    lines = []
    for name, check in found.items():
        lines.append(
            f"{name:{width}}  {check['status']:7}  {check['seconds']:7.1f} s  {check.get('reason', '')}".rstrip()
        )
        lines += [f"{'':{width}}  note: {note}" for note in check.get("notes", [])]
    return "\n".join(lines)


def exit_code(report: dict[str, Any]) -> int:
    """1 if a check failed or ended in an error."""
    return int(any(check["status"] in (FAILED, ERROR) for check in report["checks"].values()))


def _write(out: Path, report: dict[str, Any]) -> None:
    atomic_write(out, (json.dumps(_plain(report), indent=1, allow_nan=False) + "\n").encode())


def _plain(value: Any) -> Any:
    """What a result file may hold: "inf" and "nan" in words, as JSON has no such numbers, and no absolute path."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return without_paths(value) if isinstance(value, str) else value


@click.command()
@click.option("--out", type=OutputFile(), required=True, help="The JSON file to write.")
@click.option(
    "--only",
    "names",
    multiple=True,
    metavar="NAME",
    help=f"Run this check alone; may be given several times. Checks: {', '.join(check.name for check in CHECKS)}.",
)
@click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    help="A bundle of a preset, with or without a TensorRT-RTX engine; without it one is exported.",
)
@click.option("--revision", help="The git revision of the code, for a copied tree that has no git of its own.")
def command(out: Path, names: tuple[str, ...], bundle: Path | None, revision: str | None) -> int:
    """Run every GPU check on the first NVIDIA GPU of this machine.

    \b
    python -m moe3d_deploy.benchmarks.gpu_checks --out gpu.json
    """
    chosen = _choose(names)
    if bundle and (kind := Bundle.open(bundle).manifest.inputs[0].dtype) != "float32":
        raise InputError(f"--bundle {bundle} takes {kind} images and the checks give float32: export without --input")
    facts = environment(revision=revision)
    if not facts["gpus"]:
        raise InputError("these checks need an NVIDIA GPU and its driver, and none is visible; run them where one is")
    report = run_checks(chosen, out, facts=facts, bundle=bundle, tell=lambda line: click.echo(line, err=True))
    click.echo(table(report))
    click.echo(f"written to {out}")
    return exit_code(report)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (default: those of the process) and return its exit code."""
    try:
        return command.main(arguments, prog_name="gpu_checks", standalone_mode=False) or 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.Abort:
        return _end("interrupted; the checks that were done are in the file", 130)  # 128 + SIGINT, as shells have it
    except Moe3dError as error:
        return _end(str(error), error.exit_code)
    except OSError as error:
        return _end(f"{error.filename}: {error.strerror}", 1)


def _choose(names: Sequence[str]) -> list[Check]:
    """The checks of these names in the registry's order; all for none."""
    known = [check.name for check in CHECKS]
    for name in names:
        if name not in known:
            raise InputError(f"--only {name}: there is no such check; choose from {', '.join(known)}")
    return [check for check in CHECKS if not names or check.name in names]


def _end(message: str, code: int) -> int:
    click.echo(f"gpu_checks: {message}", err=True)
    return code


if __name__ == "__main__":
    sys.exit(main())

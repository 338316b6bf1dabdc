"""`make verify-tensorrt`: for whoever has TensorRT and a GPU, one command that builds, runs, compares and times the
engines with and without the expert-mix plugin, and prints what to report. The work is the GPU check `tensorrt_plugin`.
"""

import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from moe3d_deploy import trt
from moe3d_deploy.benchmarks.bundle_reference import TO_EXPORT
from moe3d_deploy.benchmarks.checks import PASSED
from moe3d_deploy.benchmarks.checks_tensorrt import BUILDER, VARIABLE
from moe3d_deploy.benchmarks.environment import environment
from moe3d_deploy.benchmarks.gpu_checks import CHECKS, run_checks, table
from moe3d_deploy.cli.main import finish
from moe3d_deploy.cli.parameters import OutputFile
from moe3d_deploy.errors import EXTRA_OF, EngineError, Moe3dError, first_line
from moe3d_deploy.native.build import find_nvcc, run_compiler

CHECK = "tensorrt_plugin"
BEGIN, END = "----- begin of the report -----", "----- end of the report -----"


@click.command()
@click.option("--plugin", type=click.Path(path_type=Path), help="A plugin library to take; else CMake builds one.")
@click.option("--bundle", type=click.Path(path_type=Path), help="A bundle of a preset; else moe3d-tiny is exported.")
@click.option("--out", type=OutputFile(), help="Keep the JSON of the report in this file, too.")
def command(plugin: Path | None, bundle: Path | None, out: Path | None) -> int:
    """Check TensorRT's engines with and without the expert-mix plugin on this machine's first GPU.

    \b
    python -m moe3d_deploy.benchmarks.verify_tensorrt
    """
    lacking = missing(plugin_given=plugin is not None, bundle_given=bundle is not None)
    if lacking:
        for line in lacking:
            click.echo(f"verify_tensorrt: {line}", err=True)
        return 1
    if plugin:
        os.environ[VARIABLE] = str(plugin.absolute())
    facts = environment()
    for line in found(facts):
        click.echo(line)
    with tempfile.TemporaryDirectory(prefix="moe3d-verify-") as folder:
        report = run_checks(
            [check for check in CHECKS if check.name == CHECK],
            out or Path(folder) / "report.json",
            facts=facts,
            bundle=bundle,
            tell=lambda line: click.echo(line, err=True),
        )
    for line in (
        *summary(report),
        BEGIN,
        json.dumps(report, indent=1),
        END,
        "Please report what is between the lines.",
    ):
        click.echo(line)
    return int(report["checks"][CHECK]["status"] != PASSED)


def missing(*, plugin_given: bool, bundle_given: bool) -> list[str]:
    """What this machine lacks for the check, a line each with its remedy; empty where it has all. Loads nothing."""
    lines = []
    installed = trt.available()
    if BUILDER not in installed:
        lines.append("TensorRT is not installed: pip install 'moe3d-deploy[trt]', or NVIDIA's packages")
    else:
        try:
            trt.check_version(BUILDER, installed[BUILDER])
        except EngineError as error:
            lines.append(str(error))
    if not trt.visible_gpus():
        lines.append("no NVIDIA GPU is visible: run it on a machine with one, and its driver")
    if not plugin_given:
        if shutil.which("cmake") is None:
            lines.append("cmake was not found: install CMake 3.22 or newer, or give a library that is built: --plugin")
        if find_nvcc() is None:
            lines.append("nvcc was not found: install the CUDA toolkit, or give a library that is built: --plugin")
    packages = ("polygraphy", "torch", *(() if bundle_given else TO_EXPORT))
    for package in dict.fromkeys(packages):
        if importlib.util.find_spec(package) is None:
            extra = EXTRA_OF.get(package, "trt")
            lines.append(f"{package} is not installed: pip install 'moe3d-deploy[{extra}]'")
    return lines


def found(facts: dict[str, Any]) -> list[str]:
    """What there is, for people; `facts` are those of `environment`."""
    gpu = facts["gpus"][0]
    lines = [
        f"TensorRT     {trt.available()[BUILDER]}",
        f"GPU          {gpu['name']}, compute capability {gpu['compute_capability']}, driver {facts['driver']}",
    ]
    for name, program in (("nvcc", find_nvcc()), ("cmake", shutil.which("cmake"))):
        lines.append(f"{name:12} {_version(program) if program else 'not found'}")
    return lines


def summary(report: dict[str, Any]) -> list[str]:
    """The check's verdict and, as far as it got, audits and times."""
    lines = [table(report)]
    figures = report["checks"][CHECK].get("figures", {})
    for name in ("without", "with"):
        if engine := figures.get(f"engine_{name}_plugin"):
            lines.append(f"{name:7} plugin  {engine['audit']['summary']}")
    for row in figures.get("times", []):
        shape = "x".join(map(str, row["shape"]))
        before, after = (row[key]["median_ms"] for key in ("without_plugin", "with_plugin"))
        lines.append(f"{shape:15} {before:8.2f} ms without, {after:8.2f} ms with: {row['with_over_without']:.3f}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command with `arguments` (default: those of the process) and return its exit code."""
    return finish("verify_tensorrt", lambda: command, arguments)


def _version(program: str) -> str:
    """The line of `--version` that has a number with a dot; what went wrong where there is none."""
    try:
        lines = run_compiler([program, "--version"]).splitlines()
    except (Moe3dError, OSError) as error:
        return first_line(error)
    return next(
        (line.strip() for line in lines if any(part[:1].isdigit() and "." in part for part in line.split())), "?"
    )


if __name__ == "__main__":
    sys.exit(main())

"""Mutation testing: mutmut changes the code in small ways, and the tests have to notice each change.

    python -m moe3d_deploy.benchmarks.mutants --out benchmarks/results/mutation.json

Works on a private copy of the package and its tests, one module at a time. A change that survives is a missing test or
an equivalent, the same behaviour in other words. Equivalents are listed with their reasons in benchmarks/mutants.json,
and only they may survive. Needs a checkout.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click

from moe3d_deploy.benchmarks.environment import environment
from moe3d_deploy.cli.main import finish
from moe3d_deploy.cli.parameters import OutputFile
from moe3d_deploy.errors import InputError, Moe3dError
from moe3d_deploy.files import atomic_write
from moe3d_deploy.machine import usable_cores

ROOT = Path(__file__).resolve().parent.parent
EQUIVALENTS = ROOT / "benchmarks" / "mutants.json"

_OF_BUNDLES = ("test_bundle_open.py", "test_bundle_write.py", "test_bundle_engines.py")
TARGETS = {
    "geometry": ("test_geometry.py",),
    "costs": ("test_cost*.py",),
    "bundle": _OF_BUNDLES,
    "bundle_files": _OF_BUNDLES,
    "external_data": ("test_external_data.py", "test_bundle_open.py"),
    "manifest": ("test_manifest.py",),
}
"""Module of moe3d_deploy -> the tests that have to notice a change in it, as patterns. Child processes in tests run the
unchanged package, so tests that only look at those are left out.
"""

_CONFIG = """[mutmut]
source_paths=moe3d_deploy
only_mutate=moe3d_deploy/{module}.py
also_copy=docs
pytest_add_cli_args_test_selection=
    {tests}
pytest_add_cli_args=
    -p
    no:cacheprovider
    -m
    not full
    -k
    {quick}
use_git_change_detection=false
track_dependencies=false
"""
# Left out: tests that trace or export a model for seconds, which every change would wait for.
_QUICK = "not (exported_file or counter_over or merged_experts_do_as_much or counter_gives_for_its_modules)"
_KILLED = {1, 3}  # pytest's exit codes; what mutmut writes for the rest is in its `stats` module
_SURVIVED = {0, 5, 33}  # passed, or no test came along there
_STOPPED = {36, 24, -24, 152, 255, 37, -9, -11}  # too slow, crashed, or caught by types: noticed as well


@click.command()
@click.option("--out", required=True, type=OutputFile(), help="JSON file; results of other modules stay in it.")
@click.option("--only", multiple=True, help="A module, such as geometry; may be repeated.  [default: all]")
@click.option(
    "--jobs", type=click.IntRange(min=1), default=usable_cores, help="Changes to try at once.  [default: cores]"
)
def main(out: Path, only: tuple[str, ...], jobs: int) -> None:
    """Mutate the modules, and fail if a change survives that is not a known equivalent."""
    if unknown := sorted(set(only) - set(TARGETS)):
        raise InputError(f"--only {unknown[0]}: no such module; choose from {', '.join(TARGETS)}")
    modules = json.loads(out.read_text(encoding="utf-8"))["modules"] if out.exists() else {}
    for module in only or TARGETS:
        click.echo(f"{module} ...", err=True)
        modules[module] = measure(module, jobs)
        ordered = {name: modules[name] for name in TARGETS if name in modules}
        report = {"format_version": 1, "environment": environment(), "modules": ordered}
        atomic_write(out, (json.dumps(report, indent=2, sort_keys=True) + "\n").encode("utf-8"))
    if survived := {name: len(result["survived"]) for name, result in modules.items() if result["survived"]}:
        listed = ", ".join(f"{name} {count}" for name, count in survived.items())
        raise Moe3dError(
            f"changes that no test notices: {listed}; see {out}, add tests or reasons to {EQUIVALENTS.name}"
        )


def measure(module: str, jobs: int) -> dict[str, Any]:
    """Mutate one module in a copy of the package: counts, the changes that survive and the equivalent ones."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="moe3d-mutants-") as folder:
        copy = Path(folder)
        _copy_tree(copy)
        tests = sorted({path.name for pattern in TARGETS[module] for path in (copy / "tests").glob(pattern)})
        if not tests:
            raise InputError(f"{module}: no tests match {', '.join(TARGETS[module])}")
        selected = "\n    ".join(f"tests/{name}" for name in tests)
        (copy / "setup.cfg").write_text(_CONFIG.format(module=module, tests=selected, quick=_QUICK), encoding="utf-8")
        done = _mutmut(copy, "run", "--max-children", str(jobs))
        meta = copy / "mutants" / "moe3d_deploy" / f"{module}.py.meta"
        codes = json.loads(meta.read_text(encoding="utf-8"))["exit_code_by_key"] if meta.is_file() else {}
        if not codes or None in codes.values():
            last = (done.stdout + done.stderr).strip().splitlines()[-1:]
            raise Moe3dError(f"{module}: mutmut did not get to the end: {last[0] if last else 'no message'}")
        if unknown := {code for code in codes.values() if code not in _KILLED | _SURVIVED | _STOPPED}:
            raise Moe3dError(f"{module}: mutmut left changes untried (codes {sorted(map(str, unknown))}); run it again")
        survivors = [_change(copy, name) for name, code in codes.items() if code in _SURVIVED]
    known = json.loads(EQUIVALENTS.read_text(encoding="utf-8")).get(module, [])
    reasons = {(e["function"], e["before"], after): e["reason"] for e in known for after in e["after"]}
    keyed = [(change, reasons.get((change["function"], change["before"], change["after"]))) for change in survivors]
    kinds = Counter("killed" if code in _KILLED else "stopped" for code in codes.values() if code not in _SURVIVED)
    return {
        "changes": len(codes),
        "killed": kinds["killed"],
        "stopped": kinds["stopped"],
        "survived": [change for change, reason in keyed if reason is None],
        "equivalent": [{**change, "reason": reason} for change, reason in keyed if reason is not None],
        "seconds": round(time.perf_counter() - started, 1),
        "tests": tests,
    }


def table(report: dict[str, Any]) -> str:
    """Counts per module as Markdown."""
    rows = []
    for module, result in report["modules"].items():
        counts = (result["changes"], result["killed"], result["stopped"], len(result["equivalent"]))
        figures = " | ".join(f"{count:,}" for count in (*counts, len(result["survived"])))
        rows.append(f"| `{module}.py` | {figures} | {result['seconds'] / 60:.0f} min |")
    header = "| module | changes | noticed | stopped | equivalent | survived | time |"
    return "\n".join([header, "|---|---:|---:|---:|---:|---:|---:|", *rows])


def equivalents_table(report: dict[str, Any]) -> str:
    """How many changes of which function are equivalent, and why, as Markdown."""
    counts = Counter(
        (module, change["function"], change["reason"])
        for module, result in report["modules"].items()
        for change in result["equivalent"]
    )
    rows = [f"| `{module}.{function}` | {count} | {why} |" for (module, function, why), count in sorted(counts.items())]
    return "\n".join(["| function | changes | why nothing differs |", "|---|---:|---|", *rows])


def _copy_tree(copy: Path) -> None:
    """The package with its linked stages as plain folders, the tests and the pages; mutmut follows no links."""
    for name in ("moe3d_deploy", "tests", "docs"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))


def _change(copy: Path, name: str) -> dict[str, str]:
    """A change by its function and the lines before and after, which stay when the lines around them move."""
    lines = [line for line in _mutmut(copy, "show", name).stdout.splitlines() if line[:3] not in ("---", "+++")]
    before, after = (" ".join(line[1:].strip() for line in lines if line.startswith(sign)) for sign in "-+")
    function = name.rpartition("__mutmut_")[0].rpartition(".")[2].replace("xǁ", "").replace("ǁ", ".").removeprefix("x_")
    return {"function": function, "before": before, "after": after}


def _mutmut(copy: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    sys.exit(finish("mutants", lambda: main))

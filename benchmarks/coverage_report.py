"""How much of the package the tests run: statements and branches, in the tests' own process and in those they start.

    python -m moe3d_deploy.benchmarks.coverage_report --out benchmarks/results/coverage.json [pytest's arguments]

Without arguments, all tests but the full-size ones and those that take disk or memory away. Needs a checkout. Processes
that are killed leave no record, so what only they run counts as missing. A link counts as what it leads to: each stage
once, by its top-level folder.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from moe3d_deploy.benchmarks.environment import environment
from moe3d_deploy.cli.main import finish
from moe3d_deploy.cli.parameters import OutputFile
from moe3d_deploy.errors import Moe3dError
from moe3d_deploy.files import atomic_write

ROOT = Path(__file__).resolve().parent.parent
MEASURED = ("moe3d_deploy", "export", "engines")
LOWEST = 10  # modules that are named one by one

# What takes disk or memory away takes it from coverage too, which such a test sees as a fault.
_NO_STARVING = "not (full_disk or may_not_fit or without_memory)"

# `subprocess` starts the measurement in every Python that a test starts, `_exit` saves it where one leaves early.
_CONFIG = """[run]
branch = true
data_file = {folder}/data
relative_files = true
source =
    {sources}
patch =
    subprocess
    _exit
disable_warnings =
    no-data-collected
    module-not-measured
"""


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--out", required=True, type=OutputFile(), help="JSON file to write.")
@click.argument("pytest_arguments", nargs=-1, type=click.UNPROCESSED)
def main(out: Path, pytest_arguments: tuple[str, ...]) -> None:
    """Run the tests under coverage and write what they run of each package. Nothing is written if a test fails."""
    files, tests = measure(pytest_arguments or ("-m", "not full", "-k", _NO_STARVING))
    report = {"format_version": 1, "environment": environment(), "tests": tests, **summary(files)}
    atomic_write(out, (json.dumps(report, indent=2, sort_keys=True) + "\n").encode("utf-8"))


def measure(pytest_arguments: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Run pytest: coverage's JSON report by file, relative to the checkout, and pytest's last line without its time.

    Raises Moe3dError when a test fails.
    """
    with tempfile.TemporaryDirectory(prefix="moe3d-coverage-") as name:
        folder = Path(name)
        sources = "\n    ".join(str(ROOT / package) for package in MEASURED)
        (folder / "config").write_text(_CONFIG.format(folder=folder, sources=sources), encoding="utf-8")
        done = _coverage(folder, "run", "-m", "pytest", "-q", *pytest_arguments)
        if done.returncode:
            raise Moe3dError(f"the tests ended with code {done.returncode}, see above; mend them, then measure again")
        _coverage(folder, "combine", "--quiet")
        _coverage(folder, "json", "--quiet", "-o", str(folder / "report"))
        files: dict[str, Any] = json.loads((folder / "report").read_text(encoding="utf-8"))["files"]
    return files, _last_line(done.stdout)


def summary(files: dict[str, Any]) -> dict[str, Any]:
    """Of coverage's JSON report by file: `total`, `packages` and the `lowest` modules, each with its counts."""
    counts = {path: _counts([file["summary"]]) for path, file in files.items()}
    packages: dict[str, list[Any]] = {}
    for path, file in files.items():
        packages.setdefault(package_of(path), []).append(file["summary"])
    by_share = sorted(counts.items(), key=lambda item: (item[1]["percent"], item[0]))
    return {
        "total": _counts(file["summary"] for file in files.values()),
        "packages": {name: _counts(summaries) for name, summaries in sorted(packages.items())},
        "lowest": [{"module": path, **values} for path, values in by_share if values["percent"] < 100][:LOWEST],
    }


def table(report: dict[str, Any]) -> str:
    """The figures as Markdown: packages and total, then the modules with the smallest share."""
    rows = [*report["packages"].items(), ("**all**", report["total"])]
    lowest = [(row["module"], row) for row in report["lowest"]]
    return "\n".join(
        [
            "| package | statements | not run | branches | not taken | covered |",
            "|---|---:|---:|---:|---:|---:|",
            *(_row(name, counts) for name, counts in rows),
            "",
            "| modules with the smallest share | statements | not run | branches | not taken | covered |",
            "|---|---:|---:|---:|---:|---:|",
            *(_row(name, counts) for name, counts in lowest),
            "",
            f"Tests: {report['tests']}.",
        ]
    )


def _row(name: str, counts: dict[str, Any]) -> str:
    figures = (counts[key] for key in ("statements", "missing_statements", "branches", "missing_branches"))
    return f"| {name} | {' | '.join(f'{figure:,}' for figure in figures)} | {counts['percent']:.1f} % |"


def package_of(path: str) -> str:
    """moe3d_deploy/cli/run.py -> moe3d_deploy/cli; the folder of a module."""
    return path.rpartition("/")[0]


def _counts(summaries: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Statements and branches, how many of each were missed, and the share that was run, in percent."""
    total = {"statements": 0, "missing_statements": 0, "branches": 0, "missing_branches": 0}
    for one in summaries:
        total["statements"] += one["num_statements"]
        total["missing_statements"] += one["missing_lines"]
        total["branches"] += one["num_branches"]
        total["missing_branches"] += one["missing_branches"]
    every = total["statements"] + total["branches"]
    missed = total["missing_statements"] + total["missing_branches"]
    return {**total, "percent": round(100 * (every - missed) / every, 1) if every else 100.0}


def _coverage(folder: Path, command: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run coverage, passing on what it prints; Moe3dError where it fails, but for `run`.

    A measurement around this one, as when its own tests are measured, does not reach into it.
    """
    env = {key: value for key, value in os.environ.items() if key != "COVERAGE_PROCESS_CONFIG"}
    line = [sys.executable, "-m", "coverage", command, f"--rcfile={folder / 'config'}", *arguments]
    with subprocess.Popen(line, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True) as child:
        printed = []
        for text in child.stdout or ():
            click.echo(text, nl=False)
            printed.append(text)
    done = subprocess.CompletedProcess(line, child.returncode, "".join(printed))
    if done.returncode and command != "run":
        raise Moe3dError(f"coverage {command} ended with code {done.returncode}: {done.stdout.strip()}")
    return done


def _last_line(text: str) -> str:
    """Pytest's summary: "12 passed, 1 skipped", without its time."""
    return re.sub(r" in [\d.]+s.*", "", text.strip().splitlines()[-1]).strip("= ")


if __name__ == "__main__":
    sys.exit(finish("coverage_report", lambda: main))

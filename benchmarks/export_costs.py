"""What an export costs: seconds, peak memory, sizes and errors, measured by running `moe3d-export` as users do.

    python -m moe3d_deploy.benchmarks.export_costs --out benchmarks/results/export_cpu.json

Every case is one command in a temporary folder; its `--json` report is the result.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from moe3d_deploy.benchmarks.environment import environment, without_paths
from moe3d_deploy.cli.main import finish
from moe3d_deploy.cli.parameters import OutputFile
from moe3d_deploy.errors import InputError, Moe3dError
from moe3d_deploy.files import atomic_write

CASES = tuple(f"{model}:{precision}" for model in ("moe3d-tiny", "moe3d-1b") for precision in ("fp32", "fp16"))


@click.command()
@click.option("--out", required=True, type=OutputFile(), help="JSON file; rows of other cases stay in it.")
@click.option("--only", multiple=True, help="A case, such as moe3d-tiny:fp16; may be repeated.  [default: all]")
@click.option("--workdir", type=click.Path(path_type=Path), help="Where the bundles go for a while (10 GB).")
def main(out: Path, only: tuple[str, ...], workdir: Path | None) -> None:
    """Export moe3d-tiny and moe3d-1b in fp32 and fp16, with verification and an engine each."""
    if unknown := sorted(set(only) - set(CASES)):
        raise InputError(f"--only {unknown[0]}: no such case; choose from {', '.join(CASES)}")
    known = json.loads(out.read_text(encoding="utf-8"))["rows"] if out.exists() else []
    rows = {f"{row['model']}:{row['precision']}": row for row in known}
    failed = []
    for case in only or CASES:
        click.echo(f"{case} ...", err=True)
        model, precision = case.split(":")
        facts = environment()
        rows[case] = {**_measure(model, precision, workdir), "revision": facts["git"]["revision"]}
        if "failed" in rows[case]:
            failed.append(f"{case}: {rows[case]['failed']}")
        ordered = [rows[name] for name in CASES if name in rows]
        report = {"format_version": 1, "environment": facts, "rows": ordered}
        atomic_write(out, (json.dumps(report, indent=2, sort_keys=True) + "\n").encode("utf-8"))
    if failed:
        raise Moe3dError("; ".join(failed))


def _measure(model: str, precision: str, workdir: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="moe3d-costs-", dir=workdir) as folder:
        options = ["--precision", precision, "--views", "1:2:8", "--no-cache"]
        arguments = ["export", model, "-o", "bundle", *options, "--json"]
        run = subprocess.run(
            [sys.executable, "-m", "moe3d_deploy", *arguments], cwd=folder, capture_output=True, text=True, check=False
        )
    row = {"model": model, "precision": precision, "command": "moe3d-" + " ".join(arguments).removesuffix(" --json")}
    if run.returncode:
        last = run.stderr.strip().splitlines()[-1:] or [f"exit code {run.returncode}"]
        return {**row, "failed": without_paths(last[0])}
    report = json.loads(run.stdout)
    return {
        **row,
        "stages": report["stages"],
        "engine": report["engine"],
        "files": report["files"],
        "errors": worst_errors(report["verification"]["cases"]),
        "transcript": [line.rstrip() for line in run.stderr.splitlines()],
        "shapes": len(report["verification"]["cases"]),
    }


def worst_errors(cases: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """The largest error over all shapes, by runtime ("executed", "rounded"), output and kind."""
    worst: dict[str, dict[str, dict[str, float]]] = {}
    for case in cases:
        for runtime, outputs in case["errors"].items():
            for output, kinds in outputs.items():
                largest = worst.setdefault(runtime, {}).setdefault(output, {})
                for kind, value in kinds.items():
                    largest[kind] = max(value, largest.get(kind, 0.0))
    return worst


if __name__ == "__main__":
    sys.exit(finish("export_costs", lambda: main))

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
from moe3d_deploy.files import atomic_write

CASES = tuple((model, precision) for model in ("moe3d-tiny", "moe3d-1b") for precision in ("fp32", "fp16"))


@click.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON file to write.")
@click.option("--only", help="One case, such as moe3d-tiny:fp16.")
@click.option("--workdir", type=click.Path(path_type=Path), help="Where the bundles go for a while (10 GB).")
def main(out: Path, only: str | None, workdir: Path | None) -> None:
    """Export moe3d-tiny and moe3d-1b in fp32 and fp16, with verification and an engine each."""
    rows: list[dict[str, Any]] = []
    for model, precision in CASES:
        if only and only != f"{model}:{precision}":
            continue
        click.echo(f"{model} {precision} ...", err=True)
        rows.append({"model": model, "precision": precision, **_measure(model, precision, workdir)})
        report = {"format_version": 1, "environment": environment(), "rows": rows}
        atomic_write(out, (json.dumps(report, indent=2, sort_keys=True) + "\n").encode("utf-8"))
    if not rows:
        raise click.BadParameter(
            f"no such case; choose from {', '.join(':'.join(case) for case in CASES)}", param_hint="--only"
        )


def _measure(model: str, precision: str, workdir: Path | None) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="moe3d-costs-", dir=workdir) as folder:
        arguments = ["export", model, "--precision", precision, "-o", "bundle", "--views", "1:2:8", "--json"]
        run = subprocess.run(
            [sys.executable, "-m", "moe3d_deploy", *arguments], cwd=folder, capture_output=True, text=True, check=False
        )
    command = "moe3d " + " ".join(arguments)
    if run.returncode:
        return {"command": command, "failed": without_paths(run.stderr.strip().splitlines()[-1])}
    report = json.loads(run.stdout)
    return {
        "command": command,
        "stages": report["stages"],
        "engine": report["engine"],
        "files": report["files"],
        "errors": worst_errors(report["verification"]["cases"]),
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
    main()

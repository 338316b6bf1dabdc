"""The figures in README and docs, generated from `benchmarks/results/*.json` between markers.

    python -m moe3d_deploy.benchmarks.tables           rewrite them
    python -m moe3d_deploy.benchmarks.tables --check   fail if one differs from its results

A marker pair reads `<!-- table: export_costs results/export_cpu.json -->` and `<!-- end table -->`; the file is named
from here. Needs a checkout.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from moe3d_deploy.benchmarks import (
    activation_memory,
    coverage_report,
    eight_bit,
    gate_tiles,
    learning_curve,
    mutants,
    quality,
    training_phases,
)
from moe3d_deploy.benchmarks.bench import documents as documents_of_bench
from moe3d_deploy.benchmarks.environment import revision_text
from moe3d_deploy.benchmarks.heads import tables as heads
from moe3d_deploy.benchmarks.survival_table import survival_fuzz, survival_kills, survival_matrix
from moe3d_deploy.cli.main import finish
from moe3d_deploy.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"(<!-- table: (\w+) ([\w./-]+\.json) -->\n).*?(<!-- end table -->)", re.DOTALL)
_PACKAGES_SHOWN = ("torch", "onnx", "onnxruntime", "tensorrt_rtx")


def documents(root: Path = ROOT) -> list[Path]:
    """The Markdown files that may hold tables."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def render(text: str, root: Path = ROOT) -> str:
    """`text` with every block between markers made anew from its results. Raises InputError."""

    def replace(match: re.Match[str]) -> str:
        start, kind, results, end = match.groups()
        if kind not in _TABLES:
            raise InputError(f"table {kind!r} is unknown; choose from {', '.join(_TABLES)}")
        source = root / "benchmarks" / results
        if not source.is_file():
            raise InputError(f"{source} does not exist; measure it first")
        report = json.loads(source.read_text(encoding="utf-8"))
        return f"{start}{_TABLES[kind](report)}\n{end}"

    return _BLOCK.sub(replace, text)


def export_costs(report: dict[str, Any]) -> str:
    """Sizes, times, peaks and errors of exports."""
    header = (
        "| model | precision | export | verify | engine | peak (export / verify / engine) | ONNX | engine size "
        "| depth error max / mean | revision |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---|",
    )
    return "\n".join([*header, *map(_export_row, report["rows"]), "", _machine(report)])


def _export_row(row: dict[str, Any]) -> str:
    label = f"| {row['model']} | {row['precision']} "
    if "failed" in row:
        return f"{label}| failed: {row['failed']} | | | | | | | {row['revision'][:12]} |"
    stages, engine = row["stages"], row["engine"]
    checks = [cost for name, cost in stages.items() if name != "export"]
    peaks = (stages["export"]["peak_bytes"], max(c["peak_bytes"] for c in checks), engine["peak_bytes"])
    onnx = sum(size for name, size in row["files"].items() if name.startswith("model.onnx"))
    depth = [outputs["depth"] for outputs in row["errors"].values()]
    return (
        f"{label}| {stages['export']['seconds']:.0f} s | {sum(c['seconds'] for c in checks):.0f} s "
        f"| {engine['seconds']:.0f} s | {' / '.join(f'{p / 1e9:.1f}' for p in peaks)} GB | {onnx / 1e6:.0f} MB "
        f"| {engine['plan_bytes'] / 1e6:.0f} MB "
        f"| {max(d['max'] for d in depth):.1e} / {max(d['mean'] for d in depth):.1e} | {row['revision'][:12]} |"
    )


def export_transcript(report: dict[str, Any]) -> str:
    """What `moe3d-export` wrote for moe3d-tiny in fp16."""
    row = next(row for row in report["rows"] if (row["model"], row["precision"]) == ("moe3d-tiny", "fp16"))
    return "\n".join(["```console", f"$ {row['command']}", *row["transcript"], "```"])


def _machine(report: dict[str, Any]) -> str:
    facts = report["environment"]
    packages = ", ".join(f"{name} {facts['packages'][name]}" for name in _PACKAGES_SHOWN)
    gpus = "; ".join(gpu["name"] for gpu in facts["gpus"]) or "no GPU"
    return (
        f"Measured on {facts['cpu']['usable_cores']} cores of {facts['cpu']['name']}, "
        f"{facts['memory_bytes'] / 2**30:.0f} GiB, {gpus}; {packages}; "
        f"revision {revision_text(facts['git'])}; `{facts['command']}`."
    )


_TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "export_costs": export_costs,
    "export_transcript": export_transcript,
    "survival_matrix": survival_matrix,
    "survival_kills": survival_kills,
    "survival_fuzz": survival_fuzz,
    "activation_memory": lambda report: f"{activation_memory.table(report)}\n\n{_machine(report)}",
    "bench_peers": lambda report: f"{documents_of_bench.peers(report)}\n\n{_machine(report)}",
    "bench_growth": lambda report: f"{documents_of_bench.growth(report)}\n\n{_machine(report)}",
    "bench_price": lambda report: f"{documents_of_bench.price(report)}\n\n{_machine(report)}",
    "bench_parity": lambda report: f"{documents_of_bench.parity(report)}\n\n{_machine(report)}",
    "gate_tiles": lambda report: f"{gate_tiles.table(report)}\n\n{_machine(report)}",
    "eight_bit": lambda report: f"{eight_bit.table(report)}\n\n{_machine(report)}",
    "coverage": lambda report: f"{coverage_report.table(report)}\n\n{_machine(report)}",
    "model_quality": lambda report: f"{quality.quality_table(report)}\n\n{_machine(report)}",
    "model_deployment": lambda report: f"{quality.deployment_table(report)}\n\n{_machine(report)}",
    "heads_variants": heads.heads_table,
    "heads_rates": heads.rates_table,
    "heads_training": heads.training_table,
    "heads_quality": lambda report: f"{heads.quality_table(report)}\n\n{_machine(report)}",
    "heads_differences": heads.difference_table,
    "heads_finding": heads.finding_text,
    "learning_stages": lambda report: f"{learning_curve.stages_table(report)}\n\n{_machine(report)}",
    "learning_trend": learning_curve.trend_text,
    "model_training": training_phases.phases_table,
    "mutation": lambda report: f"{mutants.table(report)}\n\n{_machine(report)}",
    "equivalents": mutants.equivalents_table,
}


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; exit 1 if a table is out of date.")
def main(check: bool) -> None:
    """Rewrite the generated tables, or check them."""
    stale = False
    for path in documents():
        text = path.read_text(encoding="utf-8")
        fresh = render(text)
        if fresh != text:
            stale = True
            click.echo(f"{path.relative_to(ROOT)}: {'out of date' if check else 'rewritten'}")
            if not check:
                path.write_text(fresh, encoding="utf-8")
    click.get_current_context().exit(1 if check and stale else 0)


if __name__ == "__main__":
    sys.exit(finish("tables", lambda: main))

"""The tables in README and docs, generated from `benchmarks/results/*.json` between markers.

    python -m moe3d_deploy.benchmarks.tables           rewrite them
    python -m moe3d_deploy.benchmarks.tables --check   fail if one differs from its results

A marker pair reads `<!-- table: export_costs results/export_cpu.json -->` and `<!-- end table -->`. Needs a checkout.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from moe3d_deploy.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
_BLOCK = re.compile(r"(<!-- table: (\w+) (results/[\w.-]+\.json) -->\n).*?(<!-- end table -->)", re.DOTALL)


def render(text: str, root: Path = ROOT) -> str:
    """`text` with every table block replaced by the table of its results."""

    def replace(match: re.Match[str]) -> str:
        start, kind, results, end = match.groups()
        if kind not in _TABLES:
            raise InputError(f"table {kind!r} is unknown; choose from {', '.join(_TABLES)}")
        report = json.loads((root / "benchmarks" / results).read_text(encoding="utf-8"))
        return f"{start}{_TABLES[kind](report)}\n{_machine(report)}\n{end}"

    return _BLOCK.sub(replace, text)


def documents(root: Path = ROOT) -> list[Path]:
    """The Markdown files that may hold tables."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def export_costs(report: dict[str, Any]) -> str:
    """Sizes, times, peaks and errors of exports."""
    header = (
        "| model | precision | export | verify | engine | peak (export / verify / engine) | ONNX | engine size "
        "| depth error max / mean |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    )
    return "\n".join([*header, *map(_export_row, report["rows"])])


def _export_row(row: dict[str, Any]) -> str:
    label = f"| {row['model']} | {row['precision']} "
    if "failed" in row:
        return f"{label}| failed: {row['failed']} | | | | | | |"
    stages, engine = row["stages"], row["engine"]
    checks = [cost for name, cost in stages.items() if name != "export"]
    peaks = (stages["export"]["peak_bytes"], max(c["peak_bytes"] for c in checks), engine["peak_bytes"])
    onnx = sum(size for name, size in row["files"].items() if name.startswith("model.onnx"))
    depth = [outputs["depth"] for outputs in row["errors"].values()]
    return (
        f"{label}| {stages['export']['seconds']:.0f} s | {sum(c['seconds'] for c in checks):.0f} s "
        f"| {engine['seconds']:.0f} s | {' / '.join(f'{p / 1e9:.1f}' for p in peaks)} GB | {onnx / 1e6:.0f} MB "
        f"| {engine['plan_bytes'] / 1e6:.0f} MB "
        f"| {max(d['max'] for d in depth):.1e} / {max(d['mean'] for d in depth):.1e} |"
    )


_PACKAGES_SHOWN = ("torch", "onnx", "onnxruntime", "tensorrt_rtx")


def _machine(report: dict[str, Any]) -> str:
    facts = report["environment"]
    packages = ", ".join(f"{name} {facts['packages'][name]}" for name in _PACKAGES_SHOWN)
    cpu, memory = facts["cpu"], facts["memory_bytes"] / 2**30
    gpu = "; ".join(gpu["name"] for gpu in facts["gpus"]) or "no GPU"
    return (
        f"\nMeasured on {cpu['usable_cores']} cores of {cpu['name']}, {memory:.0f} GiB, {gpu}; {packages}; "
        f"revision {facts['git']['revision'][:12]}; `{facts['command']}`."
    )


_TABLES:
            raise InputError(f"table {kind!r} is unknown; choose from {', '.join(_TABLES)}")
        report = json.loads((root / "benchmarks" / results).read_text(encoding="utf-8"))
        return f"{start}{_TABLES[kind](report)}\n{_machine(report)}\n{end}"

    return _BLOCK.sub(replace, text)


def documents(root: Path = ROOT) -> list[Path]:
    """The Markdown files that may hold tables."""
    return [root / "README.md", *sorted((root / "docs").glob("*.md"))]


def export_costs(report: dict[str, Any]) -> str:
    """Sizes, times, peaks and errors of exports."""
    header = (
        "| model | precision | export | verify | engine | peak (export / verify / engine) | ONNX | engine size "
        "| depth error max / mean |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    )
    return "\n".join([*header, *map(_export_row, report["rows"])])


def _export_row(row: dict[str, Any]) -> str:
    label = f"| {row['model']} | {row['precision']} "
    if "failed" in row:
        return f"{label}| failed: {row['failed']} | | | | | | |"
    stages, engine = row["stages"], row["engine"]
    checks = [cost for name, cost in stages.items() if name != "export"]
    peaks = (stages["export"]["peak_bytes"], max(c["peak_bytes"] for c in checks), engine["peak_bytes"])
    onnx = sum(size for name, size in row["files"].items() if name.startswith("model.onnx"))
    depth = [outputs["depth"] for outputs in row["errors"].values()]
    return (
        f"{label}| {stages['export']['seconds']:.0f} s | {sum(c['seconds'] for c in checks):.0f} s "
        f"| {engine['seconds']:.0f} s | {' / '.join(f'{p / 1e9:.1f}' for p in peaks)} GB | {onnx / 1e6:.0f} MB "
        f"| {engine['plan_bytes'] / 1e6:.0f} MB "
        f"| {max(d['max'] for d in depth):.1e} / {max(d['mean'] for d in depth):.1e} |"
    )


def _machine(report: dict[str, Any]) -> str:
    facts = report["environment"]
    packages = ", ".join(f"{name} {version}" for name, version in sorted(facts["packages"].items()))
    return f"\nMeasured on {facts['cpu']}, {facts['cores']} cores, without a GPU; {packages}; {facts['date']}."


_TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"export_costs": export_costs}


@click.command()
@click.option("--check", is_flag=True, help="Change nothing; exit 1 if a table is out of date.")
def main(check: bool) -> None:
    """Rewrite the generated tables, or check them."""
    stale = []
    for path in documents():
        text = path.read_text(encoding="utf-8")
        fresh = render(text)
        if fresh != text:
            stale.append(path.relative_to(ROOT).as_posix())
            if not check:
                path.write_text(fresh, encoding="utf-8")
    for name in stale:
        click.echo(f"{name}: {'out of date; run python -m moe3d_deploy.benchmarks.tables' if check else 'rewritten'}")
    raise SystemExit(1 if check and stale else 0)


if __name__ == "__main__":
    main()

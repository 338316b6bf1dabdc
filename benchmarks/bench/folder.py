"""A report as a folder: report.json, and all that is derived from it alone: report.md, report.html, plots."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moe3d_deploy.benchmarks.bench import case_tables, parity_tables, peer_tables, price_tables, scaling_tables
from moe3d_deploy.benchmarks.bench.page import page
from moe3d_deploy.benchmarks.bench.report import REPORT_NAME, Report
from moe3d_deploy.benchmarks.bench.text import ABSENT, Table
from moe3d_deploy.errors import require
from moe3d_deploy.files import atomic_write

_TITLE = "moe3d bench"
# A plot outside the page has no ink of its own: dark on light, or light on dark where the reader's system is dark.
_ALONE = (
    "<style>svg{color:#1f2328;background:#fff}"
    "@media(prefers-color-scheme:dark){svg{color:#e6edf3;background:#0d1117}}</style>"
)


def require_plots() -> None:
    """Raise MissingExtraError where plots cannot be drawn: to be asked before measuring for minutes."""
    require("matplotlib")


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write every file into `folder`, created if absent, report.json first; those that are there are replaced.

    The same report gives the same bytes, with one version of matplotlib. Raises OSError, MissingExtraError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, content in files(report).items():
        paths.append(folder / name)
        atomic_write(paths[-1], content)
    return paths


def write_data(report: Report, folder: Path) -> None:
    """report.json alone, as often as there is something new."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / REPORT_NAME, report.to_json())


def files(report: Report) -> dict[str, bytes]:
    """Content by name."""
    require_plots()
    from moe3d_deploy.benchmarks.bench import scaling_plot
    from moe3d_deploy.benchmarks.bench.plots import plots

    svgs = plots(report.cases) | scaling_plot.plots(report.cases)
    if report.sections.price:
        from moe3d_deploy.benchmarks.bench import price_plot

        svgs |= price_plot.plots(report.sections.price)
    if report.sections.parity:
        from moe3d_deploy.benchmarks.bench import parity_plot

        svgs |= parity_plot.plots(report.sections.parity)
    tables, data = all_tables(report), report.to_json()
    alone = {name: svg.replace(">", f">{_ALONE}", 1) for name, svg in svgs.items()}
    text = {
        "report.md": markdown(report, tables, svgs),
        "report.html": page(_TITLE, facts(report), warnings(report), tables, svgs, data.decode()),
        **alone,
    }
    return {REPORT_NAME: data, **{name: content.encode() for name, content in text.items()}}


def all_tables(report: Report) -> list[Table]:
    """Of every section, in their order."""
    found = case_tables.tables(report.cases)
    if section := report.sections.cases:
        found += peer_tables.tables(section.cases, section.models) + scaling_tables.tables(
            section.cases, section.models
        )
    if report.sections.price:
        found += price_tables.tables(report.sections.price)
    if report.sections.parity:
        found += parity_tables.tables(report.sections.parity)
    return found


def markdown(report: Report, tables: list[Table], plots: Mapping[str, Any]) -> str:
    parts = [f"# {_TITLE}", *(f"**{warning}**" for warning in warnings(report))]
    parts.append("\n".join(f"- {name}: {value}" for name, value in facts(report).items()))
    parts += [f"![{name.partition('.')[0]}]({name})" for name in plots]
    return "\n\n".join([*parts, *(table.markdown() for table in tables)]) + "\n"


def warnings(report: Report) -> list[str]:
    found = [] if report.complete else ["Interrupted: only the cases that were finished are here."]
    if report.environment["git"].get("dirty"):
        found.append("The code differs from the revision that is named.")
    return found


def facts(report: Report) -> dict[str, str]:
    """What the report was made on and with."""
    about = report.environment
    gpus = ", ".join(str(gpu.get("name")) for gpu in about["gpus"]) or "none"
    packages = ", ".join(f"{name} {version}" for name, version in sorted(about["packages"].items()))
    cpu = about["cpu"]
    revision = str(about["git"].get("revision") or ABSENT)
    return {
        "started": report.started,
        "processor": f"{cpu.get('name')}, {cpu.get('usable_cores')} cores usable",
        "memory": f"{about['memory_bytes'] / 2**30:.0f} GiB",
        "GPU": gpus,
        "moe3d-deploy": f"{about.get('moe3d_deploy')}, revision {revision[:12]}",
        "Python": str(about.get("python")),
        "packages": packages,
        "command": about["command"],
    }

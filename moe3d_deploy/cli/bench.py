"""`moe3d bench`: latency, memory and ceilings of models on this machine; reports, and comparisons of them."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moe3d_deploy.cli.arguments import given_flags
from moe3d_deploy.cli.bench_parts import Part, measure_parts
from moe3d_deploy.errors import InputError
from moe3d_deploy.export.precision import PRECISIONS, PrecisionPolicy

if TYPE_CHECKING:
    from moe3d_deploy.benchmarks.bench.report import Report

_OF_MEASURING = (
    "shapes", "views", "backends", "threads", "runs", "budget", "processes", "seed", "view_chunk", "plugin",
    "allow_pickle", "cases", "peers", "only_peers", "scaling", "parity", "price", "experts", "everything",
)  # fmt: skip
_PEERS = (
    "pytorch", "pytorch-compiled", "onnxruntime-widespread", "onnxruntime-cuda", "tensorrt-rtx", "tensorrt",
)  # fmt: skip
_INSTEAD_OF_CASES: tuple[str, ...] = ("price", "parity")  # flags of parts which, named alone, are all that is measured


@click.command("bench", short_help="Measure latency and memory of bundles, checkpoints and presets on this machine")
@click.argument("sources", metavar="[SOURCE...]", nargs=-1)
@click.option("--shapes", multiple=True, metavar="BxSxHxW,...", help="Images of a run; may be repeated.")
@click.option(
    "--views", metavar="S,...",
    help="Instead: one scene of so many views, at the first source's usual size.  [default: 1,2,4]",
)  # fmt: skip
@click.option(
    "--backend", "backends", multiple=True, type=click.Choice(["pytorch", "onnxruntime"]),
    help="Refuse sources that run in another one; may be repeated.  [default: each source's own]",
)  # fmt: skip
@click.option("--threads", type=click.IntRange(min=1), help="Of the backends on the CPU.  [default: their own]")
@click.option("--runs", type=click.IntRange(min=1), default=12, show_default=True, help="Of a case, at the least.")
@click.option(
    "--budget", type=click.FloatRange(min=0), default=15.0, show_default=True,
    help="Seconds that the runs of a case may take, once there are --runs; its warm-ups take up to half as long.",
)  # fmt: skip
@click.option(
    "--processes", type=click.IntRange(min=1), default=3, show_default=True,
    help="Among which a case's runs are shared; every one loads the model. --compare needs two or more.",
)  # fmt: skip
@click.option("--cases", is_flag=True, help="Latency, memory and ceilings: what is measured unless a part is named.")
@click.option(
    "--peers", is_flag=True,
    help="Beside each SOURCE what else runs it: 16 bits, torch.compile, the widespread export, engines.",
)  # fmt: skip
@click.option(
    "--peer",
    "only_peers",
    multiple=True,
    type=click.Choice(_PEERS),
    help="As --peers, of this backend; may be repeated.",
)
@click.option("--scaling", is_flag=True, help="How time and memory grow: a sweep over views and one over sizes.")
@click.option("--price", is_flag=True, help="What the experts add to VGGT's single head, in time and in memory.")
@click.option(
    "--experts", metavar="K,...",
    help="With --price: how many experts the head has; the checkpoint's own number is among them.  [default: 2,4,8]",
)  # fmt: skip
@click.option("--parity", is_flag=True, help="How far a checkpoint's backends and precisions are from it in PyTorch.")
@click.option("--all", "everything", is_flag=True, help="--cases --peers --scaling --price --parity.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FOLDER", help="Write report.json, .md, .html, plots.")
@click.option("--json", "as_json", is_flag=True, help="Print the report, or the comparison, as one JSON object.")
@click.option(
    "--report", "given", type=click.Path(path_type=Path), metavar="FILE",
    help="Measure nothing: write all files of this report.json to --out again.",
)  # fmt: skip
@click.option(
    "--compare", nargs=2, type=click.Path(path_type=Path), metavar="A B",
    help="Measure nothing: what changed from report A to report B beyond noise.",
)  # fmt: skip
@click.option(
    "--bisect", "bisected", type=click.Choice([name for name in PRECISIONS if PrecisionPolicy(name).sixteen_bit]),
    help="Time nothing: where the checkpoint in this precision leaves float32, and what has to stay float32.",
)  # fmt: skip
@click.option(
    "--tolerance", type=click.FloatRange(min=0, min_open=True),
    help="With --bisect: how far a block's output may be off, as a share of its largest value.  [default: 0.01]",
)  # fmt: skip
@click.option("--anyway", is_flag=True, help="With --compare: also of other machines or versions.")
@click.option("--seed", type=click.IntRange(min=0), help="PyTorch presets only: seeded random weights.")
@click.option(
    "--view-chunk", type=click.IntRange(min=1),
    help="PyTorch, and bundles of --split: views that the dense heads, or the encoder, take at a time.",
)  # fmt: skip
@click.option("--plugin", metavar="PATH|none", help="PyTorch on a GPU: the expert-mix kernel's library, or none.")
@click.option("--allow-pickle", is_flag=True, help="PyTorch only: read a .pt checkpoint (weights only).")
def bench_command(
    sources: tuple[str, ...],
    shapes: tuple[str, ...],
    views: str | None,
    backends: tuple[str, ...],
    threads: int | None,
    runs: int,
    budget: float,
    processes: int,
    cases: bool,
    peers: bool,
    only_peers: tuple[str, ...],
    scaling: bool,
    price: bool,
    experts: str | None,
    parity: bool,
    everything: bool,
    out: Path | None,
    as_json: bool,
    given: Path | None,
    compare: tuple[Path, Path] | None,
    bisected: str | None,
    tolerance: float | None,
    anyway: bool,
    seed: int | None,
    view_chunk: int | None,
    plugin: str | None,
    allow_pickle: bool,
) -> None:
    """Measure every SOURCE, a bundle (in ONNX Runtime), checkpoint or preset (in PyTorch).

    Each case is measured in processes of its own, on new random images in every run, beside what memory and
    arithmetic reach on this machine. A time that this machine cannot reach ends the command with exit code 1.

    \b
    moe3d bench bundle --out report
    moe3d bench bundle moe3d-tiny --shapes 1x1x196x252 --shapes 1x4x196x252 --out report
    moe3d bench --compare before/report.json after/report.json
    moe3d bench my-moe3d --bisect fp16
    moe3d bench my-moe3d bundle --parity --out report
    moe3d bench my-moe3d bundle --all --out report
    """
    if compare:
        _require_alone("--compare", sources, "report" if given else "", out=out)
        _compare(*compare, anyway, as_json)
        return
    if bisected:
        _bisect(sources, bisected, shapes, tolerance=tolerance, seed=seed, allow_pickle=allow_pickle, as_json=as_json)
        return
    if tolerance is not None:
        raise InputError("--tolerance is for --bisect; leave it out")
    if anyway:
        raise InputError("--anyway is for --compare; leave it out")
    if given:
        _require_alone("--report", sources)
        _rewrite(given, out)
        return
    from moe3d_deploy.benchmarks.bench.run import Options, sweep_options
    from moe3d_deploy.cli.bench_cases import CasesPart, plan

    options = Options(runs, budget, processes, threads=threads)
    of_models = {"seed": seed, "view_chunk": view_chunk, "plugin": plugin, "allow_pickle": allow_pickle}
    # In the order in which they are measured. All of them are made, and refuse what they cannot use, before the first.
    parts: list[Part] = []
    if peers and only_peers:
        raise InputError("--peers means all of them and --peer some; leave one of them out")
    peers, scaling, price, parity = (flag or everything for flag in (peers or bool(only_peers), scaling, price, parity))
    if cases or peers or scaling or everything or not given_flags(*_INSTEAD_OF_CASES):
        sweep = sweep_options(options) if scaling else None
        usual = cases or peers or everything or not scaling
        planned = plan(
            sources, backends, shapes, views, of_models,
            usual=usual, peers=peers, only_peers=only_peers, scaling=sweep,
        )  # fmt: skip
        parts.append(CasesPart(planned, options))
    if experts is not None and not price:
        raise InputError("--experts is for --price; leave it out")
    if price:
        from moe3d_deploy.cli.bench_price import PricePart, refuse_unused_by_price

        if not parts:
            refuse_unused_by_price()
        parts.append(PricePart(sources, shapes, views, experts, backends, options, of_models))
    if parity:
        from moe3d_deploy.cli.bench_parity import ParityPart, refuse_unused

        if not parts:
            refuse_unused(_OF_MEASURING)
        parts.append(ParityPart(sources, shapes, seed=seed, allow_pickle=allow_pickle))
    report = measure_parts(parts, out)
    _print(report, as_json)
    if out:
        click.echo(f"written to {out}", err=True)
    if not _sound(report):
        click.get_current_context().exit(1)


def _sound(report: "Report") -> bool:
    """Whether all that was asked for was measured, and can be true."""
    price, parity = report.sections.price, report.sections.parity
    if price and any(case.status != "measured" for case in price.cases):
        return False
    return all(case.status in ("measured", "unavailable") for case in report.cases) and (parity is None or parity.sound)


def _require_alone(flag: str, sources: tuple[str, ...], other: str = "", out: Path | None = None) -> None:
    """Raise InputError where an option that measures nothing stands beside something to measure."""
    others = [f"--{other}"] * bool(other) + ["--out"] * (out is not None)
    if given := [*sources[:1], *given_flags(*_OF_MEASURING), *others]:
        raise InputError(f"{flag} measures nothing and has no use for {given[0]}; leave one of them out")


def _bisect(sources: tuple[str, ...], precision: str, shapes: tuple[str, ...], **options: Any) -> None:
    from moe3d_deploy.cli.bench_bisect import bisect

    unused = given_flags(
        *(name for name in _OF_MEASURING if name not in ("shapes", "seed", "allow_pickle")), "given", "out"
    )
    if unused:
        raise InputError(f"--bisect has no use for {unused[0]}; leave it out")
    if not bisect(sources, precision, shapes, **options):
        click.get_current_context().exit(1)


def _compare(first: Path, second: Path, anyway: bool, as_json: bool) -> None:
    from moe3d_deploy.benchmarks.bench import compare
    from moe3d_deploy.benchmarks.bench.report import Report

    found = compare.compare(Report.load(first), Report.load(second), anyway=anyway)
    if as_json:
        click.echo(json.dumps(compare.as_json(found), indent=2))
    else:
        click.echo("\n".join(compare.lines(found)))


def _rewrite(file: Path, out: Path | None) -> None:
    from moe3d_deploy.benchmarks.bench.folder import require_plots, write_report
    from moe3d_deploy.benchmarks.bench.report import Report

    if out is None:
        raise InputError("--report writes files of a report: say where with --out FOLDER")
    require_plots()
    paths = write_report(Report.load(file), out)
    click.echo(f"{len(paths)} files in {out}: {', '.join(path.name for path in paths)}")


def _print(report: "Report", as_json: bool) -> None:
    from moe3d_deploy.benchmarks.bench.folder import all_tables

    if as_json:
        click.echo(report.to_json().decode(), nl=False)
        return
    for table in all_tables(report):
        click.echo(f"{table.title}\n{table.plain()}\n")

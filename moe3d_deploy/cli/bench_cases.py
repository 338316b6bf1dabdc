"""`moe3d bench`'s first part: which cases the sources and the options give, and measuring them."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe3d_deploy.cli.arguments import comma_list
from moe3d_deploy.cli.plan import parse_shapes
from moe3d_deploy.cli.progress import Progress
from moe3d_deploy.errors import InputError
from moe3d_deploy.machine import usable_cores

if TYPE_CHECKING:
    from moe3d_deploy.benchmarks.bench.cases import Planned, Source
    from moe3d_deploy.benchmarks.bench.report import Report
    from moe3d_deploy.benchmarks.bench.run import Options


class CasesPart:
    """Fills the section `cases`."""

    name = "cases"

    def __init__(self, planned: Sequence[Planned], options: Options) -> None:
        self._planned = planned
        self._options = options

    def run(self, report: Report, keep: Callable[[Report], None], progress: Progress) -> Report:
        from moe3d_deploy.benchmarks.bench.run import run_cases

        tried = [item for item in self._planned if not item.missing]
        total, done = sum((item.options or self._options).processes for item in tried), 0

        def with_cases(measured: Report) -> Report:
            sections = dataclasses.replace(report.sections, cases=measured.sections.cases)
            return dataclasses.replace(report, sections=sections)

        def kept(measured: Report) -> None:
            nonlocal done
            done = sum(len(case.rounds) for case in measured.cases)
            keep(with_cases(measured))

        def tell(label: str, text: str) -> None:
            progress.report("bench", done, total, f"{label}: {text}")

        with tempfile.TemporaryDirectory(prefix="moe3d-bench-") as workdir:
            measured = run_cases(
                self._planned,
                self._options,
                environment=report.environment,
                keep=kept,
                tell=tell,
                workdir=Path(workdir),
            )
        return with_cases(measured)


def plan(
    sources: tuple[str, ...],
    backends: tuple[str, ...],
    shapes: tuple[str, ...],
    views: str | None,
    options: dict[str, Any],
    *,
    usual: bool = True,
    peers: bool = False,
    only_peers: tuple[str, ...] = (),
    scaling: Options | None = None,
) -> list[Planned]:
    """The cases of a command line. Raises InputError where they make no sense.

    usual     without shapes or views take each source's own; else there are none but those of `scaling`
    peers     add those of every source; with `only_peers` those of these backends
    scaling   add a sweep over views and one over sizes of every source, measured with these options
    """
    from moe3d_deploy.benchmarks.bench.cases import check_labels, open_source, plan_cases, views_shapes
    from moe3d_deploy.bundle import is_bundle

    if not sources:
        raise InputError("nothing to measure; name a bundle, a checkpoint or a preset, such as moe3d-tiny")
    if shapes and views is not None:
        raise InputError("--views and --shapes both say what is run; leave one of them out")
    asked = [shape for text in shapes for shape in parse_shapes(text)]
    counts = view_counts(views) if views is not None else []
    # With sources of both kinds, what is for PyTorch goes to those that run in it; a bundle alone refuses it.
    in_pytorch = [source for source in sources if not is_bundle(source)]
    of_bundles = {"view_chunk": options["view_chunk"]} if in_pytorch else options
    opened = [
        open_source(source, backends=backends, **(options if source in in_pytorch else of_bundles))
        for source in sources
    ]
    wanted = asked or (views_shapes(opened, counts) if counts else [])
    planned = plan_cases(opened, wanted) if wanted or usual else []
    if peers:
        from moe3d_deploy.benchmarks.bench.peers import plan_peers

        planned += plan_peers(opened, wanted, only_peers)
    if scaling:
        known = {item.label for item in planned}
        planned += [item for item in _sweeps(opened, scaling) if item.label not in known]
    check_labels(planned)
    return planned


def _sweeps(sources: Sequence[Source], options: Options) -> Iterator[Planned]:
    from moe3d_deploy import cuda_driver
    from moe3d_deploy.benchmarks.bench.cases import Planned
    from moe3d_deploy.benchmarks.bench.scaling_shapes import sweep_shapes

    for source in sources:
        device = "cuda" if source.backend == "pytorch" and cuda_driver.query().gpus else "cpu"
        for shape in sweep_shapes(source, device, usable_cores()):
            yield Planned(source, shape, options=options)


def view_counts(text: str) -> list[int]:
    """The numbers of --views. Raises InputError."""
    counts = comma_list(text)
    if not counts or not all(re.fullmatch("[1-9][0-9]{0,4}", count) for count in counts):
        raise InputError(f"--views {text!r}: expected numbers of views, such as 1,2,4")
    return [int(count) for count in counts]

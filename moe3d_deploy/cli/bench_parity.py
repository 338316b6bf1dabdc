"""`moe3d bench --parity`: how far every backend and precision of a checkpoint is from it in PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from moe3d_deploy.cli.arguments import given_flags
from moe3d_deploy.cli.plan import parse_shapes
from moe3d_deploy.cli.progress import Progress
from moe3d_deploy.errors import InputError

if TYPE_CHECKING:
    from moe3d_deploy.benchmarks.bench.parity import Parity
    from moe3d_deploy.benchmarks.bench.report import Report

_USED = ("shapes", "seed", "allow_pickle", "parity")


class ParityPart:
    """Fills the section `parity`. Raises InputError, before anything is measured, for sources that cannot be compared.

    sources   one checkpoint or preset, and any bundles that were made of it
    """

    name = "parity"

    def __init__(self, sources: Sequence[str], shapes: Sequence[str], *, seed: int | None, allow_pickle: bool) -> None:
        from moe3d_deploy.benchmarks.bench.parity_plan import plan_parity
        from moe3d_deploy.bundle import is_bundle
        from moe3d_deploy.export.source import SourceSpec

        checkpoints = [source for source in sources if not is_bundle(source)]
        if len(checkpoints) != 1:
            raise InputError(
                f"--parity compares with one checkpoint or preset, and {len(checkpoints)} are named; name the one that "
                "the bundles were made of"
            )
        asked = [shape for text in shapes for shape in parse_shapes(text)]
        bundles = [source for source in sources if is_bundle(source)]
        self._plan = plan_parity(SourceSpec(checkpoints[0], seed, allow_pickle), bundles, asked)

    def run(self, report: Report, keep: Callable[[Report], None], progress: Progress) -> Report:
        from moe3d_deploy.benchmarks.bench.parity_run import run_parity

        steps = len(self._plan.shapes) * (2 + sum(variant.runs for variant in self._plan.variants))
        done = 0

        def with_parity(parity: Parity) -> Report:
            return dataclasses.replace(report, sections=dataclasses.replace(report.sections, parity=parity))

        def tell(what: str, shape: str) -> None:
            nonlocal done
            progress.report(self.name, done, steps, f"{what}: {shape}")
            done = min(done + 1, steps)

        return with_parity(run_parity(self._plan, keep=lambda parity: keep(with_parity(parity)), tell=tell))


def refuse_unused(names: Sequence[str]) -> None:
    """Raise InputError where one of these parameters, none of parity's, is given to parity alone."""
    if unused := given_flags(*(name for name in names if name not in _USED)):
        raise InputError(f"--parity alone has no use for {unused[0]}; leave it out")

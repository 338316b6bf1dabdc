"""`moe3d bench --price`: what the experts add to VGGT's single head, in time and in memory."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from moe3d_deploy.cli.arguments import comma_list, given_flags
from moe3d_deploy.cli.bench_cases import view_counts
from moe3d_deploy.cli.plan import parse_shapes
from moe3d_deploy.cli.progress import Progress
from moe3d_deploy.errors import InputError

if TYPE_CHECKING:
    from moe3d_deploy.benchmarks.bench.price import Price
    from moe3d_deploy.benchmarks.bench.report import Report
    from moe3d_deploy.benchmarks.bench.run import Options


class PricePart:
    """Fills the section `price`. Raises InputError and MissingExtraError before anything is measured.

    sources   one checkpoint or preset, and any bundles that were made of it
    shapes    as of the command line; views too: numbers of them at the model's usual size. Without both: the device's
    experts   numbers of them, as of the command line
    options   how long to measure
    of_models of `Session.open`
    """

    name = "price"

    def __init__(
        self,
        sources: Sequence[str],
        shapes: Sequence[str],
        views: str | None,
        experts: str | None,
        backends: Sequence[str],
        options: Options,
        of_models: dict[str, Any],
    ) -> None:
        from moe3d_deploy.benchmarks.bench.cases import open_source, views_shapes
        from moe3d_deploy.benchmarks.bench.price_run import EXPERTS, plan_price
        from moe3d_deploy.bundle import is_bundle
        from moe3d_deploy.runtime.packages import load_package

        if shapes and views is not None:
            raise InputError("--views and --shapes both say what is run; leave one of them out")
        checkpoints = [source for source in sources if not is_bundle(source)]
        if len(checkpoints) != 1:
            raise InputError(
                f"--price compares heads on the weights of one checkpoint or preset, and {len(checkpoints)} are named; "
                "name the one that is to be measured"
            )
        counts = _expert_counts(experts) if experts is not None else EXPERTS
        used = {name: value for name, value in of_models.items() if name != "view_chunk"}
        checkpoint = open_source(checkpoints[0], backends=(), **used)
        bundles = [open_source(source, backends=()) for source in sources if is_bundle(source)]
        device = "cuda" if load_package("torch").cuda.is_available() else "cpu"
        asked = [shape for text in shapes for shape in parse_shapes(text)]
        if views is not None:
            asked = views_shapes([checkpoint], view_counts(views))
        self._plan = plan_price(checkpoint, bundles, asked, counts, backends, device=device)
        self._options = options

    def run(self, report: Report, keep: Callable[[Report], None], progress: Progress) -> Report:
        from moe3d_deploy.benchmarks.bench.price_run import run_price

        total, done = len(self._plan.planned) * self._options.processes, 0

        def with_price(price: Price) -> Report:
            return dataclasses.replace(report, sections=dataclasses.replace(report.sections, price=price))

        def kept(price: Price, finished: int) -> None:
            nonlocal done
            done = finished
            keep(with_price(price))

        def tell(label: str, text: str) -> None:
            progress.report(self.name, done, total, f"{label}: {text}")

        return with_price(run_price(self._plan, self._options, keep=kept, tell=tell))


def refuse_unused_by_price() -> None:
    """Raise InputError for an option of the command line that the price alone does nothing with."""
    if unused := given_flags("view_chunk"):
        raise InputError(f"--price runs all views at once and has no use for {unused[0]}; leave it out")


def _expert_counts(text: str) -> list[int]:
    counts = comma_list(text)
    if not counts or not all(re.fullmatch("[1-9][0-9]{0,2}", count) and int(count) > 1 for count in counts):
        raise InputError(f"--experts {text!r}: expected numbers of experts, at least 2 each, such as 2,4,8")
    return [int(count) for count in counts]

"""How the error of depth falls with the samples of a training, and how many more a bar would take.

    python -m moe3d_deploy.benchmarks.learning_curve before/checkpoint after/checkpoint --out curve.json

Judges SOURCES, presets with trained weights or checkpoints that `moe3d train` wrote, on the same held-out scenes:
stages of one training, or trainings of growing length. Each should be the end of a falling learning rate: weights in
the midst of a run are worse than what they could end as. Samples and hours are those of all phases behind a source.

`trend` takes the error to fall as a power of the samples, as losses of networks mostly do over orders of magnitude
(Hestness et al. 2017, "Deep Learning Scaling is Predictable, Empirically"), with no floor; so what it says of a bar is
the least that can be hoped for, not a promise. The bar is for views of the model's own size, so the last of SOURCES is
judged there, too.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click
import numpy as np
from numpy.typing import NDArray

from moe3d_deploy.benchmarks.environment import environment, without_paths
from moe3d_deploy.benchmarks.quality import BARS, judged_splits
from moe3d_deploy.benchmarks.training_phases import phases_behind, totals
from moe3d_deploy.cli.main import finish
from moe3d_deploy.cli.parameters import OutputFile
from moe3d_deploy.cli.progress import Progress
from moe3d_deploy.errors import InputError, require
from moe3d_deploy.evaluation import native_size
from moe3d_deploy.evaluation.compare import PERCENTILES, scene_draws
from moe3d_deploy.evaluation.measures import measure
from moe3d_deploy.evaluation.scenes import HELD_OUT
from moe3d_deploy.export.source import SourceSpec
from moe3d_deploy.files import atomic_write
from moe3d_deploy.runtime.session import Session

if TYPE_CHECKING:
    from moe3d_deploy.weight_sources import WeightSource

FORMAT_VERSION = 1
KEPT = ("abs_rel", "delta1", "auc30", "boundary_f1")
_JUDGED = "abs_rel"  # what the trend is of


class Trend(NamedTuple):
    """error = scale * samples ** -power; the interval is 95 % of the bootstrap's draws of scenes."""

    power: float
    low: float
    high: float


@click.command()
@click.argument("sources", nargs=-1, required=True)
@click.option("--out", required=True, type=OutputFile(), help="JSON file to write.")
@click.option("--count", type=click.IntRange(min=2), default=128, show_default=True, help="Scenes of each split.")
@click.option("--views", type=click.IntRange(2, 8), default=4, show_default=True)
@click.option("--height", type=click.IntRange(min=1), help="Pixels of a view.  [default: as the evaluation]")
@click.option("--width", type=click.IntRange(min=1), help="[default: likewise]")
def main(sources: tuple[str, ...], out: Path, count: int, views: int, height: int | None, width: int | None) -> None:
    """Judge SOURCES, two or more trainings in the order of their samples, on the same held-out scenes."""
    require("scipy")
    stages = [(source, phases_of(source)) for source in sources]
    amounts = [totals(phases)["samples"] for _, phases in stages]
    if len(amounts) < 2 or sorted(set(amounts)) != amounts:
        told = ", ".join(f"{source} {amount:,}" for (source, _), amount in zip(stages, amounts, strict=True))
        raise InputError(f"name two or more trainings in the order of their samples, not {told}")
    opened = [SourceSpec(source).open() for source in sources]
    config = opened[0].config
    own = native_size(config.img_size, config.patch_size)
    size = {"views": views, "height": height or own[0], "width": width or own[1]}
    own_size = {"views": views, "height": own[0], "width": own[1]}
    progress = Progress()
    report: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "environment": environment(),
        "scenes": {"count": count, "first_seed": 0, **size},
        "stages": [
            {**_weights(weights), "phases": phases, "errors": _errors(source, count, size, progress)}
            for weights, (source, phases) in zip(opened, stages, strict=True)
        ],
    }
    last = report["stages"][-1]["errors"]
    if size != own_size:
        last = _errors(sources[-1], count, own_size, progress)
    report["last_at_own_size"] = {**own_size, "errors": last}
    atomic_write(out, (json.dumps(report, indent=2, sort_keys=True) + "\n").encode())


def phases_of(source: str) -> list[dict[str, Any]]:
    """The phases behind a preset's trained weights or a run's checkpoint. Raises InputError where none are known."""
    phases = phases_behind(source)
    if not phases:
        raise InputError(f"{source}: of these weights no training is known; name checkpoints that moe3d train wrote")
    return phases


def _weights(opened: "WeightSource") -> dict[str, str]:
    return {"name": without_paths(opened.name), "origin": opened.origin, "sha256": opened.sha256()}


def _errors(source: str, count: int, size: Mapping[str, int], progress: Progress) -> dict[str, dict[str, list[float]]]:
    """By split and measure, the figures of the scenes in the order of seeds; every scene has an AbsRel."""
    session = Session.open(source, backend="pytorch")
    found = {}
    for split, evaluation in judged_splits(session, count, size, progress, points=False):
        metrics = [result.metrics for result in evaluation.results]
        found[split] = {key: [round(of_scene[key], 6) for of_scene in metrics if key in of_scene] for key in KEPT}
        progress.line(split, f"{source}: AbsRel {np.mean(found[split][_JUDGED]):.4f} over {count} scenes")
    return found


def trend(samples: Sequence[int], errors: NDArray[np.float64]) -> Trend:
    """Least squares of log(mean error) over log(samples).

    samples   of N >= 2 stages
    errors    (N, scenes), the same scenes in every stage
    """
    drawn = [_power(samples, errors[:, draw].mean(axis=1)) for draw in scene_draws(errors.shape[1])]
    low, high = np.percentile(drawn, PERCENTILES).tolist()
    return Trend(_power(samples, errors.mean(axis=1)), low, high)


def samples_to(bar: float, power: float, samples: int, error: float) -> float:
    """Samples at which an `error` after `samples` has fallen to `bar`; infinity where it does not fall."""
    if error <= bar:
        return samples
    if power <= 0:
        return math.inf
    return samples * math.exp(min(math.log(error / bar) / power, 700.0))


def _power(samples: Sequence[int], means: NDArray[np.float64]) -> float:
    slope, _ = np.polyfit(np.log(samples), np.log(means), 1)
    return -float(slope)


def stages_table(report: dict[str, Any]) -> str:
    """Samples, hours and the means of every stage in Markdown."""
    measures = [measure(key) for key in KEPT]
    heads = [f"{found.name}: {', '.join(HELD_OUT)}" for found in measures]
    lines = [f"| samples | hours | {' | '.join(heads)} |", f"|---:|---:|{'---:|' * len(measures)}"]
    for stage in report["stages"]:
        cells = [
            ", ".join(found.text(float(np.mean(stage["errors"][split][found.key]))) for split in HELD_OUT)
            for found in measures
        ]
        total = totals(stage["phases"])
        lines.append(f"| {total['samples']:,} | {total['seconds'] / 3600:.1f} | {' | '.join(cells)} |")
    scenes = report["scenes"]
    return "\n".join([
        *lines, "",
        f"Means over seeds 0..{scenes['count'] - 1} of each split, {scenes['views']} views of "
        f"{scenes['width']}x{scenes['height']}, in PyTorch, float32.",
    ])  # fmt: skip


def trend_text(report: dict[str, Any]) -> str:
    """What the trend says of the bar, a line per split, in Markdown."""
    stages, last, bar = report["stages"], report["last_at_own_size"], BARS[_JUDGED]
    behind = [totals(stage["phases"]) for stage in stages]
    samples = [total["samples"] for total in behind]
    pace = samples[-1] / behind[-1]["seconds"]
    lines = []
    for split in HELD_OUT:
        found = trend(samples, np.array([stage["errors"][split][_JUDGED] for stage in stages]))
        error = float(np.mean(last["errors"][split][_JUDGED]))
        share, least, most = (f"{100 * (1 - 2**-power):.1f}" for power in found)
        needed, at_most, at_least = (samples_to(bar, power, samples[-1], error) for power in found)
        hours, hours_at_least, hours_at_most = (_round(n / pace / 3600) for n in (needed, at_least, at_most))
        lines.append(
            f"- `{split}`: twice the samples take {share} % off AbsRel ({least} to {most} %). From the {error:.4f} of "
            f"the last row's weights at {last['width']}x{last['height']}, {bar:g} then takes {_round(needed)} samples "
            f"in all ({_round(at_least)} to {_round(at_most)}), {hours} hours at their pace ({hours_at_least} to "
            f"{hours_at_most})."
        )
    return "\n".join(lines)


def _round(value: float) -> str:
    """Two digits that count, 1,234 as 1,200; infinity for what is beyond any training."""
    if not value < 1e12:
        return "infinitely many"
    return f"{round(value, 1 - math.floor(math.log10(value))):,.0f}"


if __name__ == "__main__":
    sys.exit(finish("learning-curve", lambda: main))

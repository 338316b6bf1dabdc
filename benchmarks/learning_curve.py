"""How the error of depth falls with the samples of a training, and how many more a bar would take.

    python -m moe3d_deploy.benchmarks.learning_curve before/checkpoint after/checkpoint --out curve.json

Judges SOURCES, presets with trained weights or checkpoints that `moe3d train` wrote, on the same held-out scenes:
stages of one training, or trainings of growing length. Each should be the end of a falling learning rate: weights in
the midst of a run are worse than what they could end as. Samples and hours are those of all phases behind a source.

`trend` takes the error to fall as a power of the samples, as losses of networks mostly do over orders of magnitude
(Hestness et al. 2017, "Deep Learning Scaling is Predictable, Empirically"), with no floor; so what it says of a bar is
the least that can be hoped for, not a promise.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
from numpy.typing import NDArray

from moe3d_deploy.benchmarks.environment import environment, without_paths
from moe3d_deploy.benchmarks.quality import BARS
from moe3d_deploy.benchmarks.training_phases import phases_behind, shipped_phases
from moe3d_deploy.cli.main import finish
from moe3d_deploy.cli.progress import Progress
from moe3d_deploy.config import PRESETS
from moe3d_deploy.errors import InputError, require
from moe3d_deploy.evaluation import evaluate, native_size, rendered_scenes
from moe3d_deploy.evaluation.measures import measure
from moe3d_deploy.evaluation.scenes import HELD_OUT
from moe3d_deploy.export.source import SourceSpec
from moe3d_deploy.files import atomic_write
from moe3d_deploy.runtime.session import Session

FORMAT_VERSION = 1
KEPT = ("abs_rel", "delta1", "auc30", "boundary_f1")
_JUDGED = "abs_rel"  # what the trend is of
_DRAWS = 2000  # of the bootstrap
_SEED = 0


class Trend(NamedTuple):
    """error = scale * samples ** -power; the intervals are 95 % of the bootstrap's draws of scenes.

    samples_to_bar   None where the error does not fall; its interval ends in inf where that holds for some of the draws
    """

    power: float
    power_interval: tuple[float, float]
    samples_to_bar: float | None
    samples_interval: tuple[float, float]


@click.command()
@click.argument("sources", nargs=-1, required=True)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON file to write.")
@click.option("--count", type=click.IntRange(min=2), default=128, show_default=True, help="Scenes of each split.")
@click.option("--views", type=click.IntRange(2, 8), default=4, show_default=True)
@click.option("--height", type=click.IntRange(min=1), help="Pixels of a view.  [default: as the evaluation]")
@click.option("--width", type=click.IntRange(min=1), help="[default: likewise]")
def main(sources: tuple[str, ...], out: Path, count: int, views: int, height: int | None, width: int | None) -> None:
    """Judge SOURCES, two or more trainings in the order of their samples, on the same held-out scenes."""
    require("scipy")
    stages = [(source, phases_of(source)) for source in sources]
    amounts = [_sum(phases, "samples") for _, phases in stages]
    if len(amounts) < 2 or sorted(set(amounts)) != amounts:
        told = ", ".join(f"{source} {amount:,}" for (source, _), amount in zip(stages, amounts, strict=True))
        raise InputError(f"name two or more trainings in the order of their samples, not {told}")
    config = SourceSpec(sources[0]).open().config
    usual = native_size(config.img_size, config.patch_size)
    size = {"views": views, "height": height or usual[0], "width": width or usual[1]}
    progress = Progress()
    report = {
        "format_version": FORMAT_VERSION,
        "environment": environment(),
        "scenes": {"count": count, "first_seed": 0, **size},
        "stages": [
            {**_weights(source), "phases": phases, "errors": _errors(source, count, size, progress)}
            for source, phases in stages
        ],
    }
    atomic_write(out, (json.dumps(report, indent=2, sort_keys=True) + "\n").encode())


def phases_of(source: str) -> list[dict[str, Any]]:
    """The phases behind a preset's trained weights or a run's checkpoint. Raises InputError where none are known."""
    phases = shipped_phases(source) if source in PRESETS else phases_behind(Path(source))
    if not phases:
        raise InputError(f"{source}: of these weights no training is known; name checkpoints that moe3d train wrote")
    return phases


def _weights(source: str) -> dict[str, str]:
    opened = SourceSpec(source).open()
    return {"name": without_paths(opened.name), "origin": opened.origin, "sha256": opened.sha256()}


def _sum(phases: Sequence[dict[str, Any]], key: str) -> int:
    return sum(phase[key] for phase in phases)


def _errors(source: str, count: int, size: Mapping[str, int], progress: Progress) -> dict[str, dict[str, list[float]]]:
    """By split and measure, the figures of the scenes in the order of seeds; every scene has an AbsRel."""
    session = Session.open(source, backend="pytorch")
    found = {}
    for split in HELD_OUT:
        results = evaluate(
            session.run,
            rendered_scenes(range(count), split=split, **size),
            points=False,
            on_scene=lambda scene, *_, split=split: progress.report(split, int(scene.name) + 1, count),
        ).results
        found[split] = {key: [r.metrics[key] for r in results if key in r.metrics] for key in KEPT}
        progress.line(split, f"{source}: AbsRel {np.mean(found[split][_JUDGED]):.4f} over {count} scenes")
    return found


def trend(samples: Sequence[int], errors: NDArray[np.float64], bar: float) -> Trend:
    """Least squares of log(mean error) over log(samples).

    samples   of N >= 2 stages
    errors    (N, scenes), the same scenes in every stage
    """
    draws = np.random.default_rng(_SEED).integers(errors.shape[1], size=(_DRAWS, errors.shape[1]))
    power, needed = _fit(samples, errors.mean(axis=1), bar)
    drawn = np.sort([_fit(samples, errors[:, draw].mean(axis=1), bar) for draw in draws], axis=0)
    # Order statistics, as what lies between a number and infinity is none.
    (low, near), (high, far) = drawn[[int(0.025 * _DRAWS), int(0.975 * _DRAWS)]].tolist()
    return Trend(power, (low, high), needed if math.isfinite(needed) else None, (near, far))


def _fit(samples: Sequence[int], means: NDArray[np.float64], bar: float) -> tuple[float, float]:
    """Power, and samples at which the line meets `bar`; infinity where it does not fall."""
    slope, offset = np.polyfit(np.log(samples), np.log(means), 1)
    if slope >= 0:
        return -slope, math.inf
    return -float(slope), math.exp(min((math.log(bar) - offset) / slope, 700.0))


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
        samples, seconds = (_sum(stage["phases"], key) for key in ("samples", "seconds"))
        lines.append(f"| {samples:,} | {seconds / 3600:.1f} | {' | '.join(cells)} |")
    scenes = report["scenes"]
    return "\n".join([
        *lines, "",
        f"Means over seeds 0..{scenes['count'] - 1} of each split, {scenes['views']} views of "
        f"{scenes['width']}x{scenes['height']}, in PyTorch, float32.",
    ])  # fmt: skip


def trend_text(report: dict[str, Any]) -> str:
    """What the trend says of the bar, a line per split, in Markdown."""
    stages, bar = report["stages"], BARS[_JUDGED]
    samples = [_sum(stage["phases"], "samples") for stage in stages]
    pace = samples[-1] / _sum(stages[-1]["phases"], "seconds")
    lines = []
    for split in HELD_OUT:
        errors = np.array([stage["errors"][split][_JUDGED] for stage in stages])
        found = trend(samples, errors, bar)
        twice = [100 * (1 - 2**-power) for power in (found.power, *found.power_interval)]
        line = f"- `{split}`: twice the samples take {twice[0]:.1f} % off AbsRel ({twice[1]:.1f} to {twice[2]:.1f} %); "
        if found.samples_to_bar is None:
            line += f"with no fall there is no way to {bar:g}."
        else:
            near, far = (_hours(value, pace) for value in found.samples_interval)
            line += (
                f"AbsRel {bar:g} then takes {_two_digits(found.samples_to_bar)} samples, "
                f"{_hours(found.samples_to_bar, pace)} hours of this machine ({near} to {far})."
            )
        lines.append(line)
    return "\n".join(lines)


def _hours(samples: float, pace: float) -> str:
    return _two_digits(samples / pace / 3600)


def _two_digits(value: float) -> str:
    """With two digits that count, 1,234 as 1,200; what is beyond any training as that."""
    if not value < 1e7:
        return "more than 10,000,000"
    digits = max(0, math.floor(math.log10(value)) - 1)
    return f"{round(value, -digits):,.0f}"


if __name__ == "__main__":
    sys.exit(finish("learning-curve", lambda: main))

"""From the figures of heads per seed and scene to means, spreads, and paired differences with their intervals."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe3d_deploy.evaluation.compare import PERCENTILES, RESAMPLES
from moe3d_deploy.evaluation.measures import measure
from moe3d_deploy.metrics.scene import EXPERT_SHARE

BETTER, WORSE, UNCLEAR = "better", "worse", "no clear difference"
_STREAM = 0

Figures = Sequence[Mapping[str, Mapping[str, float]]]
"""Of one head: per seed, by scene, by measure."""


def summary(figures: Figures, key: str) -> dict[str, Any] | None:
    """`mean` over seeds and scenes, `spread` (the standard deviation of the seeds' means, n - 1; None for one seed),
    `per_seed`, and `scenes`, how many have the measure; None where none has.
    """
    values = _table(figures, key)
    if values is None:
        return None
    per_seed = values.mean(axis=1)
    spread = float(per_seed.std(ddof=1)) if len(per_seed) > 1 else None
    return {
        "mean": float(per_seed.mean()),
        "spread": spread,
        "per_seed": per_seed.tolist(),
        "scenes": values.shape[1],
    }


def expert_shares(figures: Figures) -> list[float] | None:
    """Share of pixels of the most used expert, of the second, and so on: means over the seeds. None without experts.

    Experts are sorted within each seed, over all scenes: which number an expert has is chance.
    """
    keys = sorted(key for key in next(iter(figures[0].values())) if key.startswith(EXPERT_SHARE))
    if not keys:
        return None
    of_seeds = [[np.mean([scene[key] for scene in scenes.values()]) for key in keys] for scenes in figures]
    shares: list[float] = np.mean(np.sort(of_seeds, axis=1)[:, ::-1], axis=0).tolist()
    return shares


def difference(reference: Figures, found: Figures, key: str) -> dict[str, Any] | None:
    """What changes from the head `reference` to `found` on equal scenes, seed by seed.

    change      mean over seeds and scenes of found - reference
    low, high   95 % interval by bootstrap: seeds and scenes are drawn with replacement, each for themselves, RESAMPLES
                times; both heads on the same draw. Source: the pigeonhole bootstrap, Owen 2007. None for one scene
    per_seed    the change of each seed
    verdict     BETTER or WORSE where the interval excludes 0 and all seeds agree, of which there are two; else UNCLEAR

    With few seeds the interval knows little of how seeds spread: hence the second condition. None where no scene has
    the measure for both heads.
    """
    table = _table([*reference, *found], key)
    if table is None:
        return None
    changes = table[len(reference) :] - table[: len(reference)]
    per_seed = changes.mean(axis=1)
    low, high = _interval(changes)
    return {
        "change": float(per_seed.mean()),
        "low": low,
        "high": high,
        "per_seed": per_seed.tolist(),
        "verdict": _verdict(key, low, high, per_seed),
    }


def windows(values: NDArray[Any], count: int) -> list[float]:
    """A curve of a value per step as at most `count` means over equal parts of it."""
    return [float(part.mean()) for part in np.array_split(np.asarray(values, np.float64), min(count, len(values)))]


def last_fifth(values: NDArray[Any]) -> float | None:
    """By what share the loss changed from the fourth fifth of the steps to the last; None below 5 steps."""
    if len(values) < 5:
        return None
    *_, before, after = windows(values, 5)
    return after / before - 1


def _interval(changes: NDArray[np.float64]) -> tuple[float | None, float | None]:
    seeds, scenes = changes.shape
    if scenes == 1:
        return None, None
    stream = np.random.default_rng(_STREAM)
    of_seeds = stream.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES)
    of_scenes = stream.multinomial(scenes, np.full(scenes, 1 / scenes), size=RESAMPLES)
    means = ((of_seeds @ changes) * of_scenes).sum(axis=1) / changes.size
    low, high = np.percentile(means, PERCENTILES).tolist()
    return low, high


def _verdict(key: str, low: float | None, high: float | None, per_seed: NDArray[np.float64]) -> str:
    better = measure(key).better
    if low is None or high is None or not better:
        return UNCLEAR
    sign = 1 if low > 0 else -1 if high < 0 else 0
    if not sign or len(per_seed) < 2 or not (np.sign(per_seed) == sign).all():
        return UNCLEAR
    return BETTER if (sign > 0) == (better == "higher") else WORSE


def _table(figures: Figures, key: str) -> NDArray[np.float64] | None:
    """(seeds, scenes) of the scenes that have the measure for all of `figures`; None where there is none."""
    scenes = [name for name in figures[0] if all(key in of_seed[name] for of_seed in figures)]
    if not scenes:
        return None
    return np.array([[of_seed[name][key] for name in scenes] for of_seed in figures])

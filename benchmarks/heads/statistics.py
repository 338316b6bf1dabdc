"""From what each seed of each head gave to means, spreads, and differences with their verdicts."""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe3d_deploy.benchmarks.heads.findings import finding
from moe3d_deploy.benchmarks.heads.scores import EFFECTIVE_EXPERTS, MEASURES, Scores
from moe3d_deploy.benchmarks.heads.variants import BETTER, MOE, PRIMARY, UNCLEAR, WORSE, Plan, references
from moe3d_deploy.evaluation.compare import PERCENTILES
from moe3d_deploy.evaluation.measures import measure
from moe3d_deploy.evaluation.scenes import HELD_OUT
from moe3d_deploy.metrics.scene import EXPERT_SHARE
from moe3d_deploy.runtime.packages import load_package

CURVE_POINTS = 60
LEVEL = 0.05  # of a verdict, after its correction
RESAMPLES = 10_000  # the least p is two in so many: small enough for the correction over a hundred differences
_STREAM = 0
_COMPARED = tuple(key for key in MEASURES if measure(key).better)

Figures = Sequence[Mapping[str, Mapping[str, float]]]
"""Of one head: per seed, by scene, by measure."""


class HeadResult(NamedTuple):
    """Of one head and seed: losses per step, "depth" and with a gate "entropy", and figures by split and scene."""

    curves: Mapping[str, NDArray[Any]]
    scores: Mapping[str, Scores]


def comparison(
    results: Mapping[str, Sequence[HeadResult]],
    rates: Mapping[str, Mapping[str, Any]],
    loss: str,
    plan: Plan,
    model: Mapping[str, Any],
) -> dict[str, Any]:
    """All of one loss; the form is in docs/comparison.md.

    results   by head, per seed, all on equal scenes
    rates     by head: `tried`, a list of `learning_rate` and `abs_rel` on validation scenes, and which was `chosen`
    model     the report's entry: its own head bears on the finding
    """
    figures = {split: {name: [s.scores[split] for s in seeds] for name, seeds in results.items()} for split in HELD_OUT}
    found: dict[str, Any] = {
        "loss": loss,
        "entropy_weight": plan.entropy_weight,
        "rates": dict(rates),
        "training": {name: _training(seeds) for name, seeds in results.items()},
        "quality": {split: {name: _quality(f) for name, f in heads.items()} for split, heads in figures.items()},
        "differences": {split: _differences(heads) for split, heads in figures.items()},
    }
    _judge(found["differences"])
    return found | {"finding": finding(found, model)}


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

    change         mean over seeds and scenes of found - reference
    low, high      95 % interval by bootstrap: seeds and scenes are drawn with replacement, each for themselves,
                   RESAMPLES times; both heads on the same draw. Source: the pigeonhole bootstrap, Owen 2007. None for
                   one scene
    t_low, t_high  95 % interval of Student's t over the seeds, and over seeds and scenes: the wider of the two. None
                   for one seed
    per_seed       the change of each seed
    p              the larger one of the two tests that the change is 0; None where either is not there

    A difference has to pass both: few seeds say little of their own spread to a bootstrap, and t asks for changes that
    are normally distributed. None where no scene has the measure for both heads.
    """
    table = _table([*reference, *found], key)
    if table is None:
        return None
    changes = table[len(reference) :] - table[: len(reference)]
    per_seed = changes.mean(axis=1)
    low, high, p_bootstrap = _bootstrap(changes)
    t_low, t_high, p_student = _student(changes)
    return {
        "change": float(per_seed.mean()),
        "low": low,
        "high": high,
        "t_low": t_low,
        "t_high": t_high,
        "per_seed": per_seed.tolist(),
        "p": None if p_bootstrap is None or p_student is None else max(p_bootstrap, p_student),
    }


def holm(p: Sequence[float]) -> list[float]:
    """p-values such that any at or below a level is false with no more than that probability. Source: Holm 1979."""
    values = np.asarray(p, np.float64)
    order = values.argsort()
    factors = np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate(factors * values[order]).clip(max=1)
    result: list[float] = adjusted.tolist()
    return result


def windows(values: NDArray[Any], count: int) -> list[float]:
    """A curve of a value per step as at most `count` means over equal parts of it."""
    return [float(part.mean()) for part in np.array_split(np.asarray(values, np.float64), min(count, len(values)))]


def last_fifth(values: NDArray[Any]) -> float | None:
    """What share of its whole fall, from the first fifth of the steps to the last, a loss fell by since the fourth.

    Negative where it rose again. None below 5 steps, and where it did not fall: there is no whole to have a share in.
    """
    if len(values) < 5:
        return None
    first, *_, before, after = windows(values, 5)
    return (before - after) / (first - after) if first > after else None


def _training(seeds: Sequence[HeadResult]) -> dict[str, Any]:
    curves: dict[str, Any] = {
        name: [windows(seed.curves[name], CURVE_POINTS) for seed in seeds] for name in seeds[0].curves
    }
    return curves | {"last_fifth": [last_fifth(seed.curves["depth"]) for seed in seeds]}


def _quality(figures: Figures) -> dict[str, Any]:
    found = {key: summary(figures, key) for key in (*MEASURES, EFFECTIVE_EXPERTS)}
    result: dict[str, Any] = {key: value for key, value in found.items() if value}
    return result | {"expert_shares": expert_shares(figures)}


def _differences(heads: Mapping[str, Figures]) -> dict[str, Any]:
    """Reference -> head -> measure, from every head to all that come after it."""
    result: dict[str, Any] = {}
    for reference, name in itertools.combinations(heads, 2):
        found = {key: difference(heads[reference], heads[name], key) for key in _COMPARED}
        result.setdefault(reference, {})[name] = found
    return result


def _judge(differences: Mapping[str, Any]) -> None:
    """Add to every difference whether it is `primary`, its `p_adjusted`, and the `verdict`.

    The primary ones are few, named before any training, and each is a claim: Holm's correction keeps the chance of one
    that is false at LEVEL. Of all others that of Benjamini and Hochberg keeps the share of false ones there.
    """
    families: dict[bool, list[tuple[str, dict[str, Any]]]] = {True: [], False: []}
    for of_split in differences.values():
        for reference, heads in of_split.items():
            for name, changes in heads.items():
                for key, found in changes.items():
                    primary = key == PRIMARY and name == MOE and reference in references(of_split)
                    if found:
                        families[primary].append((key, found))
    for primary, family in families.items():
        p = [1.0 if found["p"] is None else found["p"] for _, found in family]
        adjusted = holm(p) if primary else load_package("scipy").stats.false_discovery_control(p).tolist()
        for (key, found), value in zip(family, adjusted, strict=True):
            told = found["p"] is not None
            found |= {
                "primary": primary,
                "p_adjusted": value if told else None,
                "verdict": _verdict(key, found["change"]) if told and value < LEVEL else UNCLEAR,
            }


def _verdict(key: str, change: float) -> str:
    return BETTER if (change > 0) == (measure(key).better == "higher") else WORSE


def _student(changes: NDArray[np.float64]) -> tuple[float | None, float | None, float | None]:
    """Interval and two-sided p of the mean of (seeds, scenes), the wider interval and the larger p of two kinds:

    over seeds alone, n - 1 degrees of freedom; and with the variance of the scenes' means added to that of the seeds',
    degrees of freedom by Satterthwaite (1946). A mean without any variance is certain.
    """
    seeds, scenes = changes.shape
    if seeds == 1:
        return None, None, None
    mean = float(changes.mean())
    of_seeds = float(changes.mean(axis=1).var(ddof=1)) / seeds
    of_scenes = float(changes.mean(axis=0).var(ddof=1)) / scenes if scenes > 1 else 0.0
    half, p = 0.0, float(mean == 0)
    if of_seeds > 0:
        half, p = _student_of(mean, of_seeds, seeds - 1)
    if of_scenes > 0:
        both = of_seeds + of_scenes
        freedom = both**2 / (of_seeds**2 / (seeds - 1) + of_scenes**2 / (scenes - 1))
        half, p = map(max, (half, p), _student_of(mean, both, freedom))
    return mean - half, mean + half, p


def _student_of(mean: float, variance: float, freedom: float) -> tuple[float, float]:
    """Half of the 95 % interval of a mean of that variance, and its p."""
    student, error = load_package("scipy").stats.t(freedom), math.sqrt(variance)
    return error * float(student.ppf(PERCENTILES[1] / 100)), 2 * float(student.sf(abs(mean) / error))


def _bootstrap(changes: NDArray[np.float64]) -> tuple[float | None, float | None, float | None]:
    """Interval and two-sided p of the mean of (seeds, scenes)."""
    seeds, scenes = changes.shape
    if scenes == 1:
        return None, None, None
    of_seeds, of_scenes = _draws(seeds, scenes)
    means = ((of_seeds @ changes) * of_scenes).sum(axis=1) / changes.size
    low, high = np.percentile(means, PERCENTILES).tolist()
    beyond = min(np.count_nonzero(means <= 0), np.count_nonzero(means >= 0))
    return low, high, min(1.0, 2 * (beyond + 1) / (RESAMPLES + 1))


@functools.lru_cache(maxsize=8)
def _draws(seeds: int, scenes: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How often each seed and each scene is drawn, (RESAMPLES, n): the same for all heads and measures."""
    stream = np.random.default_rng(_STREAM)
    return (
        stream.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES),
        stream.multinomial(scenes, np.full(scenes, 1 / scenes), size=RESAMPLES),
    )


def _table(figures: Figures, key: str) -> NDArray[np.float64] | None:
    """(seeds, scenes) of the scenes that have the measure for all of `figures`; None where there is none."""
    scenes = [name for name in figures[0] if all(key in of_seed[name] for of_seed in figures)]
    if not scenes:
        return None
    return np.array([[of_seed[name][key] for name in scenes] for of_seed in figures])

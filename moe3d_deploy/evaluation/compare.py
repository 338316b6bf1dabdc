"""Two predictors on the same scenes: what changes from one to the other, and how sure that is."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe3d_deploy.errors import InputError
from moe3d_deploy.evaluation.evaluate import Evaluation
from moe3d_deploy.evaluation.measures import in_order

RELATIVE = ("abs_rel",)  # its change is a share of the reference's mean; of all others, the difference of the means
RESAMPLES = 2000
_SEED = 0
PERCENTILES = (2.5, 97.5)


class Change(NamedTuple):
    """From the mean of one to the mean of the other; `low` to `high` is the 95 % interval, None for a single scene.

    `typical` is the mean over scenes of a scene's own change without its sign, so what goes up in one scene and down in
    another does not cancel: at least as much as `change`, and in the same terms.
    """

    reference: float
    found: float
    change: float
    low: float | None
    high: float | None
    typical: float


@dataclass(frozen=True)
class Comparison:
    """The change of every measure that both have; `experts_agree` is the share of pixels of the same strongest expert.

    None where one of the two tells no expert weights.
    """

    scenes: int
    changes: dict[str, Change]
    experts_agree: float | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "scenes": self.scenes,
            "changes": {key: change._asdict() for key, change in self.changes.items()},
            "experts_agree": self.experts_agree,
        }


def compare(reference: Evaluation, found: Evaluation) -> Comparison:
    """What changes from `reference` to `found`, which saw the same scenes in the same order.

    A scene that lacks a measure in either does not count in that measure's means. The interval is the bootstrap's:
    scenes are drawn with replacement, RESAMPLES times, both predictors on the same draw, and the 2.5th and 97.5th
    percentiles of the change are taken; what makes scenes easy or hard falls out, since it is in both. Source:
    percentile bootstrap, Efron and Tibshirani 1993. The draws are seeded: equal evaluations give equal intervals.
    Raises InputError where the scenes are not the same.
    """
    names = [result.name for result in reference.results]
    if names != [result.name for result in found.results]:
        raise InputError("two evaluations can only be compared on the same scenes in the same order")
    pairs = list(zip(reference.results, found.results, strict=True))
    shared = in_order(
        {key for result in reference.results for key in result.metrics}
        & {key for result in found.results for key in result.metrics}
    )
    changes = {}
    for key in shared:
        both = [(a.metrics[key], b.metrics[key]) for a, b in pairs if key in a.metrics and key in b.metrics]
        if both:
            changes[key] = _change(np.array(both), relative=key in RELATIVE)
    maps = [(a.experts, b.experts) for a, b in pairs if a.experts is not None and b.experts is not None]
    equal = sum(np.count_nonzero(a == b) for a, b in maps)
    agree = equal / sum(a.size for a, _ in maps) if maps else None
    return Comparison(len(pairs), changes, agree)


def _change(values: NDArray[np.float64], *, relative: bool) -> Change:
    """values (N, 2): reference and found of N scenes."""
    a, b = values.mean(axis=0).tolist()
    change = _scaled(b - a, a, relative)
    typical = _scaled(float(np.abs(values[:, 1] - values[:, 0]).mean()), a, relative)
    if len(values) == 1:
        return Change(a, b, change, None, None, typical)
    means = values[scene_draws(len(values))].mean(axis=1)
    changes = [_scaled(y - x, x, relative) for x, y in means.tolist()]
    low, high = np.percentile(changes, PERCENTILES).tolist()
    return Change(a, b, change, low, high, typical)


def scene_draws(count: int) -> NDArray[np.int64]:
    """The bootstrap's draws of `count` scenes with replacement, (RESAMPLES, count): the same at every call."""
    return np.random.default_rng(_SEED).integers(count, size=(RESAMPLES, count))


def _scaled(difference: float, reference: float, relative: bool) -> float:
    if not relative or difference == 0:
        return difference
    return difference / reference if reference else math.inf

"""From what each seed of each head gave to the comparison of one loss: JSON, with the finding in words."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from numpy.typing import NDArray

from moe3d_deploy.benchmarks.head_findings import finding
from moe3d_deploy.benchmarks.head_scores import EFFECTIVE_EXPERTS, MEASURES, Scores
from moe3d_deploy.benchmarks.head_statistics import (
    Figures,
    difference,
    expert_shares,
    last_fifth,
    summary,
    windows,
)
from moe3d_deploy.benchmarks.head_variants import SINGLE, WIDE, Plan
from moe3d_deploy.evaluation.scenes import HELD_OUT

CURVE_POINTS = 60
_COMPARED = tuple(key for key in MEASURES if key != "gate_entropy")


class HeadResult(NamedTuple):
    """Of one head and seed: losses per step, "depth" and with a gate "entropy", and figures by split and scene."""

    curves: Mapping[str, NDArray[Any]]
    scores: Mapping[str, Scores]


def comparison(results: Mapping[str, Sequence[HeadResult]], loss: str, plan: Plan) -> dict[str, Any]:
    """`results` by head, per seed, all on equal scenes; the form is in docs/comparison.md."""
    figures = {split: {name: [s.scores[split] for s in seeds] for name, seeds in results.items()} for split in HELD_OUT}
    found = {
        "loss": loss,
        "entropy_weight": plan.entropy_weight,
        "training": {name: _training(seeds) for name, seeds in results.items()},
        "quality": {split: {name: _quality(f) for name, f in heads.items()} for split, heads in figures.items()},
        "differences": {split: _differences(heads) for split, heads in figures.items()},
    }
    return found | {"finding": finding(found)}


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
    """Reference -> head -> measure, from either single head to all others."""
    return {
        reference: {
            name: {key: difference(heads[reference], figures, key) for key in _COMPARED}
            for name, figures in heads.items()
            if name != reference
        }
        for reference in (SINGLE, WIDE)
    }

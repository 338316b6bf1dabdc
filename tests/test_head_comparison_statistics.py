"""Differences between heads by hand, their correction, and how often equal heads are called different."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from moe3d_deploy.benchmarks.heads import statistics
from moe3d_deploy.benchmarks.heads.statistics import (
    HeadResult,
    comparison,
    difference,
    expert_shares,
    holm,
    last_fifth,
    summary,
    windows,
)
from moe3d_deploy.benchmarks.heads.variants import Plan

Figures = list[dict[str, dict[str, float]]]


def figures(*seeds: Mapping[str, float], key: str = "boundary_f1") -> Figures:
    return [{scene: {key: value} for scene, value in seed.items()} for seed in seeds]


def of_array(values: NDArray[np.float64], key: str = "boundary_f1") -> Figures:
    """From (seeds, scenes)."""
    return figures(*({str(i): float(value) for i, value in enumerate(seed)} for seed in values), key=key)


def change(reference: Figures, found: Figures, key: str = "boundary_f1") -> dict[str, Any]:
    result = difference(reference, found, key)
    assert result is not None
    return result


def test_means_and_spreads_by_hand() -> None:
    """Means of the seeds 0.2 and 0.4; their standard deviation with n - 1 = 1 is 0.1 sqrt 2."""
    found = summary(figures({"a": 0.1, "b": 0.3}, {"a": 0.3, "b": 0.5}), "boundary_f1")
    assert found is not None
    assert found["mean"] == pytest.approx(0.3)
    assert found["spread"] == pytest.approx(0.1 * 2**0.5)
    assert found["per_seed"] == pytest.approx([0.2, 0.4])
    assert found["scenes"] == 2


def test_a_scene_that_lacks_a_measure_in_any_seed_does_not_count() -> None:
    found = figures({"a": 0.1, "b": 0.3}, {"a": 0.3})
    found[1]["b"] = {}
    result = summary(found, "boundary_f1")
    assert result is not None
    assert (result["mean"], result["scenes"]) == (pytest.approx(0.2), 1)
    assert summary(found, "flying") is None


def test_an_equal_gain_everywhere_is_certain_however_much_scenes_differ() -> None:
    reference = figures({"a": 0.1, "b": 0.9}, {"a": 0.2, "b": 0.7})
    better = figures({"a": 0.11, "b": 0.91}, {"a": 0.21, "b": 0.71})
    found = change(reference, better)
    ends = [found[name] for name in ("change", "low", "high", "t_low", "t_high")]
    assert [*ends, *found["per_seed"]] == pytest.approx([0.01] * 7)
    assert found["p"] < 1e-3


def test_the_interval_of_t_by_hand() -> None:
    """Changes 1, 2, 3 (x 0.01): mean 0.02, standard error 0.01 / sqrt 3, 4.3027 of them at 2 degrees of freedom; and
    t = sqrt 12, whose two-sided p at 2 degrees is 1 - sqrt(12 / 14) = 0.0742.
    """
    gains = np.array([[0.01], [0.02], [0.03]]) + np.zeros((1, 4))
    found = change(of_array(np.zeros((3, 4))), of_array(gains))
    half = 4.3027 * 0.01 / 3**0.5
    assert (found["t_low"], found["t_high"]) == pytest.approx((0.02 - half, 0.02 + half), abs=1e-6)
    assert found["low"] > 0  # the bootstrap of three seeds alone would call this clear
    assert found["p"] == pytest.approx(0.0742, abs=1e-4)


def test_the_interval_of_t_over_seeds_and_scenes_by_hand() -> None:
    """Six seeds and six scenes, both with means of 0 to 5: squared standard errors v = 3.5 / 6, together 2 v and
    (2 v)^2 / (v^2 / 5 + v^2 / 5) = 10 degrees of freedom, 2.2281. Where scenes hardly differ, seeds alone are wider:
    two with means of 1 and 3, a standard error of 1 at one degree, 12.7062.
    """
    steps = np.arange(6.0)
    found = change(of_array(np.zeros((6, 6))), of_array(steps[:, None] + steps))
    assert (found["t_low"], found["t_high"]) == pytest.approx(
        (5 - 2.2281 * (7 / 6) ** 0.5, 5 + 2.2281 * (7 / 6) ** 0.5), abs=1e-4
    )
    wider = change(of_array(np.zeros((2, 2))), of_array(np.array([[0.9, 1.1], [2.9, 3.1]])))
    assert wider["t_high"] - 2 == pytest.approx(12.7062, rel=1e-3)


def test_a_gain_on_few_scenes_is_not_certain_though_seeds_agree() -> None:
    """All seeds gain the same, on one scene of eight: a draw without that scene, (7/8)^8 = 34 %, has no gain."""
    gains = np.zeros((6, 8))
    gains[:, 3] = 0.1
    found = change(of_array(np.zeros((6, 8))), of_array(gains))
    assert found["t_low"] == pytest.approx(0.1 / 8 * (1 - 2.3646), abs=1e-6)  # mean = standard error, 7 degrees
    assert found["low"] == 0
    assert found["p"] == pytest.approx(2 * 0.344, abs=0.03)


def test_one_seed_and_one_scene_tell_nothing() -> None:
    one_seed = change(figures({"a": 0.1, "b": 0.2}), figures({"a": 0.2, "b": 0.3}))
    assert one_seed["low"] == pytest.approx(0.1)
    assert (one_seed["t_low"], one_seed["t_high"], one_seed["p"]) == (None, None, None)
    one_scene = change(figures({"a": 0.1}, {"a": 0.1}), figures({"a": 0.2}, {"a": 0.2}))
    assert (one_scene["low"], one_scene["high"], one_scene["p"]) == (None, None, None)
    assert one_scene["t_low"] == pytest.approx(0.1)


def test_equal_figures_are_no_difference() -> None:
    same = of_array(np.random.default_rng(0).normal(size=(6, 8)))
    found = change(same, same)
    assert [found[name] for name in ("change", "low", "high", "t_low", "t_high", "p")] == [0, 0, 0, 0, 0, 1]


def test_the_interval_over_scenes_is_that_of_their_standard_error() -> None:
    """Seeds that are equal add nothing: mean +- 1.96 s / sqrt n. The bootstrap's own spread is a few per cent."""
    gains = np.random.default_rng(0).normal(0.01, 0.02, 400)
    zeros, moved = ({str(i): value for i, value in enumerate(values)} for values in (np.zeros(400), gains))
    found = difference(figures(*[zeros] * 3), figures(*[moved] * 3), "boundary_f1")
    assert found is not None
    half = 1.96 * gains.std() / 20
    assert found["low"] == pytest.approx(gains.mean() - half, abs=0.1 * half)
    assert found["high"] == pytest.approx(gains.mean() + half, abs=0.1 * half)


def test_the_interval_over_seeds_is_that_of_their_spread() -> None:
    """Scenes that are equal add nothing: the mean of 40 draws from the seeds' changes."""
    gains = np.random.default_rng(0).normal(0.01, 0.02, 40)
    seeds = [dict.fromkeys(map(str, range(50)), gain) for gain in gains]
    found = difference(figures(*[dict.fromkeys(map(str, range(50)), 0.0)] * 40), figures(*seeds), "boundary_f1")
    assert found is not None
    half = 1.96 * gains.std() / 40**0.5
    assert found["high"] - found["low"] == pytest.approx(2 * half, rel=0.1)


def test_expert_shares_are_sorted_within_each_seed() -> None:
    """Which expert is the most used is chance: 0.7 of the first seed and 0.9 of the second belong together."""
    seeds = [
        {"a": {"expert_share_0": 0.7, "expert_share_1": 0.3}},
        {"a": {"expert_share_0": 0.1, "expert_share_1": 0.9}},
    ]
    assert expert_shares(seeds) == pytest.approx([0.8, 0.2])
    assert expert_shares([{"a": {"abs_rel": 0.1}}]) is None


def test_curves_become_means_of_equal_parts() -> None:
    assert windows(np.array([1.0, 3, 5, 7]), 2) == [2, 6]
    assert windows(np.array([1.0, 2]), 60) == [1, 2]


@pytest.mark.parametrize("offset", [0, -9], ids=["positive", "negative"])
def test_the_last_fifth_is_a_share_of_the_whole_fall_whatever_the_losss_sign(offset: float) -> None:
    """10, 7, 4, 2, 1 falls by 9 in all, by 1 at last; a likelihood's negative logarithm may do so below 0."""
    assert last_fifth(np.array([10.0, 7, 4, 2, 1]) + offset) == pytest.approx(1 / 9)
    assert last_fifth(np.array([10.0, 7, 4, 1, 2]) + offset) == pytest.approx(-1 / 8)
    assert last_fifth(np.array([1.0, 1, 1, 1, 1]) + offset) is None
    assert last_fifth(np.array([1.0, 2, 3, 4, 5]) + offset) is None


def test_four_steps_have_no_last_fifth() -> None:
    assert last_fifth(np.array([9.0, 8, 7, 6])) is None


def test_holms_correction_by_hand() -> None:
    """Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, none below the one before."""
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1, 1]


def equal_heads(stream: np.random.Generator, seeds: int, of_seed: float, of_scene: float) -> Figures:
    """A head that is as good as any other: weights are lucky on all scenes, and each head on some of the scenes."""
    luck = stream.normal(0, of_seed, (seeds, 1)) + stream.normal(0, of_scene, (1, 24))
    return of_array(0.3 + luck + stream.normal(0, 0.002, (seeds, 24)))


@pytest.mark.parametrize("seeds", [3, 6])
@pytest.mark.parametrize(("of_seed", "of_scene"), [(0.01, 0.003), (0.003, 0.02)], ids=["seeds differ", "scenes differ"])
def test_equal_heads_are_seldom_told_apart(seeds: int, of_seed: float, of_scene: float) -> None:
    """5 % of 300, give or take three standard deviations of 1.3 %; the percentiles of 24 scenes add one per cent."""
    stream = np.random.default_rng(3)
    p = []
    for _ in range(300):
        one, other = (equal_heads(stream, seeds, of_seed, of_scene) for _ in range(2))
        p.append(change(one, other)["p"])
    assert np.mean(np.array(p) < 0.05) <= 0.1


HEADS = ("single", "narrow", "wide", "moe4", "moe4-entropy")


def compared(stream: np.random.Generator, gain: float = 0.0) -> dict[str, Any]:
    """Six seeds of equal heads, but for a gain of the experts in boundary F1."""

    def result(name: str, scores: Mapping[str, Figures], seed: int) -> HeadResult:
        gate = {"gate_entropy": 1.0, "effective_experts": 3.0, "expert_share_0": 0.2, "expert_share_1": 0.8}
        is_gated = name.startswith("moe")
        return HeadResult(
            {"depth": np.linspace(1, 0.1, 10)},
            {
                split: {
                    scene: {
                        "boundary_f1": measures["boundary_f1"] + gain * is_gated,
                        "abs_rel": measures["boundary_f1"] / 3,
                        **(gate if is_gated else {}),
                    }
                    for scene, measures in of_split[seed].items()
                }
                for split, of_split in scores.items()
            },
        )

    results: dict[str, Sequence[HeadResult]] = {}
    for name in HEADS:
        scores = {split: equal_heads(stream, 6, 0.01, 0.01) for split in ("test-seeds", "test-kinds")}
        results[name] = [result(name, scores, seed) for seed in range(6)]
    rates = {name: {"tried": [{"learning_rate": 1e-3, "abs_rel": 0.1}], "chosen": 1e-3} for name in HEADS}
    return comparison(results, rates, "l2", Plan(), {"experts": None})


def primary(found: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """By split and reference."""
    return {
        (split, reference): changes["boundary_f1"]
        for split, of_split in found["differences"].items()
        for reference, heads in of_split.items()
        for name, changes in heads.items()
        if name == "moe4"
        if changes["boundary_f1"]["primary"]
    }


def test_the_primary_differences_are_six_and_corrected_by_holm() -> None:
    found = compared(np.random.default_rng(0), gain=0.03)
    of_primary = primary(found)
    assert set(of_primary) == {(s, r) for s in ("test-seeds", "test-kinds") for r in ("single", "narrow", "wide")}
    assert [change["p_adjusted"] for change in of_primary.values()] == pytest.approx(
        holm([change["p"] for change in of_primary.values()])
    )
    assert {change["verdict"] for change in of_primary.values()} == {"better"}
    others = [
        c for heads in found["differences"]["test-seeds"].values() for m in heads.values() for c in m.values() if c
    ]
    assert sum(change["primary"] for change in others) == 3


def test_any_primary_verdict_about_equal_heads_is_rare() -> None:
    """At most 5 % of 40, give or take three standard deviations of 3.4 %: 6. Without a correction it is some 10."""
    stream = np.random.default_rng(0)
    found = [primary(compared(stream)).values() for _ in range(40)]
    wrong = sum(any(change["verdict"] != "no clear difference" for change in changes) for changes in found)
    uncorrected = sum(any(change["p"] < 0.05 for change in changes) for changes in found)
    assert wrong <= 6 < uncorrected


def test_secondary_differences_are_corrected_together() -> None:
    """One lucky p of 1 % among many is none that counts."""
    found = compared(np.random.default_rng(1))
    changes = [
        change
        for of_split in found["differences"].values()
        for heads in of_split.values()
        for measures in heads.values()
        for change in measures.values()
        if change and not change["primary"]
    ]
    assert any(change["p"] < 0.05 for change in changes)
    assert all(change["p_adjusted"] >= change["p"] for change in changes)
    assert {change["verdict"] for change in changes} == {"no clear difference"}


@pytest.mark.parametrize(("key", "verdict"), [("boundary_f1", "better"), ("abs_rel", "worse")])
def test_which_way_is_better_is_the_measures(key: str, verdict: str) -> None:
    less, more = (of_array(np.full((6, 8), value), key) for value in (0.1, 0.2))
    found = change(less, more, key)
    statistics._judge({"test-seeds": {"single": {"moe4": {key: found}}}})
    assert found["verdict"] == verdict

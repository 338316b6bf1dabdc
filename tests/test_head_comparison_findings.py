"""Statistics over seeds and scenes by hand, and the sentences of a finding for planted numbers in both directions."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from moe3d_deploy.benchmarks import head_findings
from moe3d_deploy.benchmarks.head_report import HeadResult, comparison
from moe3d_deploy.benchmarks.head_statistics import difference, expert_shares, last_fifth, summary, windows
from moe3d_deploy.benchmarks.head_variants import Plan
from moe3d_deploy.evaluation.scenes import HELD_OUT

HEADS = ("single", "narrow", "wide", "moe4", "moe4-entropy")
SEEDS, SCENES = 3, 16
BASE = {
    "abs_rel": 0.1, "delta1": 0.9, "boundary_f1": 0.3, "boundary_precision": 0.3, "boundary_recall": 0.3,
    "edge_miou": 0.5, "flying": 0.02,
}  # fmt: skip
GATE = {"gate_entropy": 1.0, "effective_experts": 3.0, "expert_share_0": 0.2, "expert_share_1": 0.8}


def figures(*seeds: Mapping[str, float], key: str = "boundary_f1") -> list[dict[str, dict[str, float]]]:
    return [{scene: {key: value} for scene, value in seed.items()} for seed in seeds]


def planted(change: Callable[[str, int, str], float], key: str = "boundary_f1", seeds: int = SEEDS) -> dict[str, Any]:
    """A comparison in which scenes differ much, and heads by `change` (head, seed, split) of one measure."""
    stream = np.random.default_rng(1)
    hardness = stream.normal(0, 0.05, SCENES)

    def scores(head: str, seed: int) -> dict[str, Any]:
        gate = GATE if head.startswith("moe") else {}
        if head == "moe4-entropy":
            gate = {**gate, "gate_entropy": 0.4, "expert_share_0": 0.1, "expert_share_1": 0.9}
        return {
            split: {
                str(i): {**BASE, **gate, key: BASE[key] + hardness[i] + change(head, seed, split)}
                for i in range(SCENES)
            }
            for split in HELD_OUT
        }

    curve = {"depth": np.linspace(1, 0.1, 100).astype(np.float32)}
    results = {
        head: [
            HeadResult(curve | ({"entropy": curve["depth"]} if head.startswith("moe") else {}), scores(head, seed))
            for seed in range(seeds)
        ]
        for head in HEADS
    }
    return comparison(results, "l2", Plan(entropy_weight=5e-4))


def sentence(found: dict[str, Any], start: str) -> str:
    (text,) = (text for text in found["finding"] if text.startswith(start))
    return str(text)


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


def test_an_equal_gain_everywhere_is_clear_however_much_scenes_differ() -> None:
    reference = figures({"a": 0.1, "b": 0.9}, {"a": 0.2, "b": 0.7})
    better = figures({"a": 0.11, "b": 0.91}, {"a": 0.21, "b": 0.71})
    found = difference(reference, better, "boundary_f1")
    assert found is not None
    assert [found["change"], found["low"], found["high"], *found["per_seed"]] == pytest.approx([0.01] * 5)
    assert found["verdict"] == "better"
    backwards = difference(better, reference, "boundary_f1")
    assert backwards is not None
    assert backwards["verdict"] == "worse"


@pytest.mark.parametrize(("key", "verdict"), [("flying", "worse"), ("abs_rel", "worse"), ("delta1", "better")])
def test_which_way_is_better_is_the_measures(key: str, verdict: str) -> None:
    found = difference(
        figures({"a": 0.1, "b": 0.2}, {"a": 0.1, "b": 0.2}, key=key),
        figures({"a": 0.2, "b": 0.3}, {"a": 0.2, "b": 0.3}, key=key),
        key,
    )
    assert found is not None
    assert found["verdict"] == verdict


def test_seeds_that_disagree_are_not_clear() -> None:
    reference = figures(*({str(i): 0.0 for i in range(9)} for _ in range(5)))
    gains = (0.1, 0.1, 0.1, 0.1, -0.001)  # the interval excludes 0, one seed does not
    found = difference(reference, figures(*({str(i): gain for i in range(9)} for gain in gains)), "boundary_f1")
    assert found is not None
    assert found["low"] > 0
    assert found["verdict"] == "no clear difference"


def test_a_single_seed_is_never_clear_and_a_single_scene_has_no_interval() -> None:
    one_seed = difference(figures({"a": 0.1, "b": 0.2}), figures({"a": 0.2, "b": 0.3}), "boundary_f1")
    assert one_seed is not None
    assert one_seed["low"] == pytest.approx(0.1)
    assert one_seed["verdict"] == "no clear difference"
    one_scene = difference(figures({"a": 0.1}, {"a": 0.1}), figures({"a": 0.2}, {"a": 0.2}), "boundary_f1")
    assert one_scene is not None
    assert (one_scene["low"], one_scene["high"], one_scene["verdict"]) == (None, None, "no clear difference")


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
    assert last_fifth(np.array([9.0, 9, 9, 8, 6])) == pytest.approx(-0.25)
    assert last_fifth(np.array([9.0, 9])) is None


def test_a_gain_over_both_single_heads_is_said() -> None:
    found = planted(lambda head, seed, split: 0.02 * head.startswith("moe"))
    assert sentence(found, "Boundary F1 of 4 experts against VGGT's single head") == (
        "Boundary F1 of 4 experts against VGGT's single head, +0.0200 to +0.0200: better in 4 of 4 comparisons (with "
        "and without entropy loss, held-out seeds and kinds): the paper's claim of sharper boundaries holds here."
    )
    assert sentence(found, "Boundary F1 of 4 experts against a single head of as many FLOPs").endswith(
        "better in 4 of 4 comparisons (with and without entropy loss, held-out seeds and kinds): experts do more than "
        "the same FLOPs in one wider branch."
    )
    assert sentence(found, "AbsRel of 4 experts against VGGT's single head").endswith(
        "no clear difference in 4 of 4 comparisons (with and without entropy loss, held-out seeds and kinds): the "
        "paper's claim of smaller errors of depth is not borne out here."
    )


def test_a_loss_is_said_as_well() -> None:
    found = planted(lambda head, seed, split: -0.02 * head.startswith("moe"))
    assert sentence(found, "Boundary F1 of 4 experts against VGGT's single head").endswith(
        ", -0.0200 to -0.0200: worse in 4 of 4 comparisons (with and without entropy loss, held-out seeds and kinds): "
        "the paper's claim of sharper boundaries does not hold here: rather the contrary."
    )
    assert sentence(found, "Boundary F1 of 4 experts against a single head of as many FLOPs").endswith(
        "the same FLOPs in one wider branch do more than experts."
    )


def test_a_gain_that_width_alone_brings_too_is_not_put_down_to_experts() -> None:
    found = planted(lambda head, seed, split: 0.02 * (head != "single"))
    assert sentence(found, "Boundary F1 of 4 experts against VGGT's").endswith("sharper boundaries holds here.")
    assert sentence(found, "Boundary F1 of 4 experts against a single head of as").endswith(
        "no difference between experts and the same FLOPs in one wider branch can be told."
    )


def test_fewer_flying_points_are_the_better_ones() -> None:
    found = planted(lambda head, seed, split: -0.01 * head.startswith("moe"), "flying")
    text = sentence(found, "Flying points of 4 experts against VGGT's single head")
    assert ", -1.00 pp to -1.00 pp: better in 4 of 4" in text
    assert text.endswith("the paper's claim of fewer flying points holds here.")


@pytest.mark.parametrize(
    ("on_kinds", "single", "wide"),
    [
        (0.0, "holds here in part.", "experts seem to do more, though not in all comparisons."),
        (-0.02, "boundaries holds depends on the comparison.", "which of the two does more depends on the comparison."),
    ],
)
def test_what_holds_on_one_split_alone_is_said_so(on_kinds: float, single: str, wide: str) -> None:
    gains = {"test-seeds": 0.02, "test-kinds": on_kinds}
    found = planted(lambda head, seed, split: gains[split] * head.startswith("moe"))
    assert sentence(found, "Boundary F1 of 4 experts against VGGT's").endswith(single)
    assert sentence(found, "Boundary F1 of 4 experts against a single head of as").endswith(wide)


def test_what_the_entropy_loss_does_is_said() -> None:
    found = planted(lambda head, seed, split: 0.0)
    assert sentence(found, "On held-out kinds the entropy loss") == (
        "On held-out kinds the entropy loss (weight 0.0005) takes the gate's entropy from 1.000 to 0.400 nats (log 4 "
        "is 1.386), the effective number of experts from 3.00 to 3.00, and the share of the most used expert from "
        "80 % to 90 %."
    )


def test_a_budget_that_was_too_small_is_said() -> None:
    """From 1 to 0.1 in a line: means of the last two fifths are 0.3682 and 0.1864, a fall of 49 %."""
    found = planted(lambda head, seed, split: 0.0)
    assert sentence(found, "From the fourth to the last fifth") == (
        "From the fourth to the last fifth of the steps the depth losses changed by -49.4 % to -49.4 %: more steps "
        "might change the ranking."
    )
    for curves in found["training"].values():
        curves["last_fifth"] = [-0.02, 0.01]
    assert head_findings.finding(found)[-1].endswith("by -2.0 % to +1.0 %: they had settled.")
    found["training"]["wide"]["last_fifth"] = [0.08]
    assert head_findings.finding(found)[-1].endswith("differ too much to tell whether the heads had settled.")


def test_a_single_seed_is_said_to_tell_nothing_clear() -> None:
    found = planted(lambda head, seed, split: 0.02 * head.startswith("moe"), seeds=1)
    assert found["finding"][-1] == "Of a single seed no difference counts as clear."
    assert "no clear difference in 4 of 4" in sentence(found, "Boundary F1 of 4 experts against VGGT's")


def test_tables_show_means_spreads_intervals_and_verdicts() -> None:
    report = {"comparisons": [planted(lambda head, seed, split: 0.02 * head.startswith("moe") + 0.001 * seed)]}
    quality = head_findings.quality_table(report)
    (row,) = [line for line in quality.partition("Held-out kinds")[2].splitlines() if line.startswith("| `moe4` ")]
    cells = [cell.strip() for cell in row.split("|")]
    assert cells[2:4] == ["0.1000 ± 0.0000", "90.00 ± 0.00 %"]
    assert cells[4].endswith("± 0.0010")
    assert cells[-2] == "80 / 20 %"
    changes = head_findings.difference_table(report)
    assert "| `single` | `moe4` | +0.0200 (+0.0200 to +0.0200) **+** | +0.00 pp (+0.00 pp to +0.00 pp) |" in changes
    assert "| `moe4` |" in head_findings.training_table(report)

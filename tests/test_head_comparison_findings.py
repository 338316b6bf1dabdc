"""What a comparison of heads says and shows, for planted numbers in both directions."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moe3d_deploy.benchmarks.heads import tables
from moe3d_deploy.benchmarks.heads.findings import finding
from moe3d_deploy.benchmarks.heads.statistics import HeadResult, comparison
from moe3d_deploy.benchmarks.heads.variants import Plan
from moe3d_deploy.evaluation.scenes import HELD_OUT

HEADS = ("single", "narrow", "wide", "moe4", "moe4-entropy")
SEEDS, SCENES = 6, 16
BASE = {
    "abs_rel": 0.1, "delta1": 0.9, "boundary_f1": 0.3, "boundary_precision": 0.3, "boundary_recall": 0.3,
    "edge_miou": 0.5, "flying": 0.02,
}  # fmt: skip
GATE = {"gate_entropy": 1.0, "effective_experts": 3.0, "expert_share_0": 0.2, "expert_share_1": 0.8}
RATES = (7e-4, 2e-3, 5e-3)
MODEL = {"experts": 4}

Change = Callable[[str, int, str], float]


def planted(
    change: Change = lambda head, seed, split: 0.0,
    key: str = "boundary_f1",
    *,
    seeds: int = SEEDS,
    missing: tuple[str, ...] = (),
    heads: tuple[str, ...] = HEADS,
    chosen: float = 2e-3,
    model: dict[str, Any] = MODEL,
) -> dict[str, Any]:
    """A comparison in which scenes differ much, and heads by `change` (head, seed, split) of one measure."""
    hardness = np.random.default_rng(1).normal(0, 0.05, SCENES)

    def scores(head: str, seed: int) -> dict[str, Any]:
        gate = GATE if head.startswith("moe") else {}
        if head == "moe4-entropy":
            gate = {**gate, "gate_entropy": 0.4, "expert_share_0": 0.1, "expert_share_1": 0.9}
        figures = {name: value for name, value in {**BASE, **gate}.items() if name not in missing}
        return {
            split: {
                str(i): {
                    **figures,
                    **({key: BASE[key] + hardness[i] + change(head, seed, split)} if key in figures else {}),
                }
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
        for head in heads
    }
    tried = [{"learning_rate": rate, "abs_rel": 0.1 + abs(rate - chosen)} for rate in RATES]
    rates = {head: {"tried": tried, "chosen": chosen} for head in heads}
    return comparison(results, rates, "l2", Plan(entropy_weight=5e-4), model)


def of_experts(gain: float) -> Change:
    return lambda head, seed, split: gain * head.startswith("moe")


def sentence(found: dict[str, Any], start: str) -> str:
    (text,) = (text for text in found["finding"] if text.startswith(start))
    return str(text)


def test_a_gain_over_every_single_head_is_said() -> None:
    found = planted(of_experts(0.02))
    assert found["finding"][:3] == [
        "Boundary F1 of `moe4` against `narrow` (a branch as wide as one expert, as in the paper): +0.0200 on held-out "
        "seeds (better), +0.0200 on held-out kinds (better); the paper's claim of sharper boundaries holds here.",
        "Boundary F1 of `moe4` against `single` (VGGT's single head): +0.0200 on held-out seeds (better), +0.0200 on "
        "held-out kinds (better); experts do more.",
        "Boundary F1 of `moe4` against `wide` (a single head of as many FLOPs): +0.0200 on held-out seeds (better), "
        "+0.0200 on held-out kinds (better); experts do more.",
    ]
    assert sentence(found, "Secondary, AbsRel") == (
        "Secondary, AbsRel of `moe4`: "
        + "; ".join(
            f"against `{name}` +0.0000 on held-out seeds (no clear difference), +0.0000 on held-out kinds (no clear "
            "difference)"
            for name in ("narrow", "single", "wide")
        )
        + "."
    )


def test_a_loss_is_said_as_well() -> None:
    found = planted(of_experts(-0.02))
    paper, single, wide = found["finding"][:3]
    assert "-0.0200 on held-out seeds (worse)" in paper
    assert paper.endswith("the paper's claim of sharper boundaries does not hold here: rather the contrary.")
    assert single.endswith("experts do less.")
    assert wide.endswith("experts do less.")


def test_equal_heads_bear_nothing_out() -> None:
    paper, single, wide = planted()["finding"][:3]
    assert paper.endswith("the paper's claim of sharper boundaries is not borne out here.")
    assert single.endswith("no difference can be told.")
    assert wide.endswith("no difference can be told.")


def test_a_gain_that_width_alone_brings_too_is_not_put_down_to_experts() -> None:
    found = planted(lambda head, seed, split: 0.02 * (head not in ("single", "narrow")))
    paper, single, wide = found["finding"][:3]
    assert paper.endswith("sharper boundaries holds here.")
    assert single.endswith("experts do more.")
    assert wide.endswith("no difference can be told.")


@pytest.mark.parametrize(
    ("on_seeds", "on_kinds", "paper", "wide"),
    [
        (0.02, 0.0, "holds here in part.", "experts do more, though not clearly on both."),
        (0.02, -0.02, "holds here on one split and fails on the other.", "the two does more depends on the split."),
        (-0.02, 0.0, "does not hold here: rather the contrary.", "experts do less, though not clearly on both."),
    ],
)  # fmt: skip
def test_what_holds_on_one_split_alone_is_said_so(on_seeds: float, on_kinds: float, paper: str, wide: str) -> None:
    gains = {"test-seeds": on_seeds, "test-kinds": on_kinds}
    found = planted(lambda head, seed, split: gains[split] * head.startswith("moe"))
    assert found["finding"][0].endswith(paper)
    assert found["finding"][2].endswith(wide)


def test_a_gain_of_the_head_with_entropy_loss_alone_bears_no_claim_out() -> None:
    found = planted(lambda head, seed, split: 0.02 * (head == "moe4-entropy"))
    assert found["finding"][0].endswith("is not borne out here.")
    assert found["differences"]["test-seeds"]["moe4"]["moe4-entropy"]["boundary_f1"]["verdict"] == "better"


def test_seeds_that_scatter_bear_no_claim_out() -> None:
    """Means of 0.01 with a standard deviation of 0.02 over 6 seeds: t = 1.2."""
    found = planted(lambda head, seed, split: (0.01 + 0.02 * (-1) ** seed) * head.startswith("moe"))
    assert found["finding"][0].endswith(
        "+0.0100 on held-out seeds (no clear difference), +0.0100 on held-out kinds (no clear difference); the paper's "
        "claim of sharper boundaries is not borne out here."
    )


def test_where_experts_are_as_wide_as_vggts_head_that_is_the_papers_pair() -> None:
    found = planted(of_experts(0.02), heads=("single", "wide", "moe4", "moe4-entropy"))
    assert found["finding"][0].startswith(
        "Boundary F1 of `moe4` against `single` (VGGT's single head, as in the paper)"
    )
    assert found["finding"][0].endswith("holds here.")
    assert sum(text.startswith("Boundary F1") for text in found["finding"]) == 2


def test_fewer_flying_points_are_the_better_ones() -> None:
    text = sentence(planted(of_experts(-0.01), "flying"), "Secondary, flying points")
    assert text.startswith("Secondary, flying points of `moe4`: against `narrow` -1.00 pp on held-out seeds (better)")


@pytest.mark.parametrize("seeds", [1, SEEDS])
def test_a_measure_that_no_scene_has_is_said_and_ends_nothing(seeds: int) -> None:
    found = planted(missing=("boundary_f1", "flying"), seeds=seeds)
    assert found["differences"]["test-seeds"]["single"]["moe4"]["boundary_f1"] is None
    assert found["finding"][0].endswith(
        ": no scene has it on held-out seeds, no scene has it on held-out kinds; the paper's claim of sharper "
        "boundaries is not borne out here."
    )
    assert "Secondary, flying points: no scene has it." in found["finding"]
    report = {"plan": {"learning_rates": RATES}, "comparisons": [found]}
    assert "| `single` | `moe4` |  |  | +0.0000" in tables.difference_table(report)
    assert "| `moe4` | 0.1000" in tables.quality_table(report)


def test_nothing_measured_at_all_ends_nothing() -> None:
    found = planted(missing=tuple(BASE))
    assert "Secondary, AbsRel: no scene has it." in found["finding"]


def test_what_the_entropy_loss_does_is_said() -> None:
    found = planted(lambda head, seed, split: 0.0)
    assert sentence(found, "On held-out kinds the entropy loss") == (
        "On held-out kinds the entropy loss (weight 0.0005) takes the gate's entropy from 1.000 to 0.400 nats (log 4 "
        "is 1.386), the effective number of experts from 3.00 to 3.00, and the share of the most used expert from "
        "80 % to 90 %."
    )


def test_features_that_grew_with_experts_are_said_to_favour_them() -> None:
    assert sentence(planted(), "The model has 4 experts") == (
        "The model has 4 experts and a gate of its own, and its features were trained jointly with them, unless only "
        "its head was trained: that favours `moe4`."
    )
    assert sentence(planted(model={"experts": None}), "The features were trained") == (
        "The features were trained jointly with the model's own single head: that favours heads like it."
    )


def test_learning_rates_are_named_and_an_end_of_their_range_is_said() -> None:
    assert sentence(planted(), "Learning rates") == (
        "Learning rates, chosen on validation scenes out of 0.0007, 0.002 and 0.005: `single` 0.002, `narrow` 0.002, "
        "`wide` 0.002, `moe4` 0.002, `moe4-entropy` 0.002."
    )
    found = planted()
    found["rates"]["moe4"] = {**found["rates"]["moe4"], "chosen": 5e-3}
    text = next(text for text in finding(found, MODEL) if text.startswith("Learning rates"))
    assert text.endswith("; for `moe4` that is an end of the range, beyond which there may be a better one.")
    for rates in found["rates"].values():
        rates |= {"tried": [{"learning_rate": 2e-3, "abs_rel": 0.1}], "chosen": 2e-3}
    assert "All heads had the learning rate 0.002: others might change the ranking." in finding(found, MODEL)


def test_what_the_last_fifth_brought_is_said_without_a_verdict() -> None:
    """From 1 to 0.1 in a line of 100: 4 equal parts of the fall from the first fifth's mean to the last's."""
    found = planted()
    assert sentence(found, "The last fifth of the steps") == (
        "The last fifth of the steps brought 25.0 % to 25.0 % of the whole fall of the depth losses, at a learning "
        "rate that goes to nothing: whether more steps change the ranking, only a second run with other --steps can "
        "tell."
    )
    found["training"]["moe4"]["last_fifth"][0] = None
    assert "losses (1 of 30 did not fall at all), at a" in finding(found, MODEL)[-1]
    for curves in found["training"].values():
        curves["last_fifth"] = [None]
    assert finding(found, MODEL)[-1].startswith("The losses did not fall, or the training was too short to tell")


def test_how_sure_a_difference_is_is_said() -> None:
    """10 pairs of heads, 7 measures and 2 splits are 140 differences."""
    assert sentence(planted(), "A difference counts") == (
        "A difference counts where both Student's t and a bootstrap, over 6 seeds and the scenes, exclude 0 at 5 %, "
        "after Holm's correction over the 6 primary differences (of boundary F1, above) or Benjamini and Hochberg's "
        "over the 134 others."
    )
    alone = planted(of_experts(0.02), seeds=1)
    assert "Of a single seed no difference counts as clear." in alone["finding"]
    assert alone["finding"][0].endswith("is not borne out here.")


def table_report() -> dict[str, Any]:
    found = planted(lambda head, seed, split: 0.02 * head.startswith("moe") + 0.001 * seed)
    variant = {"title": "t", "hidden": 16, "flops_per_pixel": 18560, "parameters": 9314, "gate_hidden": 0, "experts": 1,
               "entropy_weight": 0.0}  # fmt: skip
    mixture = {**variant, "experts": 4, "gate_hidden": 16, "flops_per_pixel": 46464}
    return {
        "plan": {"learning_rates": list(RATES)},
        "variants": [{**(mixture if name.startswith("moe") else variant), "name": name} for name in HEADS],
        "comparisons": [found],
    }


def row(table: str, start: str) -> list[str]:
    (line,) = (line for line in table.splitlines() if line.startswith(start))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_tables_show_means_spreads_intervals_and_verdicts() -> None:
    report = table_report()
    cells = row(tables.quality_table(report).partition("Held-out kinds")[2], "| `moe4` ")
    assert cells[1:3] == ["0.1000 ± 0.0000", "90.00 ± 0.00 %"]
    assert cells[3].endswith("± 0.0019")  # of 0 to 5 thousandths: sqrt(3.5)
    assert cells[-1] == "80 / 20 %"
    changes = tables.difference_table(report).partition("Held-out kinds")[0]
    assert row(changes, "| `single` | `moe4` ")[2:4] == [
        "+0.0200 (+0.0200 to +0.0200) (!) **+**", "+0.00 pp (+0.00 pp to +0.00 pp)",
    ]  # fmt: skip
    assert row(changes, "| `single` | `moe4-entropy` ")[2] == "+0.0200 (+0.0200 to +0.0200) **+**"
    assert row(tables.heads_table(report), "| `moe4` ")[2:] == ["4 x 16 + 16", "46,464", "2.50", "9,314", "0"]
    assert row(tables.rates_table(report), "| `wide` ") == ["`wide`", "0.1013", "**0.1000**", "0.1030"]
    assert row(tables.training_table(report), "| `wide` ")[-1] == " / ".join(["25.0"] * 6)
    assert "- Secondary, AbsRel of" in tables.finding_text(report)


def test_the_wider_interval_is_the_one_that_is_shown() -> None:
    report = table_report()
    found = report["comparisons"][0]["differences"]["test-seeds"]["single"]["moe4"]["boundary_f1"]
    found |= {"low": 0.01, "high": 0.05, "t_low": -0.02, "t_high": 0.04}
    assert "| +0.0200 (-0.0200 to +0.0500) (!) **+** |" in tables.difference_table(report)


def test_every_table_has_as_many_cells_in_all_rows() -> None:
    report = table_report()
    shown = copy.deepcopy(report)
    for make in (
        tables.heads_table,
        tables.rates_table,
        tables.training_table,
        tables.quality_table,
        tables.difference_table,
    ):
        for block in make(report).split("\n\n"):
            assert len({line.count("|") for line in block.splitlines()}) == 1
    assert report == shown

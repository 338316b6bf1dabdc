"""What a comparison of depth heads says: sentences made from its numbers. Nothing presupposes a result."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from moe3d_deploy.benchmarks.heads.variants import (
    BETTER,
    EXPERTS,
    MOE,
    MOE_ENTROPY,
    NARROW,
    PRIMARY,
    SINGLE,
    UNCLEAR,
    WIDE,
    WORSE,
    references,
)
from moe3d_deploy.evaluation.measures import measure

SECONDARY = ("flying", "abs_rel")  # measures that a sentence is about
SPLIT_NAMES = {"test-seeds": "held-out seeds", "test-kinds": "held-out kinds"}

Report = Mapping[str, Any]
_IS = {
    NARROW: "a branch as wide as one expert",
    SINGLE: "VGGT's single head",
    WIDE: "a single head of as many FLOPs",
}


def finding(comparison: Report, model: Report) -> list[str]:
    """Sentences about one entry of a report's `comparisons`: the primary comparisons, what else was measured, and what
    bears on how far they go. `model` is the report's.
    """
    return [
        *_primary(comparison),
        *(_secondary(comparison, key) for key in SECONDARY),
        *_entropy(comparison),
        _certainty(comparison),
        _features(model),
        _rates(comparison),
        _budget(comparison),
    ]


def signed(key: str, value: float) -> str:
    """A change; of a share in percentage points."""
    return f"{100 * value:+.2f} pp" if measure(key).unit == "share" else f"{value:+.4f}"


def _primary(comparison: Report) -> Iterator[str]:
    """The first reference is the paper's: what MoE3D has K copies of."""
    name = measure(PRIMARY).name
    for number, reference in enumerate(_references(comparison)):
        changes = _changes(comparison, reference, PRIMARY)
        is_paper = number == 0
        pair = f"{_IS[reference]}, as in the paper" if is_paper else _IS[reference]
        conclusion = _on_claim(changes) if is_paper else _on_pair(changes)
        yield (
            f"{name[0].upper()}{name[1:]} of `{MOE}` against `{reference}` ({pair}): {_told(PRIMARY, changes)}; "
            f"{conclusion}."
        )


def _on_claim(changes: Mapping[str, Report | None]) -> str:
    claim = "the paper's claim of sharper boundaries"
    verdicts = _verdicts(changes)
    if verdicts[BETTER] and verdicts[WORSE]:
        return f"{claim} holds here on one split and fails on the other"
    if verdicts[BETTER] == len(changes):
        return f"{claim} holds here"
    if 2 * verdicts[BETTER] >= len(changes):
        return f"{claim} holds here in part"
    return f"{claim} does not hold here: rather the contrary" if verdicts[WORSE] else f"{claim} is not borne out here"


def _on_pair(changes: Mapping[str, Report | None]) -> str:
    verdicts = _verdicts(changes)
    if verdicts[BETTER] and verdicts[WORSE]:
        return "which of the two does more depends on the split"
    if not verdicts[BETTER] and not verdicts[WORSE]:
        return "no difference can be told"
    does = "experts do more" if verdicts[BETTER] else "experts do less"
    return does if max(verdicts[BETTER], verdicts[WORSE]) == len(changes) else f"{does}, though not clearly on both"


def _secondary(comparison: Report, key: str) -> str:
    against = {reference: _changes(comparison, reference, key) for reference in _references(comparison)}
    parts = [f"against `{name}` {_told(key, changes)}" for name, changes in against.items() if any(changes.values())]
    if not parts:
        return f"Secondary, {measure(key).name}: no scene has it."
    return f"Secondary, {measure(key).name} of `{MOE}`: {'; '.join(parts)}."


def _entropy(comparison: Report) -> Iterator[str]:
    for split, heads in comparison["quality"].items():
        without, with_loss = heads[MOE], heads[MOE_ENTROPY]
        before, after = (head["gate_entropy"]["mean"] for head in (without, with_loss))
        used_before, used_after = (head["effective_experts"]["mean"] for head in (without, with_loss))
        share_before, share_after = (100 * head["expert_shares"][0] for head in (without, with_loss))
        yield (
            f"On {SPLIT_NAMES[split]} the entropy loss (weight {comparison['entropy_weight']:g}) takes the gate's "
            f"entropy from {before:.3f} to {after:.3f} nats (log {EXPERTS} is {np.log(EXPERTS):.3f}), the effective "
            f"number of experts from {used_before:.2f} to {used_after:.2f}, and the share of the most used expert from "
            f"{share_before:.0f} % to {share_after:.0f} %."
        )


def _certainty(comparison: Report) -> str:
    seeds = len(comparison["training"][MOE]["depth"])
    if seeds == 1:
        return "Of a single seed no difference counts as clear."
    found = [change for change in _all_changes(comparison) if change]
    primary = sum(change["primary"] for change in found)
    return (
        f"A difference counts where both Student's t and a bootstrap, over {seeds} seeds and the scenes, exclude 0 at "
        f"5 %, after Holm's correction over the {primary} primary differences (of {measure(PRIMARY).name}, above) "
        f"or Benjamini and Hochberg's over the {len(found) - primary} others."
    )


def _features(model: Report) -> str:
    if model["experts"]:
        return (
            f"The model has {model['experts']} experts and a gate of its own, and its features were trained jointly "
            f"with them, unless only its head was trained: that favours `{MOE}`."
        )
    return "The features were trained jointly with the model's own single head: that favours heads like it."


def _rates(comparison: Report) -> str:
    rates = comparison["rates"]
    tried = sorted({rate["learning_rate"] for of_head in rates.values() for rate in of_head["tried"]})
    if len(tried) == 1:
        return f"All heads had the learning rate {tried[0]:g}: others might change the ranking."
    chosen = ", ".join(f"`{name}` {of_head['chosen']:g}" for name, of_head in rates.items())
    text = f"Learning rates, chosen on validation scenes out of {_list([f'{rate:g}' for rate in tried])}: {chosen}"
    if ends := [f"`{name}`" for name, of_head in rates.items() if of_head["chosen"] in (tried[0], tried[-1])]:
        text += f"; for {_list(ends)} that is an end of the range, beyond which there may be a better one"
    return f"{text}."


def _budget(comparison: Report) -> str:
    """A cosine to almost 0 flattens any loss: flat is no proof of enough."""
    found = [value for curves in comparison["training"].values() for value in curves["last_fifth"]]
    shares = [100 * value for value in found if value is not None]
    if not shares:
        return "The losses did not fall, or the training was too short to tell: its budget may have been too small."
    some = "" if len(shares) == len(found) else f" ({len(found) - len(shares)} of {len(found)} did not fall at all)"
    return (
        f"The last fifth of the steps brought {min(shares):.1f} % to {max(shares):.1f} % of the whole fall of the "
        f"depth losses{some}, at a learning rate that goes to nothing: whether more steps change the ranking, only a "
        "second run with other --steps can tell."
    )


def _references(comparison: Report) -> list[str]:
    return references(comparison["training"])


def _changes(comparison: Report, reference: str, key: str) -> dict[str, Report | None]:
    """From a reference to MOE, by split."""
    differences = comparison["differences"].items()
    return {split: of_split[reference][MOE][key] for split, of_split in differences}


def _all_changes(comparison: Report) -> Iterator[Report | None]:
    for of_split in comparison["differences"].values():
        for heads in of_split.values():
            for changes in heads.values():
                yield from changes.values()


def _verdicts(changes: Mapping[str, Report | None]) -> Counter[str]:
    return Counter(change["verdict"] if change else UNCLEAR for change in changes.values())


def _told(key: str, changes: Mapping[str, Report | None]) -> str:
    parts = [
        f"{signed(key, change['change'])} on {SPLIT_NAMES[split]} ({change['verdict']})"
        if change
        else f"no scene has it on {SPLIT_NAMES[split]}"
        for split, change in changes.items()
    ]
    return ", ".join(parts)


def _list(items: Sequence[str]) -> str:
    """a, b and c"""
    *first, last = items
    return f"{', '.join(first)} and {last}" if first else last

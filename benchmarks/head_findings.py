"""What a comparison of depth heads says: sentences made from its numbers, and its tables. Nothing presupposes a result.

Every function takes the report that `head_comparison` writes, or one entry of its `comparisons`.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from moe3d_deploy.benchmarks.head_statistics import BETTER, UNCLEAR, WORSE
from moe3d_deploy.benchmarks.head_variants import EXPERTS, MOE, MOE_ENTROPY, SINGLE, WIDE
from moe3d_deploy.evaluation.measures import measure

CLAIMS = {"boundary_f1": "sharper boundaries", "flying": "fewer flying points", "abs_rel": "smaller errors of depth"}
ENOUGH = 0.03  # by which a loss may still change from the fourth to the last fifth of the steps

Report = dict[str, Any]
_SPLIT_NAMES = {"test-seeds": "held-out seeds", "test-kinds": "held-out kinds"}
_COLUMNS = ("abs_rel", "delta1", "boundary_f1", "boundary_precision", "boundary_recall", "edge_miou", "flying")
_MARKS = {BETTER: " **+**", WORSE: " **-**", UNCLEAR: ""}


def finding(comparison: Report) -> list[str]:
    """Sentences: every claim of the paper against both single heads, what the entropy loss does, and the budget."""
    sentences = []
    for key, claim in CLAIMS.items():
        sentences += [_against_single(comparison, key, claim), _against_wide(comparison, key)]
    return [*sentences, *_entropy(comparison), _budget(comparison), *_seeds(comparison)]


def finding_text(report: Report) -> str:
    """The sentences of all losses as a list."""
    blocks = []
    for comparison in report["comparisons"]:
        title = f"Trained with the depth loss `{comparison['loss']}`:\n"
        blocks.append("\n".join([title, *(f"- {sentence}" for sentence in comparison["finding"])]))
    return "\n\n".join(blocks)


def heads_table(report: Report) -> str:
    """What the heads are and cost."""
    single = next(head for head in report["variants"] if head["name"] == SINGLE)
    rows = [
        "| head | is | channels | FLOP per pixel | of `single` | parameters | entropy weight |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for head in report["variants"]:
        channels = f"{head['experts']} x {head['hidden']}" if head["experts"] > 1 else str(head["hidden"])
        channels += f" + {head['gate_hidden']}" if head["gate_hidden"] else ""
        weight = f"{head['entropy_weight']:g}" if head["experts"] > 1 else ""
        rows.append(
            f"| `{head['name']}` | {head['title']} | {channels} | {head['flops_per_pixel']:,} "
            f"| {head['flops_per_pixel'] / single['flops_per_pixel']:.2f} | {head['parameters']:,} | {weight} |"
        )
    return "\n".join(rows)


def quality_table(report: Report) -> str:
    """The figures of every head, mean and spread over the seeds; a table per loss and split."""
    gate = ("gate entropy", "effective experts", "pixels by expert, most used first")
    header = ["head", *(measure(key).name for key in _COLUMNS), *gate]
    blocks = []
    for comparison, split in _parts(report):
        lines = [_caption(comparison, split), "", _row(header), _row(["---", *["---:"] * (len(header) - 1)])]
        for name, figures in comparison["quality"][split].items():
            cells = [_mean_spread(figures, key) for key in (*_COLUMNS, "gate_entropy", "effective_experts")]
            shares = " / ".join(f"{100 * share:.0f}" for share in figures["expert_shares"] or [])
            lines.append(_row([f"`{name}`", *cells, f"{shares} %" if shares else ""]))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def difference_table(report: Report) -> str:
    """Changes from both single heads, with intervals; a mark where the verdict is clear."""
    keys = tuple(CLAIMS)
    blocks = []
    for comparison, split in _parts(report):
        lines = [
            _caption(comparison, split), "",
            _row(["from", "to", *(measure(key).name for key in keys)]), _row(["---"] * 2 + ["---:"] * len(keys)),
        ]  # fmt: skip
        for reference, heads in comparison["differences"][split].items():
            for name, changes in heads.items():
                cells = [_change(key, changes[key], interval=True) for key in keys]
                lines.append(_row([f"`{reference}`", f"`{name}`", *cells]))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def training_table(report: Report) -> str:
    """Mean depth loss in each fifth of the steps, over the seeds; and how much it still fell at the end."""
    blocks = []
    for comparison in report["comparisons"]:
        lines = [
            f"Depth loss `{comparison['loss']}`, mean of each fifth of the steps:", "",
            _row(["head", "1", "2", "3", "4", "5", "from 4 to 5"]), _row(["---", *["---:"] * 6]),
        ]  # fmt: skip
        for name, curves in comparison["training"].items():
            mean = np.mean(curves["depth"], axis=0)
            fifths = [float(part.mean()) for part in np.array_split(mean, 5) if len(part)]
            last = [f"{100 * value:+.1f} %" for value in curves["last_fifth"] if value is not None]
            lines.append(_row([f"`{name}`", *(f"{value:.4g}" for value in fifths), " / ".join(last)]))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _against_single(comparison: Report, key: str, claim: str) -> str:
    changes = list(_of_experts(comparison, key, SINGLE))
    verdicts = Counter(change["verdict"] for change in changes)
    if verdicts[BETTER] == len(changes):
        conclusion = f"the paper's claim of {claim} holds here"
    elif verdicts[BETTER] and not verdicts[WORSE]:
        conclusion = f"the paper's claim of {claim} holds here in part"
    elif verdicts[WORSE] and not verdicts[BETTER]:
        conclusion = f"the paper's claim of {claim} does not hold here: rather the contrary"
    elif verdicts[BETTER]:
        conclusion = f"whether the paper's claim of {claim} holds depends on the comparison"
    else:
        conclusion = f"the paper's claim of {claim} is not borne out here"
    return f"{_counted(key, changes, verdicts, 'VGGT' + chr(39) + 's single head')}: {conclusion}."


def _against_wide(comparison: Report, key: str) -> str:
    changes = list(_of_experts(comparison, key, WIDE))
    verdicts = Counter(change["verdict"] for change in changes)
    if verdicts[BETTER] == len(changes):
        conclusion = "experts do more than the same FLOPs in one wider branch"
    elif verdicts[WORSE] == len(changes):
        conclusion = "the same FLOPs in one wider branch do more than experts"
    elif not verdicts[BETTER] and not verdicts[WORSE]:
        conclusion = "no difference between experts and the same FLOPs in one wider branch can be told"
    elif verdicts[BETTER] and verdicts[WORSE]:
        conclusion = "which of the two does more depends on the comparison"
    else:
        does = "experts seem to do more" if verdicts[BETTER] else "one wider branch seems to do more"
        conclusion = f"{does}, though not in all comparisons"
    return f"{_counted(key, changes, verdicts, 'a single head of as many FLOPs')}: {conclusion}."


def _counted(key: str, changes: list[Report], verdicts: Counter[str], reference: str) -> str:
    values = sorted(change["change"] for change in changes)
    least, most = (_signed(key, value) for value in (values[0], values[-1]))
    counts = ", ".join(f"{word} in {verdicts[word]}" for word in (BETTER, WORSE) if verdicts[word])
    unclear = f"no clear difference in {verdicts[UNCLEAR]}" if verdicts[UNCLEAR] else ""
    told = ", ".join(part for part in (counts, unclear) if part)
    name = measure(key).name
    return (
        f"{name[0].upper()}{name[1:]} of {EXPERTS} experts against {reference}, {least} to {most}: {told} of "
        f"{len(changes)} comparisons (with and without entropy loss, held-out seeds and kinds)"
    )


def _entropy(comparison: Report) -> Iterator[str]:
    for split, heads in comparison["quality"].items():
        without, with_loss = heads[MOE], heads[MOE_ENTROPY]
        before, after = (head["gate_entropy"]["mean"] for head in (without, with_loss))
        used_before, used_after = (head["effective_experts"]["mean"] for head in (without, with_loss))
        share_before, share_after = (100 * head["expert_shares"][0] for head in (without, with_loss))
        yield (
            f"On {_SPLIT_NAMES[split]} the entropy loss (weight {comparison['entropy_weight']:g}) takes the gate's "
            f"entropy from {before:.3f} to {after:.3f} nats (log {EXPERTS} is {np.log(EXPERTS):.3f}), the effective "
            f"number of experts from {used_before:.2f} to {used_after:.2f}, and the share of the most used expert from "
            f"{share_before:.0f} % to {share_after:.0f} %."
        )


def _budget(comparison: Report) -> str:
    found = [value for curves in comparison["training"].values() for value in curves["last_fifth"] if value is not None]
    if not found:
        return "The training was too short to tell whether it was long enough."
    enough = "they had settled"
    if max(found) > ENOUGH:
        enough = "the views of the two differ too much to tell whether the heads had settled"
    if min(found) < -ENOUGH:
        enough = "more steps might change the ranking"
    return (
        f"From the fourth to the last fifth of the steps the depth losses changed by {100 * min(found):+.1f} % to "
        f"{100 * max(found):+.1f} %: {enough}."
    )


def _seeds(comparison: Report) -> list[str]:
    seeds = len(next(iter(comparison["training"].values()))["depth"])
    return ["Of a single seed no difference counts as clear."] if seeds == 1 else []


def _of_experts(comparison: Report, key: str, reference: str) -> Iterator[Report]:
    for references in comparison["differences"].values():
        for name in (MOE, MOE_ENTROPY):
            if change := references[reference][name][key]:
                yield change


def _parts(report: Report) -> Iterator[tuple[Report, str]]:
    for comparison in report["comparisons"]:
        for split in comparison["quality"]:
            yield comparison, split


def _caption(comparison: Report, split: str) -> str:
    name = _SPLIT_NAMES[split]
    return f"{name[0].upper()}{name[1:]}, depth loss `{comparison['loss']}`:"


def _mean_spread(figures: Report, key: str) -> str:
    found = figures.get(key)
    if found is None:
        return ""
    share = measure(key).unit == "share"
    scale, digits = (100, 2) if share else (1, 4)
    spread = "" if found["spread"] is None else f" ± {scale * found['spread']:.{digits}f}"
    return f"{scale * found['mean']:.{digits}f}{spread}{' %' if share else ''}"


def _change(key: str, found: Report | None, *, interval: bool) -> str:
    if found is None:
        return ""
    text = _signed(key, found["change"])
    if interval and found["low"] is not None:
        text += f" ({_signed(key, found['low'])} to {_signed(key, found['high'])})"
    return text + _MARKS[found["verdict"]]


def _signed(key: str, value: float) -> str:
    """A change; of a share in percentage points."""
    return f"{100 * value:+.2f} pp" if measure(key).unit == "share" else f"{value:+.4f}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"

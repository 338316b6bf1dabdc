"""The tables of a comparison of depth heads as Markdown: each takes the report that the command writes."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from moe3d_deploy.benchmarks.heads.findings import SECONDARY, SPLIT_NAMES, signed
from moe3d_deploy.benchmarks.heads.variants import BETTER, PRIMARY, SINGLE, UNCLEAR, WORSE
from moe3d_deploy.evaluation.measures import measure

Report = dict[str, Any]
_QUALITY = ("abs_rel", "delta1", "boundary_f1", "boundary_precision", "boundary_recall", "edge_miou", "flying")
_GATE = ("gate entropy", "effective experts", "pixels by expert, most used first")
_MARKS = {BETTER: " **+**", WORSE: " **-**", UNCLEAR: ""}


def heads_table(report: Report) -> str:
    """What the heads are and cost."""
    single = next(head for head in report["variants"] if head["name"] == SINGLE)
    rows = []
    for head in report["variants"]:
        is_mixture = head["experts"] > 1
        channels = f"{head['experts']} x {head['hidden']} + {head['gate_hidden']}" if is_mixture else head["hidden"]
        flops = head["flops_per_pixel"]
        rows.append(
            [f"`{head['name']}`", head["title"], str(channels), f"{flops:,}",
             f"{flops / single['flops_per_pixel']:.2f}", f"{head['parameters']:,}",
             f"{head['entropy_weight']:g}" if is_mixture else ""]
        )  # fmt: skip
    header = ["head", "is", "channels", "FLOP per pixel", f"of `{SINGLE}`", "parameters", "entropy weight"]
    return _table(header, rows, words=2)


def rates_table(report: Report) -> str:
    """AbsRel on the validation scenes by learning rate, that of the chosen one in bold; a table per loss."""
    blocks = []
    for comparison in report["comparisons"]:
        rates = [f"{rate:g}" for rate in report["plan"]["learning_rates"]]
        rows = []
        for name, of_head in comparison["rates"].items():
            cells = []
            for rate in of_head["tried"]:
                text = f"{rate['abs_rel']:.4f}"
                cells.append(f"**{text}**" if rate["learning_rate"] == of_head["chosen"] else text)
            rows.append([f"`{name}`", *cells])
        caption = f"Depth loss `{comparison['loss']}`, AbsRel on validation scenes by learning rate:"
        blocks.append(f"{caption}\n\n{_table(['head', *rates], rows)}")
    return "\n\n".join(blocks)


def training_table(report: Report) -> str:
    """Mean depth loss in each fifth of the steps, over the seeds, and what the last brought; a table per loss."""
    blocks = []
    for comparison in report["comparisons"]:
        rows = []
        for name, curves in comparison["training"].items():
            fifths = [float(part.mean()) for part in np.array_split(np.mean(curves["depth"], axis=0), 5) if len(part)]
            last = [f"{100 * value:.1f}" for value in curves["last_fifth"] if value is not None]
            rows.append([f"`{name}`", *(f"{value:.4g}" for value in fifths), " / ".join(last)])
        caption = f"Depth loss `{comparison['loss']}`, mean of each fifth of the steps:"
        header = ["head", "1", "2", "3", "4", "5", "% of the fall in the last, by seed"]
        blocks.append(f"{caption}\n\n{_table(header, rows)}")
    return "\n\n".join(blocks)


def quality_table(report: Report) -> str:
    """The figures of every head, mean and spread over the seeds; a table per loss and split."""
    header = ["head", *(measure(key).name for key in _QUALITY), *_GATE]
    blocks = []
    for comparison, split in _parts(report):
        rows = []
        for name, figures in comparison["quality"][split].items():
            cells = [_mean_spread(figures, key) for key in (*_QUALITY, "gate_entropy", "effective_experts")]
            shares = " / ".join(f"{100 * share:.0f}" for share in figures["expert_shares"] or [])
            rows.append([f"`{name}`", *cells, f"{shares} %" if shares else ""])
        blocks.append(f"{_caption(comparison, split)}\n\n{_table(header, rows)}")
    return "\n\n".join(blocks)


def difference_table(report: Report) -> str:
    """Changes from every head to those after it with 95 % intervals, each from the lower to the upper end of the two
    kinds of interval; a table per loss and split.
    """
    keys = (PRIMARY, *SECONDARY)
    blocks = []
    for comparison, split in _parts(report):
        rows = [
            [f"`{reference}`", f"`{name}`", *(_change(key, changes[key]) for key in keys)]
            for reference, heads in comparison["differences"][split].items()
            for name, changes in heads.items()
        ]
        header = ["from", "to", *(measure(key).name for key in keys)]
        blocks.append(f"{_caption(comparison, split)}\n\n{_table(header, rows, words=2)}")
    return "\n\n".join([*blocks, "**+** better, **-** worse, nothing: no clear difference; (!) marks what is primary."])


def finding_text(report: Report) -> str:
    """The sentences of all losses as a list."""
    blocks = []
    for comparison in report["comparisons"]:
        title = f"Trained with the depth loss `{comparison['loss']}`:\n"
        blocks.append("\n".join([title, *(f"- {sentence}" for sentence in comparison["finding"])]))
    return "\n\n".join(blocks)


def _parts(report: Report) -> Iterator[tuple[Report, str]]:
    for comparison in report["comparisons"]:
        for split in comparison["quality"]:
            yield comparison, split


def _caption(comparison: Report, split: str) -> str:
    name = SPLIT_NAMES[split]
    return f"{name[0].upper()}{name[1:]}, depth loss `{comparison['loss']}`:"


def _mean_spread(figures: Report, key: str) -> str:
    found = figures.get(key)
    if found is None:
        return ""
    share = measure(key).unit == "share"
    scale, digits = (100, 2) if share else (1, 4)
    spread = "" if found["spread"] is None else f" ± {scale * found['spread']:.{digits}f}"
    return f"{scale * found['mean']:.{digits}f}{spread}{' %' if share else ''}"


def _change(key: str, found: Report | None) -> str:
    if found is None:
        return ""
    text = signed(key, found["change"])
    ends = [found[name] for name in ("low", "t_low", "high", "t_high") if found[name] is not None]
    if ends:
        text += f" ({signed(key, min(ends))} to {signed(key, max(ends))})"
    return text + (" (!)" if found["primary"] else "") + _MARKS[found["verdict"]]


def _table(header: list[str], rows: list[list[str]], words: int = 1) -> str:
    """Columns of numbers, after so many of words."""
    rule = ["---"] * words + ["---:"] * (len(header) - words)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, rule, *rows))

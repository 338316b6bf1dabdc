"""Are an engine's attentions fused? One verdict from up to three sources, and what they say against each other.

The engine inspector tells where there is a GPU, the layers that TensorRT-RTX lists tell without one, and the activation
memory tells for either.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_NAMES = {"inspector": "the engine's inspector", "listing": "the listed layers", "memory": "the activation memory"}


@dataclass(frozen=True)
class Fusion:
    """What is known of the attentions of encoder and aggregator.

    source   what told it: inspector, listing or memory; None where nothing did
    fused    how many are, where the source counts them
    summary  some words for people
    faults   what is not as a 16-bit engine has to be, each a line
    notes    what a float32 engine, whose attention need not be fused, has to say
    """

    source: str | None
    fused: int | None
    summary: str
    faults: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def fusion(
    blocks: int,
    trunk: str,
    *,
    inspector: Mapping[str, Any] | None,
    listed: int | None,
    memory: Sequence[Mapping[str, Any]],
) -> Fusion:
    """The verdict on `blocks` attentions of type `trunk`.

    inspector   what engines.inspector made of the inspector's text; None where it was not asked
    listed      fused kernels among the layers that the builder lists; None where it lists none
    memory      of attention_memory.attention_of_profiles
    """
    if not blocks:
        return Fusion(None, None, "no attention")
    shown = _inspected(inspector, blocks, trunk)
    told = {row["told"] for row in memory}
    by_memory = "in memory" if "in memory" in told else "fused" if told == {"fused"} else None
    verdicts = {
        "inspector": None if shown is None else _verdict(shown, blocks),
        "listing": None if listed is None else _verdict(listed, blocks),
        "memory": by_memory,
    }
    source: str | None
    if shown is not None:
        source, fused, summary = "inspector", shown, f"attention fused {shown} of {blocks} by the inspector"
    elif listed is not None:
        source, fused, summary = "listing", listed, f"attention fused {listed} of {blocks}"
    elif by_memory:
        state = "fused" if by_memory == "fused" else "not fused"
        source, fused, summary = "memory", None, f"attention {state} by its memory"
    else:
        source, fused, summary = None, None, "attention fusion not told"
    against = tuple(_disagreement(verdicts))
    if trunk == "fp32":
        notes = ["attention is not fused: its memory grows with the square of the tokens"] if fused == 0 else []
        return Fusion(source, fused, summary, notes=(*notes, *against))
    return Fusion(source, fused, summary, faults=(*_faults(blocks, shown, listed, memory), *against))


def _inspected(inspector: Mapping[str, Any] | None, blocks: int, trunk: str) -> int | None:
    """How many of the trunk's attentions the inspector shows fused; None where that is not certain.

    The camera head's attentions are float32 in every precision, so those of a float32 trunk are not told from them.
    """
    if not inspector or not inspector["told"]:
        return None
    states = inspector["attentions"].get(trunk, {})
    fused, total = states.get("fused", 0), sum(states.values())
    if total < blocks or fused + states.get("apart", 0) != total:
        return None
    if total == blocks:
        return fused
    return {total: blocks, 0: 0}.get(fused)


def _verdict(fused: int, blocks: int) -> str:
    return "fused" if fused == blocks else "in memory"


def _faults(blocks: int, shown: int | None, listed: int | None, memory: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for found, who in ((shown, "the engine's inspector shows"), (listed, "the compiled engine has")):
        if found is not None and found != blocks:
            yield (
                f"{blocks} attentions are to be fused, {who} {found}, and the others' memory grows "
                "with the square of the tokens: build with another version (TensorRT-RTX 1.7.1 fuses all)"
            )
    for row in memory:
        if row["told"] == "in memory":
            shape, found, most = "x".join(map(str, row["shape"])), row["found"], row["fused"]
            yield (
                f"activation memory at {shape} is {found / 1e6:.0f} MB, where fused attention explains "
                f"{most / 1e6:.0f} MB and attention in memory {row['in_memory'] / 1e6:.0f} MB: build with another "
                "version, or for fewer views"
            )


def _disagreement(verdicts: Mapping[str, str | None]) -> Iterator[str]:
    told = {source: verdict for source, verdict in verdicts.items() if verdict}
    if len(set(told.values())) > 1:
        texts = (f"{_NAMES[source]} {verdict}" for source, verdict in told.items())
        yield f"what tells of the attention disagrees: {', '.join(texts)}: please report it"

"""Whether attention is fused, from the inspector, the listed layers and the memory; the audit says which told it."""

import copy
from typing import Any

import pytest
from audit_facts import FULL, facts, manifest_of
from inspections import FIRST, fused, layer, text_of

from moe3d_deploy.engines.audit import audit, require_audit
from moe3d_deploy.engines.fusion import fusion
from moe3d_deploy.engines.inspector import inspected, not_told
from moe3d_deploy.errors import EngineError

FUSED, IN_MEMORY = ([{"told": told, "shape": [1, 8, 392, 518], "found": 5e9, "fused": 1e9, "in_memory": 6e9}]
                    for told in ("fused", "in memory"))  # fmt: skip
MIX = {"plugin": 0, "function": 3}


def shown(mix: dict[str, int] = MIX, **attentions: dict[str, int]) -> dict[str, Any]:
    """What the inspector tells: type -> states."""
    return {"told": True, "reason": None, "attentions": attentions, "expert_mix": mix}


def audited(inspector: dict[str, Any] | None, listed: int | None = None, **changes: Any) -> dict[str, Any]:
    found = copy.deepcopy(FULL) | {"inspector": inspector}
    found["compiled"] = None if listed is None else {"layers": {}, "fused_attention": listed}
    found["network"] |= changes
    return audit(found, manifest_of("moe3d-1b", "fp16"))


def test_the_audit_tells_attention_from_the_inspector_and_says_so() -> None:
    result = audited(shown(fp16={"fused": 72}, fp32={"apart": 16}))
    assert ", attention fused 72 of 72 by the inspector, not executed" in result["summary"]
    assert (result["attention_source"], result["fused_attention"], result["findings"]) == ("inspector", 72, [])


@pytest.mark.parametrize(
    ("inspector", "listed", "source", "summary"),
    [
        (None, None, None, "attention fusion not told"),
        (None, 72, "listing", "attention fused 72 of 72, not"),
        (not_told("it crashed"), 72, "listing", "attention fused 72 of 72, not"),
        (not_told("it crashed"), None, None, "attention fusion not told"),
        (shown(fp16={"fused": 71, "not told": 1}), None, None, "attention fusion not told"),
        (shown(fp16={"fused": 71}), None, None, "attention fusion not told"),  # the network has 71 of them
        (shown(fp32={"fused": 88}), None, None, "attention fusion not told"),  # of another type
    ],
)
def test_what_is_not_certain_is_not_told_by_the_inspector(
    inspector: dict[str, Any] | None, listed: int | None, source: str | None, summary: str
) -> None:
    result = audited(inspector, listed)
    assert result["attention_source"] == source
    assert summary in result["summary"]
    assert result["findings"] == []


def test_an_engine_with_names_alone_is_never_called_fused() -> None:
    result = audited(inspected(text_of(*(f"_gemm_mha_v2_myl1_{i}" for i in range(72))), ()))
    assert "attention fusion not told" in result["summary"]
    assert result["notes"] == [
        "the engine's inspector tells nothing: it has the layers' names alone: the engine was built without detailed "
        "verbosity"
    ]


def test_an_attention_that_the_inspector_shows_apart_is_refused() -> None:
    found = copy.deepcopy(FULL) | {"inspector": shown(fp16={"fused": 71, "apart": 1}), "compiled": None}
    with pytest.raises(EngineError) as error:
        require_audit(found, manifest_of("moe3d-1b", "fp16"))
    assert str(error.value) == (
        "the engine of moe3d-1b is not the fp16 engine that its bundle promises: 72 attentions are to be fused, the "
        "engine's inspector shows 71, and the others' memory grows with the square of the tokens: build with another "
        "version (TensorRT-RTX 1.7.1 fuses all); or let it stand: --accept attention"
    )


@pytest.mark.parametrize(
    ("states", "memory", "line"),
    [
        ({"fused": 72}, IN_MEMORY, "the engine's inspector fused, the activation memory in memory"),
        ({"fused": 71, "apart": 1}, FUSED, "the engine's inspector in memory, the activation memory fused"),
        ({"fused": 72}, FUSED, None),
        ({"fused": 71, "apart": 1}, IN_MEMORY, None),
        ({"fused": 71, "not told": 1}, IN_MEMORY, None),  # the inspector is not certain
    ],
)
def test_sources_that_disagree_are_reported(states: dict[str, int], memory: Any, line: str | None) -> None:
    faults = fusion(72, "fp16", inspector=shown(fp16=states), listed=None, memory=memory).faults
    said = [fault for fault in faults if "disagrees" in fault]
    assert said == ([f"what tells of the attention disagrees: {line}: please report it"] if line else [])


def test_memory_tells_where_the_inspector_does_not() -> None:
    for memory, summary in ((FUSED, "attention fused by its memory"), (IN_MEMORY, "attention not fused by its memory")):
        verdict = fusion(72, "fp16", inspector=not_told("x"), listed=None, memory=memory)
        assert (verdict.source, verdict.fused, verdict.summary) == ("memory", None, summary)


@pytest.mark.parametrize(
    ("states", "fused_count"),
    [
        ({"apart": 20}, 0),
        ({"fused": 20}, 12),
        ({"fused": 12, "apart": 8}, None),  # which of them are the camera head's is not known
        ({"apart": 19, "not told": 1}, None),
    ],
)
def test_a_float32_trunk_is_told_only_where_the_camera_heads_attention_is_alike(
    states: dict[str, int], fused_count: int | None
) -> None:
    """12 blocks and 8 attentions of the camera head, all of one type."""
    verdict = fusion(12, "fp32", inspector=shown(fp32=states), listed=None, memory=[])
    assert (verdict.fused, verdict.faults) == (fused_count, ())
    assert len(verdict.notes) == (fused_count == 0)


def test_a_part_without_attention_has_nothing_to_tell() -> None:
    assert fusion(0, "fp16", inspector=shown(), listed=0, memory=IN_MEMORY).summary == "no attention"


# The expert mix


def test_the_inspector_has_to_show_what_the_parser_made_of_the_mix() -> None:
    good = shown(fp16={"fused": 72})
    assert audited(good)["findings"] == []
    (finding,) = audited(good | {"expert_mix": {"plugin": 1, "function": 0}})["findings"]
    assert finding["name"] == "expert-mix"
    assert finding["text"] == (
        "the network has the function of ExpertMix, the engine's inspector shows the plugin: please report it"
    )
    plugin = {"functions": {}, "plugins": ("ExpertMix",)}
    assert audited(good | {"expert_mix": {"plugin": 1, "function": 0}}, **plugin)["findings"] == []
    assert audited(good | {"expert_mix": {"plugin": 0, "function": 0}}, **plugin)["findings"] == []  # not told


def test_the_mix_of_the_inspectors_own_text_reaches_the_audit() -> None:
    facts_ = inspected(text_of(fused(FIRST), layer("ExpertMix", "PluginV3", "ExpertMix")), (FIRST,))
    found = facts({"fp16": 72, "fp32": 68}, {"fp16": 32}, None) | {"inspector": facts_}
    names = [finding["name"] for finding in audit(found, manifest_of("moe3d-tiny", "fp16"))["findings"]]
    assert names == ["expert-mix"]  # the network has the function

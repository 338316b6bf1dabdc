"""Whether attention is fused, told from an engine's activation memory: the ranges, and what the audit makes of it.

Real engines of both kinds are told apart in test_memory_engine.py, which builds some.
"""

import copy
from dataclasses import replace
from typing import Any

import pytest
from audit_facts import FULL, POINTS, manifest_of
from manifests import example_manifest

from moe3d_deploy.config import PRESETS
from moe3d_deploy.engines.attention_memory import Forms, attention_of_profiles, forms_of
from moe3d_deploy.engines.audit import require_audit
from moe3d_deploy.errors import EngineError
from moe3d_deploy.manifest import Part, Profile

SHAPE = (1, 8, 392, 518)
PROFILE = Profile(SHAPE, SHAPE, SHAPE)
# 28 x 37 patches, 1 camera and 4 register tokens a view; 16 heads; fp16.
ONE_MAP = 16 * (8 * (28 * 37 + 5)) ** 2 * 2
MEASURED = 1_400_000_000  # docs/costs.md: TensorRT-RTX, moe3d-1b in fp16, fused


@pytest.mark.parametrize(
    ("found", "told"),
    [
        (None, "not told"),
        (255_999_999, "not told"),  # below what predictions are held to
        (256_000_000, "fused"),
        (352_900_000, "fused"),  # 300 MB is 15 % less than 352.94 MB
        (353_000_000, "not told"),
        (521_000_000, "not told"),
        (521_800_000, "in memory"),  # 900 MB less a map of 300 MB are 15 % more than 521.74 MB
        (900_000_000, "in memory"),
        (9_000_000_000, "in memory"),
    ],
)
def test_each_form_explains_its_range_of_figures(found: int | None, told: str) -> None:
    assert Forms(300_000_000, 900_000_000, 300_000_000).told_by(found) == told


@pytest.mark.parametrize("found", [300_000_000, 400_000_000, 700_000_000])
def test_forms_that_predict_much_the_same_tell_nothing(found: int) -> None:
    assert Forms(300_000_000, 505_000_000, 100_000_000).told_by(found) == "not told"  # 352.9 MB and 352.2 MB


def test_the_largest_model_at_eight_views_is_told_apart() -> None:
    forms = forms_of(replace(PRESETS["moe3d-1b"], point_head=False), SHAPE, "fp16")
    assert forms.one_map == ONE_MAP
    assert forms.told_by(MEASURED) == "fused"
    assert forms.told_by(MEASURED + ONE_MAP) == "in memory"
    assert forms.told_by(MEASURED + 2 * ONE_MAP) == "in memory"
    assert forms.told_by(2_270_000_000) == "not told"  # 4,835 MB less one map are 15 % more than 2,275 MB
    assert forms.told_by(2_280_000_000) == "in memory"


def audited(found: list[int], fused: int | None = None, **changes: Any) -> dict[str, Any]:
    facts = copy.deepcopy(FULL) | {"activation_memory_bytes": found}
    facts["compiled"] = None if fused is None else {"layers": {}, "fused_attention": fused}
    return require_audit(facts, manifest_of("moe3d-1b", "fp16", **changes), profiles=[PROFILE])


def test_a_builder_that_lists_no_layers_is_judged_by_its_memory() -> None:
    good = audited([MEASURED])
    assert ", attention fused by its memory, not executed" in good["summary"]
    (row,) = good["attention_memory"]
    assert (row["shape"], row["found"], row["told"]) == ([1, 8, 392, 518], MEASURED, "fused")
    with pytest.raises(EngineError) as error:
        audited([MEASURED + ONE_MAP])
    megabytes = [round(row[key] / 1e6) for key in ("fused", "in_memory")]
    assert str(error.value) == (
        "the engine of moe3d-1b is not the fp16 engine that its bundle promises: activation memory at 1x8x392x518 is "
        f"3619 MB, where fused attention explains {megabytes[0]} MB and attention in memory {megabytes[1]} MB: build "
        "with another version, or for fewer views; or let it stand: --accept attention"
    )


def test_listed_layers_do_not_outweigh_the_memory() -> None:
    assert "attention fused 72 of 72" in audited([MEASURED], 72)["summary"]
    with pytest.raises(EngineError, match="activation memory at 1x8x392x518 is 3619 MB"):
        audited([MEASURED + ONE_MAP], 72)


@pytest.mark.parametrize("found", [[], [1, 2], [200_000_000]])
def test_what_tells_nothing_is_no_finding(found: list[int]) -> None:
    assert "attention fusion not told" in audited(found)["summary"]


def test_float32_attention_is_expected_in_memory() -> None:
    facts = copy.deepcopy(FULL) | {"activation_memory_bytes": [20_000_000_000], "compiled": None}
    facts["network"] |= {"matmul": {"fp32": 548}, "convolution": {"fp32": 32}}
    result = require_audit(facts, manifest_of("moe3d-1b", "fp32"), profiles=[PROFILE])
    assert ", attention not fused by its memory, not executed" in result["summary"]


def test_parts_of_a_split_model_are_judged_by_their_own_attention() -> None:
    """Of a point head or plain experts only the part that has them is left out; heads have no attention."""
    tensors = example_manifest().outputs
    parts = tuple(Part(role, f"{role}.onnx", tensors, tensors) for role in ("aggregator", "heads"))
    manifest = manifest_of("moe3d-1b", "fp16", parts=parts, merged_experts=False)
    forms = forms_of(replace(PRESETS["moe3d-1b"], point_head=False), SHAPE, "fp16", "aggregator")
    assert forms.one_map == ONE_MAP
    (row,) = attention_of_profiles(manifest, [PROFILE], [forms.fused + 2 * ONE_MAP], "aggregator")
    assert (row["fused"], row["told"]) == (forms.fused, "in memory")
    assert attention_of_profiles(manifest, [PROFILE], [MEASURED], "heads") == []
    assert attention_of_profiles(manifest, [PROFILE], [MEASURED], "decoder") == []
    encoder = forms_of(replace(PRESETS["moe3d-1b"], point_head=False), SHAPE, "fp16", "encoder")
    assert encoder.one_map == 8 * 16 * (28 * 37 + 5) ** 2 * 2  # of each view by itself


def test_models_that_the_predictions_leave_a_part_of_out_are_not_judged() -> None:
    tensors = example_manifest().outputs
    part = Part("aggregator", "model.onnx", tensors, tensors)
    for changes in ({"outputs": (*tensors, POINTS)}, {"merged_experts": False}, {"parts": (part,)}):
        manifest = manifest_of("moe3d-1b", "fp16", **changes)
        assert attention_of_profiles(manifest, [PROFILE], [MEASURED]) == []

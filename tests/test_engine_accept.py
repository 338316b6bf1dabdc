"""Findings of the audit that stand because they were named, and those that were not."""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from audit_facts import FULL, facts, manifest_of

from moe3d_deploy.engines.audit import FINDINGS, audit, require_audit
from moe3d_deploy.errors import EngineError, InputError


def test_a_fault_names_the_flag_that_lets_it_stand() -> None:
    found = copy.deepcopy(FULL)
    found["network"]["matmul"] = {"fp32": 548}
    found["compiled"]["fused_attention"] = 71
    manifest = manifest_of("moe3d-1b", "fp16")
    with pytest.raises(EngineError) as error:
        require_audit(found, manifest)
    assert str(error.value).endswith("; or let it stand: --accept matmul-types --accept attention")
    with pytest.raises(EngineError) as error:
        require_audit(found, manifest, accept=["matmul-types"])
    text = str(error.value)
    assert "matmuls" not in text, "what is accepted is no part of the error"
    assert text.endswith("; or let it stand: --accept attention")
    result = require_audit(found, manifest, accept=["attention", "matmul-types"])
    assert [(finding["name"], finding["accepted"]) for finding in result["findings"]] == [
        ("matmul-types", True),
        ("attention", True),
    ]
    assert result["findings"][0]["text"].startswith("fp16 asks for 432 fp16 matmuls and the others in fp32, ")
    assert result["notes"] == []


@pytest.mark.parametrize(
    ("path", "value", "name"),
    [
        ("network.strongly_typed", False, "strong-typing"),
        ("network.matmul", {"fp32": 548}, "matmul-types"),
        ("network.attention", {"fp32": 72}, "attention-types"),
        ("network.convolution", {"fp32": 32}, "convolution-types"),
        ("network.functions", {}, "expert-mix"),
        ("network.plugins", ("Other",), "other-plugin"),
        ("compiled.fused_attention", 0, "attention"),
    ],
)
def test_each_name_lets_its_own_finding_stand_and_no_other(path: str, value: Any, name: str) -> None:
    found = copy.deepcopy(FULL)
    part, key = path.split(".")
    found[part][key] = value
    manifest = manifest_of("moe3d-1b", "fp16")
    assert [each["name"] for each in require_audit(found, manifest, accept=[name])["findings"]] == [name]
    with pytest.raises(EngineError, match=rf"; or let it stand: --accept {name}$"):
        require_audit(found, manifest, accept=set(FINDINGS) - {name})


def test_a_plugin_where_the_function_belongs_is_the_finding_expert_mix() -> None:
    found = facts({"fp16": 432, "fp32": 116}, {"fp16": 32}, 72)
    by = {"built_by": ("tensorrt", "10.16.1.11"), "plugin": True}
    result = require_audit(found, manifest_of("moe3d-1b", "fp16"), accept=["expert-mix"], **by)  # type: ignore[arg-type]
    (finding,) = result["findings"]
    assert finding["text"].startswith("TensorRT 10.16.1.11 takes the plugin of ExpertMix with a plugin library, the ")


def test_a_name_that_was_not_needed_is_a_note() -> None:
    result = require_audit(FULL, manifest_of("moe3d-1b", "fp16"), accept=["attention", "attention"])
    assert result["notes"] == ["--accept attention was not needed"]
    assert result["findings"] == []


def test_a_name_that_does_not_exist_is_an_error_with_those_that_do() -> None:
    with pytest.raises(InputError) as error:
        audit(FULL, manifest_of("moe3d-1b", "fp16"), accept=["attention", "mix"])
    assert str(error.value) == (
        "--accept mix: the audit has no such finding; its findings are strong-typing, matmul-types, attention-types, "
        "convolution-types, expert-mix, other-plugin, attention"
    )


def test_every_finding_is_documented() -> None:
    page = (Path(__file__).parent.parent / "docs" / "engines.md").read_text(encoding="utf-8")
    section = page.partition("### Letting a finding stand")[2].partition("\n#")[0]
    assert re.findall(r"^\| `([a-z-]+)` \|", section, re.M) == list(FINDINGS)

"""The audit against measured figures, the precision policy, exported files and planted faults."""

import copy
import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from audit_facts import FULL, POINTS, facts, manifest_of
from manifests import example_manifest

from moe3d_deploy import trt
from moe3d_deploy.config import PRESETS
from moe3d_deploy.engines.audit import audit, expected, require_audit
from moe3d_deploy.errors import EngineError

# What is right


@pytest.mark.parametrize(
    ("preset", "precision", "found", "summary"),
    [
        ("moe3d-1b", "fp16", FULL, "fp16 matmuls 432 of 548, convolutions 32 of 32, {mix}, attention fused 72 of 72"),
        (
            "moe3d-tiny",
            "fp16",
            facts({"fp16": 72, "fp32": 68}, {"fp16": 32}, 12),
            "fp16 matmuls 72 of 140, convolutions 32 of 32, {mix}, attention fused 12 of 12",
        ),
        (
            "moe3d-tiny",
            "fp16-fp32heads",
            facts({"fp16": 72, "fp32": 68}, {"fp16": 1, "fp32": 31}, 12),
            "fp16 matmuls 72 of 140, convolutions 1 of 32, {mix}, attention fused 12 of 12",
        ),
        (
            "moe3d-tiny",
            "fp32",
            facts({"fp32": 140}, {"fp32": 32}, 0),
            "fp32 matmuls 140 of 140, convolutions 32 of 32, {mix}, attention fused 0 of 12",
        ),
        (
            "moe3d-tiny",
            "fp16",
            facts({"fp16": 72, "fp32": 68}, {"fp16": 32}, None),
            "fp16 matmuls 72 of 140, convolutions 32 of 32, {mix}, attention fusion not told",
        ),
    ],
)
def test_measured_engines_pass_with_one_line(preset: str, precision: str, found: dict[str, Any], summary: str) -> None:
    result = require_audit(found, manifest_of(preset, precision))
    assert result["summary"] == summary.format(mix="ExpertMix as function") + ", not executed"
    assert result["findings"] == []


@pytest.mark.parametrize(
    ("precision", "opset", "matmul", "convolution", "summary"),
    [
        ("bf16", 20, {"bf16": 72, "fp32": 68}, {"fp32": 32}, "bf16 matmuls 72 of 140, fp32 convolutions 32 of 32"),
        (
            "bf16-fp16heads",
            20,
            {"bf16": 72, "fp32": 68},
            {"fp16": 31, "fp32": 1},
            "bf16 matmuls 72 of 140, fp16 convolutions 31 of 32",
        ),
        ("fp16", 23, {"fp16": 48, "fp32": 68}, {"fp16": 32}, "fp16 matmuls 48 of 116, convolutions 32 of 32"),
        ("bf16", 23, {"bf16": 48, "fp32": 68}, {"fp32": 32}, "bf16 matmuls 48 of 116, fp32 convolutions 32 of 32"),
    ],
)
def test_bf16_and_attention_as_one_operator_are_counted(
    precision: str, opset: int, matmul: dict[str, int], convolution: dict[str, int], summary: str
) -> None:
    """moe3d-tiny has 12 blocks; at opset 23 two products of each are inside its attention."""
    attention = {precision[:4]: 12} if opset == 23 else {}
    found = facts(matmul, convolution, 12, attention=attention)
    manifest = manifest_of("moe3d-tiny", precision, opset=opset)
    text = ", ExpertMix as function, attention fused 12 of 12, not executed"
    assert require_audit(found, manifest)["summary"] == summary + text

    other = facts(matmul, convolution, 12, attention={"fp32": 12} if opset == 23 else {"fp16": 12})
    with pytest.raises(EngineError, match=rf"{precision} asks for .* attention operators, the network has 12 fp"):
        require_audit(other, manifest)
    with pytest.raises(EngineError, match="12 attentions are to be fused, the compiled engine has 11"):
        require_audit(facts(matmul, convolution, 11, attention=attention), manifest)
    half = facts({"fp16": matmul[precision[:4]], "fp32": 68}, convolution, 12, attention=attention)
    if precision.startswith("bf16"):
        with pytest.raises(EngineError, match=rf"{precision} asks for {matmul['bf16']} bf16 matmuls and the others in"):
            require_audit(half, manifest)


def test_float32_attention_that_is_not_fused_is_noted() -> None:
    result = require_audit(facts({"fp32": 140}, {"fp32": 32}, 0), manifest_of("moe3d-tiny", "fp32"))
    assert result["notes"] == ["attention is not fused: its memory grows with the square of the tokens"]
    assert require_audit(FULL, manifest_of("moe3d-1b", "fp16"))["notes"] == []


def test_what_the_model_and_its_outputs_add_is_expected() -> None:
    """A branch is a 3x3 and a float32 1x1 convolution: VGGT's head has one, the plain form of 4 experts 5."""
    plain = expected(manifest_of("moe3d-1b", "fp16", merged_experts=False))
    assert (plain.convolutions, plain.expert_mix) == ({"fp16": 31 + 5, "fp32": 5}, 0)
    assert expected(manifest_of("vggt-1b", "fp16")).convolutions == {"fp16": 31 + 1, "fp32": 1}
    outputs = (*example_manifest().outputs, POINTS)
    both = expected(manifest_of("vggt-1b", "fp16", outputs=outputs))
    assert both.convolutions == {"fp16": 31 + 1 + 30 + 1, "fp32": 2}


def test_a_plugin_of_that_name_is_the_mix() -> None:
    found = facts({"fp16": 432, "fp32": 116}, {"fp16": 32}, 72, functions={}, plugins=("ExpertMix",))
    assert "ExpertMix as plugin" in require_audit(found, manifest_of("moe3d-1b", "fp16"))["summary"]


@pytest.mark.parametrize(
    ("plugins", "functions", "merged", "ran"),
    [((), {"ExpertMix": 1}, True, "function"), (("ExpertMix",), {}, True, "plugin"), ((), {}, False, "plain")],
)
def test_the_audit_says_what_ran(plugins: tuple[str, ...], functions: dict[str, int], merged: bool, ran: str) -> None:
    found = facts({"fp16": 432, "fp32": 116}, {"fp16": 32}, 72, functions=functions, plugins=plugins)
    assert audit(found, manifest_of("moe3d-1b", "fp16", merged_experts=merged))["expert_mix"] == ran


@pytest.mark.parametrize(
    ("built_by", "plugin", "good", "bad"),
    [
        (("tensorrt-rtx", "1.7.1.116"), False, "function", "plugin"),
        (("tensorrt", "10.16.1.11"), False, "function", "plugin"),
        (("tensorrt", "10.16.1.11"), True, "plugin", "function"),
        (("tensorrt", "10.3.0.26"), True, "plugin", "function"),  # the function is taken out there
        (("tensorrt", "10.3.0.26"), False, "function", "plugin"),
    ],
)
def test_what_ran_has_to_be_what_the_parser_takes(built_by: tuple[str, str], plugin: bool, good: str, bad: str) -> None:
    forms: dict[str, Any] = {
        "function": {"functions": {"ExpertMix": 1}},
        "plugin": {"functions": {}, "plugins": ("ExpertMix",)},
    }
    manifest = manifest_of("moe3d-1b", "fp16")

    def found(form: str) -> dict[str, Any]:
        return facts({"fp16": 432, "fp32": 116}, {"fp16": 32}, 72, **forms[form])

    assert require_audit(found(good), manifest, built_by=built_by, plugin=plugin)["expert_mix"] == good
    version, library = re.escape(built_by[1]), "with" if plugin else "without"
    line = f"{version} takes the {good} of ExpertMix {library} a plugin library, the network has the {bad}: build it"
    with pytest.raises(EngineError, match=line):
        require_audit(found(bad), manifest, built_by=built_by, plugin=plugin)


# What is wrong


@pytest.mark.parametrize(
    ("precision", "path", "value", "message"),
    [
        (
            "fp16",
            "network.matmul",
            {"fp32": 548},
            "fp16 asks for 432 fp16 matmuls and the others in fp32, the network has 548 fp32: export the model again",
        ),
        ("fp16", "network.matmul", {"fp16": 426, "fp32": 122}, "the network has 426 fp16, 122 fp32"),
        ("fp16", "network.matmul", {"fp16": 548}, "the network has 548 fp16"),
        ("fp16", "network.matmul", {"fp16": 432, "bf16": 116}, "the network has 116 bf16, 432 fp16"),
        ("fp16", "network.matmul", {}, "the network has none"),
        (
            "fp16",
            "network.convolution",
            {"fp16": 31, "fp32": 1},
            "fp16 asks for 32 fp16 convolutions, the network has 31 fp16, 1 fp32: export the model again",
        ),
        ("fp16-fp32heads", None, None, "asks for 1 fp16, 31 fp32 convolutions, the network has 32 fp16"),
        (
            "fp32",
            None,
            None,
            "fp32 asks for 432 or more matmuls in fp32, the network has 432 fp16, 116 fp32: export the model again; "
            "fp32 asks for 32 fp32 convolutions, the network has 32 fp16",
        ),
        ("fp16", "network.functions", {}, "merged experts ask for 1 ExpertMix, the network has 0: export"),
        ("fp16", "network.functions", {"ExpertMix": 2}, "ask for 1 ExpertMix, the network has 2"),
        ("fp16", "network.plugins", ("ExpertMix",), "ask for 1 ExpertMix, the network has 2"),
        ("fp16", "network.plugins", ("Other",), "layer Other is a plugin, which the model does not ask for"),
        ("fp16", "network.strongly_typed", False, "not strongly typed, so the builder chose the types: use TensorRT"),
        (
            "fp16",
            "compiled.fused_attention",
            71,
            "72 attentions are to be fused, the compiled engine has 71, and the others' memory grows with the square "
            "of the tokens: build with another version (TensorRT-RTX 1.7.1 fuses all)",
        ),
    ],
)
def test_each_fault_says_what_was_asked_what_is_there_and_what_to_do(
    precision: str, path: str | None, value: Any, message: str
) -> None:
    found = copy.deepcopy(FULL)
    if path:
        part, key = path.split(".")
        found[part][key] = value
    with pytest.raises(EngineError) as error:
        require_audit(found, manifest_of("moe3d-1b", precision))
    text = str(error.value)
    start = f"the engine of moe3d-1b is not the {precision} engine that its bundle promises: "
    assert text.startswith(start)
    assert message in text
    assert "\n" not in text
    assert len(text) < 500


def test_a_mix_nobody_asked_for_is_a_fault() -> None:
    """A bundle with plain experts whose file holds merged ones: the convolutions differ, too."""
    with pytest.raises(EngineError, match="a model without merged experts asks for 0 ExpertMix, the network has 1"):
        require_audit(FULL, manifest_of("moe3d-1b", "fp16", merged_experts=False))


def test_an_empty_network_is_no_float32_engine() -> None:
    with pytest.raises(EngineError, match="asks for 432 or more matmuls in fp32, the network has none"):
        require_audit(facts({}, {"fp32": 32}, 0), manifest_of("moe3d-1b", "fp32"))


@pytest.mark.parametrize("missing", ["network", "compiled", "tf32", "executed", "activation_memory_bytes"])
def test_a_report_that_lacks_something_is_refused(missing: str) -> None:
    found = {key: value for key, value in FULL.items() if key != missing}
    with pytest.raises(EngineError, match=rf"moe3d-1b is not complete \('{missing}'\), so it cannot be audited"):
        audit(found, manifest_of("moe3d-1b", "fp16"))


@pytest.mark.parametrize(("part", "key"), [("network", "strongly_typed"), ("network", "matmul")])
def test_a_report_on_the_network_that_lacks_something_is_refused(part: str, key: str) -> None:
    found = copy.deepcopy(FULL)
    del found[part][key]
    with pytest.raises(EngineError, match=rf"not complete \(.*'{key}'\), so it cannot be audited"):
        audit(found, manifest_of("moe3d-1b", "fp16"))


def test_a_precision_without_a_policy_is_refused() -> None:
    with pytest.raises(EngineError, match="no audit knows precision 'int8'; export with one of fp32, fp16, fp16-fp32"):
        audit(FULL, manifest_of("moe3d-1b", "int8"))


# The model, its precision policy and the files that the export writes


@pytest.mark.parametrize("precision", ["fp32", "fp16", "fp16-fp32heads", "bf16", "bf16-fp16heads"])
@pytest.mark.parametrize("preset", PRESETS)
def test_what_is_expected_is_what_the_policy_gives(preset: str, precision: str) -> None:
    torch = pytest.importorskip("torch", reason="counts a model's layers: pip install 'moe3d-deploy[export]'")
    from moe3d_deploy.export.precision import PrecisionPolicy
    from moe3d_deploy.model import MoE3D

    config = PRESETS[preset]
    with torch.device("meta"):
        layers = dict(MoE3D(config).named_modules())
    dtype_of = PrecisionPolicy(precision).dtype_of()

    def count(*kinds: type) -> Counter[str]:
        names = (name for name, layer in layers.items() if isinstance(layer, kinds))
        short = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
        return Counter(short[dtype_of(f"{name}.weight")] for name in names)

    outputs = (*example_manifest().outputs, *([POINTS] if config.point_head else []))
    want = expected(manifest_of(preset, precision, merged_experts=False, outputs=outputs))
    assert want.convolutions == count(torch.nn.Conv2d, torch.nn.ConvTranspose2d)
    linear = count(torch.nn.Linear)  # a block: 4 linear layers, 2 products in its attention
    if precision != "fp32":
        assert 4 * want.products == 6 * linear[want.trunk]
        assert set(linear) == {want.trunk, "fp32"}


@pytest.mark.parametrize("merge", [True, False])
def test_the_networks_of_exported_files_pass(merge: bool) -> None:
    """The fp16 bundle, and a float32 file with plain experts and a point head."""
    pytest.importorskip("tensorrt_rtx", reason="parses for engines: pip install 'moe3d-deploy[rtx]'")
    exports = pytest.importorskip("exports", reason="exports a model: pip install 'moe3d-deploy[export]'")
    manifest = exports.bundle().report.bundle.manifest
    path: Path = exports.bundle().path / manifest.model_file
    promise = "fp32"
    if not merge:
        path, promise = exports.unmerged().path, "fp16"
        outputs = (*manifest.outputs, POINTS)
        manifest = dataclasses.replace(manifest, precision="fp32", merged_experts=False, outputs=outputs)
    found = FULL | {"compiled": None, "network": dataclasses.asdict(parsed_facts(path))}
    summary = require_audit(found, manifest)["summary"]
    # Patch projection and the depth head's 30; then one for all experts, or 2 x 3 for 2 experts and a gate, and the
    # point head's 30 + 2.
    assert ("convolutions 32 of 32" if merge else "convolutions 69 of 69") in summary
    with pytest.raises(
        EngineError, match=rf"is not the {promise} engine that its bundle promises: {promise} asks for "
    ):
        require_audit(found, dataclasses.replace(manifest, precision=promise))


def parsed_facts(path: Path) -> trt.NetworkFacts:
    from moe3d_deploy.trt.network import network_facts, parse
    from moe3d_deploy.trt.watch import Messages

    library = trt.load("tensorrt-rtx")
    with Messages().captured():
        return network_facts(library, parse(library, path)[1])

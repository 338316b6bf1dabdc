"""`moe3d::ExpertMix` in ONNX Runtime, which runs the function body, against the PyTorch formula."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from moe3d_deploy.export.contract import OPSET
from moe3d_deploy.export.expert_mix import DOMAIN, NAME, PLUGIN_ATTRIBUTES, ExpertMixShape, expert_mix_function
from moe3d_deploy.model.experts import expert_mix

# Sums of the same products in another order: a few float32 roundings (6e-8) of values of a few units, then exp,
# whose relative error is the absolute one of its argument.
RELATIVE = 1e-5

OPERANDS = ("hidden", "expert_weight", "expert_bias", "gate_weight", "gate_bias")


@dataclass(frozen=True)
class Case:
    experts: int = 4
    expert_width: int = 8
    gate_width: int = 8
    temperature: float = 1.0
    size: tuple[int, int, int] = (2, 3, 5)  # N, H, W
    half: bool = False
    weights: bool = False

    def __str__(self) -> str:
        n, h, w = self.size
        kind = ("half" if self.half else "float") + ("-weights" if self.weights else "")
        return f"K{self.experts}-Ce{self.expert_width}-Cg{self.gate_width}-t{self.temperature}-{n}x{h}x{w}-{kind}"


CASES = [
    Case(),
    Case(weights=True),
    Case(half=True),
    Case(half=True, weights=True, temperature=0.5),
    Case(experts=1, size=(1, 1, 1), weights=True),
    Case(experts=1, expert_width=32, gate_width=32),
    Case(experts=2, expert_width=1, gate_width=3, size=(3, 7, 1), weights=True),
    Case(experts=3, expert_width=5, gate_width=1, size=(1, 4, 4), temperature=3.0, weights=True),
    Case(experts=8, expert_width=32, gate_width=32, size=(1, 14, 28), temperature=0.1),
    Case(experts=4, expert_width=32, gate_width=32, size=(2, 28, 14), half=True),
]


def session_of(case: Case) -> ort.InferenceSession:
    return _session_of(dataclasses.replace(case, size=(1, 1, 1)))


@functools.cache
def _session_of(case: Case) -> ort.InferenceSession:
    """A model of the one node and its function; N, H, W are symbolic as in an export, so `size` is of no account."""
    shape = ExpertMixShape(case.experts, case.expert_width, case.gate_width, case.weights)
    node = helper.make_node(
        NAME,
        list(OPERANDS),
        list(shape.outputs),
        domain=DOMAIN,
        num_experts=case.experts,
        temperature=case.temperature,
        **PLUGIN_ATTRIBUTES,
    )
    kinds = [TensorProto.FLOAT16 if case.half else TensorProto.FLOAT, *[TensorProto.FLOAT] * 4]
    hidden: list[Any] = ["N", case.experts * case.expert_width + case.gate_width, "H", "W"]
    sizes: list[list[Any]] = [
        hidden,
        [case.experts, 2, case.expert_width],
        [case.experts, 2],
        [case.experts, case.gate_width],
        [case.experts],
    ]
    inputs = [helper.make_tensor_value_info(*each) for each in zip(OPERANDS, kinds, sizes, strict=True)]
    maps: list[list[Any]] = [["N", "H", "W"], ["N", "H", "W"], ["N", case.experts, "H", "W"]]
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, size)
        for name, size in zip(shape.outputs, maps, strict=False)
    ]
    model = helper.make_model(
        helper.make_graph([node], "mix", inputs, outputs),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, 1)],
        functions=[expert_mix_function(shape, OPSET)],
        ir_version=10,
    )
    onnx.checker.check_model(model, full_check=True)
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def operands_of(case: Case) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(case.experts)
    count, height, width = case.size
    channels = case.experts * case.expert_width + case.gate_width
    hidden = np.maximum(rng.standard_normal((count, channels, height, width)), 0)  # it comes out of a ReLU
    return {
        "hidden": hidden.astype(np.float16 if case.half else np.float32),
        "expert_weight": _normal(rng, case.experts, 2, case.expert_width) / np.sqrt(case.expert_width),
        "expert_bias": _normal(rng, case.experts, 2),
        "gate_weight": _normal(rng, case.experts, case.gate_width) / np.sqrt(case.gate_width),
        "gate_bias": _normal(rng, case.experts),
    }


def _normal(rng: np.random.Generator, *shape: int) -> NDArray[np.float32]:
    return rng.standard_normal(shape).astype(np.float32)


def check(case: Case, operands: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Run both, compare, and return what ONNX Runtime gave."""
    operands = {name: value.astype(value.dtype if name == "hidden" else np.float32) for name, value in operands.items()}
    names = [output.name for output in session_of(case).get_outputs()]
    found = dict(zip(names, session_of(case).run(None, operands), strict=True))
    tensors = {name: torch.from_numpy(value) for name, value in operands.items()}
    mixture = expert_mix(**tensors, temperature=case.temperature)
    count, height, width = case.size
    for name in names:
        expected = getattr(mixture, name).numpy()
        assert found[name].dtype == np.float32
        assert found[name].shape == expected.shape
        np.testing.assert_allclose(found[name], expected, rtol=RELATIVE, atol=1e-30, err_msg=name)
    assert found["depth"].shape == (count, height, width)
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_function_computes_the_formula(case: Case) -> None:
    found = check(case, operands_of(case))

    assert ("weights" in found) == case.weights
    if case.weights:
        np.testing.assert_allclose(found["weights"].sum(axis=1), 1, rtol=1e-6)


def test_one_file_serves_every_size() -> None:
    for size in ((1, 1, 1), (5, 2, 3), (1, 42, 14)):
        case = Case(weights=True, size=size)
        assert session_of(case) is session_of(Case(weights=True))
        found = check(case, operands_of(case))
        assert found["weights"].shape == (size[0], 4, *size[1:])


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.01])
def test_extreme_logits_choose_one_expert_without_overflow(half: bool, temperature: float) -> None:
    """exp(1e4) is no float; the softmax subtracts the largest logit first. Divided by 0.01 they are 1e6."""
    case = Case(half=half, temperature=temperature, weights=True)
    operands = operands_of(case) | {"gate_bias": np.array([-1e4, 1e4, 0, -1e4])}

    found = check(case, operands)

    assert np.array_equal(found["weights"][:, 1], np.ones(case.size))
    assert np.array_equal(found["weights"][:, [0, 2, 3]], np.zeros((2, 3, 3, 5)))


@pytest.mark.parametrize("offset", [-80.0, 80.0])
def test_extreme_depths_stay_in_float32(offset: float) -> None:
    """exp(80) = 5.5e34 is finite in float32 and would be infinite in half, exp(-80) zero."""
    case = Case(half=True)
    operands = operands_of(case)
    operands["expert_weight"] = operands["expert_weight"] / 10  # a few units in 80 would be percents of exp's error
    operands["expert_bias"] = np.full((4, 2), offset)

    found = check(case, operands)

    assert np.isfinite(found["depth"]).all()
    assert (found["depth"] > 0).all()


def test_a_large_hidden_map_in_half_is_summed_in_float32() -> None:
    """32 channels of 60,000 pass half's largest number, 65,504, many times over."""
    case = Case(experts=1, expert_width=32, gate_width=32, half=True)
    operands = operands_of(case)
    operands["hidden"] = np.full_like(operands["hidden"], 60000)
    operands["expert_weight"] = np.full((1, 2, 32), 1e-5)

    found = check(case, operands)

    np.testing.assert_allclose(found["depth"], np.exp(19.2 + operands["expert_bias"][0, 0]), rtol=1e-3)


def test_equal_experts_give_that_expert_under_any_gate() -> None:
    case = Case()
    operands = operands_of(case)
    for name in ("expert_weight", "expert_bias"):
        operands[name] = np.repeat(operands[name][:1], 4, axis=0)
    operands["hidden"][:, :32] = np.tile(operands["hidden"][:, :8], (1, 4, 1, 1))

    found = check(case, operands)

    raw = np.einsum("c,nchw->nhw", operands["expert_weight"][0, 0], operands["hidden"][:, :8])
    np.testing.assert_allclose(found["depth"], np.exp(raw + operands["expert_bias"][0, 0]), rtol=RELATIVE)


@pytest.mark.parametrize("with_weights", [False, True])
def test_the_function_is_what_every_parser_can_import(with_weights: bool) -> None:
    """Names prefixed: TensorRT-RTX confuses inner names with outer ones. One opset: that of the model."""
    function = expert_mix_function(ExpertMixShape(4, 32, 32, with_weights), OPSET)

    assert (function.domain, function.name) == ("moe3d", "ExpertMix")
    assert [(entry.domain, entry.version) for entry in function.opset_import] == [("", OPSET)]
    of_plugin = ["with_weights", "plugin_version", "plugin_namespace"]
    assert list(function.attribute) == ["num_experts", "temperature", *of_plugin]
    names = {*function.input, *function.output}
    for node in function.node:
        assert node.domain == ""
        names |= {*node.input, *node.output}
    assert all(name.startswith("moe3d_mix_") for name in names)
    made = [*function.input, *(name for node in function.node for name in node.output)]
    assert len(made) == len(set(made))
    outputs = ["moe3d_mix_depth", "moe3d_mix_confidence"] + ["moe3d_mix_weights"] * with_weights
    assert list(function.output) == outputs


def test_the_nodes_temperature_reaches_the_function() -> None:
    sharp, flat = (check(Case(temperature=t, weights=True), operands_of(Case())) for t in (0.1, 10.0))
    assert sharp["weights"].max(axis=1).mean() > 0.9 > 0.4 > flat["weights"].max(axis=1).mean()

"""The expert-mix kernels' own code, compiled for the CPU, against float64.

All of a kernel runs here but its wide memory accesses, its barrier and the shuffle instruction: docs/plugin.md.
"""

import ctypes
from pathlib import Path

import numpy as np
import pytest
from native_host import NATIVE, mix, run, tool

pytest_plugins = ["native_fixtures"]

ULP = 2.0**-24  # relative rounding error of one float32 operation


def reference(
    hidden: np.ndarray, operands: tuple[np.ndarray, ...], temperature: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """depth, confidence, weights, and the relative error that float32 may have, per pixel; all float64.

    The bound: a sum of n products is off by at most (n + 1) roundings of the sum of their magnitudes; exp turns that
    into a relative error; the softmax has it twice (above and below its fraction line). 16 more for the rest.
    """
    expert_weight, expert_bias, gate_weight, gate_bias = (operand.astype(np.float64) for operand in operands)
    experts, _, width = expert_weight.shape
    x = hidden.astype(np.float64)
    of_experts = x[:, : experts * width].reshape(len(x), experts, width, *x.shape[2:])
    of_gate = x[:, experts * width :]
    raw = np.einsum("koc,nkchw->nkohw", expert_weight, of_experts) + expert_bias[:, :, None, None]
    logits = np.einsum("kc,nchw->nkhw", gate_weight, of_gate) + gate_bias[:, None, None]
    scaled = (logits - logits.max(1, keepdims=True)) / temperature
    weights = np.exp(scaled) / np.exp(scaled).sum(1, keepdims=True)
    depth = (weights * np.exp(raw[:, :, 0])).sum(1)
    confidence = 1 + (weights * np.exp(raw[:, :, 1])).sum(1)

    sums = np.einsum("koc,nkchw->nkohw", abs(expert_weight), abs(of_experts)) + abs(expert_bias)[:, :, None, None]
    gate_sums = np.einsum("kc,nchw->nkhw", abs(gate_weight), abs(of_gate)) + abs(gate_bias)[:, None, None]
    of_raw = (width + 2) * sums.max((1, 2))
    of_logits = (gate_weight.shape[1] + 2) * gate_sums.max(1) / temperature
    return depth, confidence, weights, ULP * (of_raw + 2 * of_logits + 16)


def random_operands(rng: np.random.Generator, experts: int, width: int, gate_width: int) -> tuple[np.ndarray, ...]:
    """Weights that give depths near exp(N(0, 1)) and a gate of which every expert has a part."""
    shapes = ((experts, 2, width), (experts, 2), (experts, gate_width), (experts,))
    scales = (width**-0.5, 0.3, gate_width**-0.5, 0.3)
    return tuple((scale * rng.standard_normal(s)).astype(np.float32) for s, scale in zip(shapes, scales, strict=True))


def random_hidden(rng: np.random.Generator, shape: tuple[int, ...], type_name: str) -> tuple[np.ndarray, np.ndarray]:
    """After a ReLU: as the kernel reads it, and the same values in float32."""
    values = np.maximum(rng.standard_normal(shape), 0).astype(np.float32)
    if type_name == "bfloat16":
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        return bits, (bits.astype(np.uint32) << 16).view(np.float32)
    stored = values.astype(type_name)
    return stored, stored.astype(np.float32)


def assert_close(got: tuple[np.ndarray, ...], expected: tuple[np.ndarray, ...]) -> None:
    depth, confidence, weights, bound = expected
    assert (abs(got[0] - depth) <= bound * depth).all(), abs(got[0] / depth - 1).max()
    assert (abs(got[1] - confidence) <= bound * confidence).all(), abs(got[1] / confidence - 1).max()
    if got[2] is not None:
        assert (abs(got[2] - weights) <= bound[:, None] * weights + ULP).all(), abs(got[2] - weights).max()


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("type_name", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("experts", range(1, 17))
def test_every_number_of_experts_agrees_with_float64(
    host: ctypes.CDLL, experts: int, type_name: str, layout: str
) -> None:
    rng = np.random.default_rng(experts)
    operands = random_operands(rng, experts, 32, 32)
    stored, values = random_hidden(rng, (2, 32 * experts + 32, 6, 14), type_name)
    got = mix(host, stored, operands, type_name=type_name, layout=layout, temperature=0.7)
    assert_close(got, reference(values, operands, 0.7))


# H*W over the edges of vectors (4 pixels), of groups (4), warps (32) and blocks (128, 256, 512), and single pixels.
MAPS = [(1, 1, 1), (3, 1, 5), (5, 2, 2), (2, 7, 7), (1, 16, 16), (3, 11, 23), (2, 16, 32), (1, 18, 29), (2, 28, 38)]


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("type_name", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_every_size_of_map_agrees_with_float64(
    host: ctypes.CDLL, shape: tuple[int, int, int], type_name: str, layout: str
) -> None:
    rng = np.random.default_rng(1)
    operands = random_operands(rng, 3, 16, 8)
    views, height, width = shape
    stored, values = random_hidden(rng, (views, 56, height, width), type_name)
    for with_weights in (False, True):
        got = mix(host, stored, operands, type_name=type_name, layout=layout, with_weights=with_weights)
        assert_close(got, reference(values, operands))


# 8 and 24 leave lanes without channels; 1024 and more do not fit in shared memory and are read in place.
@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("type_name", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("experts", "widths"), [(4, (8, 8)), (2, (24, 40)), (3, (64, 8)), (5, (8, 120)), (4, (1024, 1024))]
)
def test_every_width_agrees_with_float64(
    host: ctypes.CDLL, experts: int, widths: tuple[int, int], type_name: str, layout: str
) -> None:
    rng = np.random.default_rng(2)
    operands = random_operands(rng, experts, *widths)
    stored, values = random_hidden(rng, (1, experts * widths[0] + widths[1], 4, 5), type_name)
    got = mix(host, stored, operands, type_name=type_name, layout=layout)
    assert_close(got, reference(values, operands))


def test_padded_channels_are_not_read(host: ctypes.CDLL) -> None:
    """TensorRT's kHWC16 pads 40 channels to 48; the padding holds NaN here."""
    rng = np.random.default_rng(3)
    operands = random_operands(rng, 4, 8, 8)
    stored, values = random_hidden(rng, (2, 40, 5, 5), "float16")
    got = mix(host, stored, operands, type_name="float16", layout="channels_last", pixel_stride=48)
    assert_close(got, reference(values, operands))


def test_a_map_off_the_vectors_alignment_is_read_element_by_element(host: ctypes.CDLL) -> None:
    rng = np.random.default_rng(4)
    operands = random_operands(rng, 4, 8, 8)
    stored, values = random_hidden(rng, (1, 40, 4, 8), "float16")
    got = mix(host, stored, operands, type_name="float16", hidden_offset=2)
    assert_close(got, reference(values, operands))


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_temperatures_sharpen_and_flatten_the_gate(host: ctypes.CDLL, layout: str) -> None:
    rng = np.random.default_rng(5)
    operands = random_operands(rng, 4, 8, 8)
    stored, values = random_hidden(rng, (1, 40, 4, 4), "float32")
    for temperature in (0.05, 0.5, 2.0, 1000.0):
        got = mix(host, stored, operands, layout=layout, temperature=temperature)
        assert_close(got, reference(values, operands, temperature))
    assert abs(got[2] - 0.25).max() < 1e-2  # at 1000 the gate hardly chooses


def gate_only(biases: list[float]) -> tuple[np.ndarray, ...]:
    """Operands whose logits are `biases` whatever the map holds, and whose expert k gives depth k + 1, confidence 2."""
    experts = len(biases)
    expert_bias = np.stack([np.log(np.arange(1.0, experts + 1)), np.zeros(experts)], 1)
    return np.zeros((experts, 2, 8)), expert_bias, np.zeros((experts, 8)), np.array(biases)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize(
    "biases", [[0.0, 3e38, -3e38], [-3e38, -1e38, -2e38], [1000.0, 2000.0, 0.0], [-1e4, 0.0, -1e4]]
)
def test_extreme_logits_choose_one_expert_exactly(host: ctypes.CDLL, biases: list[float], layout: str) -> None:
    """exp(1000) overflows and exp(-1000) is zero in every one: without subtracting the largest all are NaN."""
    hidden = np.ones((1, 32, 2, 3), np.float32)
    for temperature in (1.0, 1.5e-38):
        depth, confidence, weights = mix(host, hidden, gate_only(biases), layout=layout, temperature=temperature)
        assert (depth == 2).all()
        assert (confidence == 2).all()
        assert (weights == np.array([0, 1, 0])[None, :, None, None]).all()


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_equal_extreme_logits_share_the_weight(host: ctypes.CDLL, layout: str) -> None:
    hidden = np.ones((1, 24, 2, 2), np.float32)
    depth, _, weights = mix(host, hidden, gate_only([3e38, 3e38]), layout=layout)
    assert (weights == 0.5).all()
    assert np.allclose(depth, 1.5, rtol=4 * ULP, atol=0)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
@pytest.mark.parametrize("type_name", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("channel", [0, 17, 39])  # of expert 0, of expert 2, of the gate
def test_a_nan_makes_its_pixel_nan_and_no_other(host: ctypes.CDLL, channel: int, type_name: str, layout: str) -> None:
    """Also where the gate gives the broken expert no weight at all: 0 times NaN."""
    rng = np.random.default_rng(6)
    operands = random_operands(rng, 4, 8, 8)
    operands[3][:] = [0.0, 0.0, 0.0, 500.0]
    stored, values = random_hidden(rng, (2, 40, 3, 4), type_name)
    clean = mix(host, stored, operands, type_name=type_name, layout=layout)
    stored[1, channel, 1, 2] = np.array(0x7FC1, np.uint16) if type_name == "bfloat16" else np.nan
    got = mix(host, stored, operands, type_name=type_name, layout=layout)
    for now, before in zip(got[:2], clean[:2], strict=True):
        broken = np.isnan(now)
        assert broken[1, 1, 2]
        assert broken.sum() == 1
        assert (now[~broken] == before[~broken]).all()
    assert np.isnan(got[2]).sum() == (4 if channel == 39 else 0)


def test_depths_beyond_float32_are_infinite_and_confidence_is_at_least_one(host: ctypes.CDLL) -> None:
    operands = gate_only([0.0, 0.0])
    operands[1][:] = [[100.0, -200.0], [0.0, -200.0]]
    depth, confidence, _ = mix(host, np.ones((1, 24, 2, 2), np.float32), operands)
    assert np.isinf(depth).all()
    assert (confidence == 1).all()


def test_sixteen_bit_values_convert_exactly(host: ctypes.CDLL) -> None:
    """All 65,536 of both types: zeros, subnormals, infinities and NaNs too."""
    bits = np.arange(65536, dtype=np.uint16)
    for brain, expected in (
        (0, bits.view(np.float16).astype(np.float32)),
        (1, (bits.astype(np.uint32) << 16).view(np.float32)),
    ):
        got = np.empty(65536, np.float32)
        host.host_to_float(bits.ctypes.data_as(ctypes.c_void_p), brain, got.ctypes.data_as(ctypes.c_void_p), 65536)
        assert np.array_equal(got, expected, equal_nan=True)
        assert np.array_equal(np.signbit(got), np.signbit(expected))


def test_it_is_the_operator_that_the_model_defines(host: ctypes.CDLL) -> None:
    """The order of channels and operands is `model.experts.expert_mix`'s."""
    torch = pytest.importorskip("torch", reason="the reference model: pip install 'moe3d-deploy[export]'")
    from moe3d_deploy.model.experts import expert_mix

    rng = np.random.default_rng(7)
    operands = random_operands(rng, 4, 16, 8)
    hidden, _ = random_hidden(rng, (2, 72, 5, 6), "float32")
    expected = expert_mix(torch.from_numpy(hidden), *map(torch.from_numpy, operands), 0.8)
    got = mix(host, hidden, operands, temperature=0.8)
    for mine, its in zip(got, expected, strict=False):
        assert np.allclose(mine, its.numpy(), rtol=1e-5, atol=1e-6)  # two float32 sums in different order


def test_no_thread_reads_or_writes_outside_its_tensors(tmp_path: Path) -> None:
    """Every kernel's index arithmetic under AddressSanitizer, in buffers of exactly the tensors' sizes."""
    compiler = tool("g++", "compiles the kernels' code for the CPU")
    program = tmp_path / "bounds"
    sanitizers = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g1")
    run(compiler, "-std=c++17", "-O1", *sanitizers, NATIVE / "tests" / "bounds.cpp", "-o", program)
    assert run(program).endswith("426 mixes within bounds\n")

"""What the plugin accepts from an inference engine, without TensorRT: attributes, types and formats, shapes."""

import ctypes
from typing import Any

import numpy as np
import pytest
from native_host import Sizes

pytest_plugins = ["native_fixtures"]

INT32, INT64, FLOAT32, FLOAT64, OTHER = range(5)
NUMPY = {INT32: np.int32, INT64: np.int64, FLOAT32: np.float32, FLOAT64: np.float64, OTHER: np.uint8}


def read_fields(host: ctypes.CDLL, *fields: tuple[str, int, Any]) -> tuple[list[float], str]:
    """(num_experts, temperature, with_weights) and the error, from (name, kind, values)."""
    count = len(fields)
    data = [np.atleast_1d(np.asarray(values, NUMPY[kind])) for _, kind, values in fields]
    attributes, error = (ctypes.c_double * 3)(), ctypes.create_string_buffer(500)
    host.host_read_fields(
        (ctypes.c_char_p * count)(*(name.encode() for name, _, _ in fields)),
        (ctypes.c_int * count)(*(kind for _, kind, _ in fields)),
        (ctypes.c_void_p * count)(*(values.ctypes.data for values in data)),
        (ctypes.c_int * count)(*(len(values) for values in data)),
        count,
        attributes,
        error,
        len(error),
    )
    return list(attributes), error.value.decode()


def test_attributes_are_read_in_any_numeric_type(host: ctypes.CDLL) -> None:
    for integer in (INT32, INT64):
        for real in (FLOAT32, FLOAT64):
            got, error = read_fields(host, ("num_experts", integer, 4), ("temperature", real, 0.5))
            assert (got, error) == ([4, 0.5, 0], "")
    got, _ = read_fields(host, ("with_weights", INT32, 1), ("temperature", FLOAT32, 1), ("num_experts", INT32, 16))
    assert got == [16, 1, 1]


def test_the_attributes_that_chose_the_plugin_are_let_pass(host: ctypes.CDLL) -> None:
    fields = [("num_experts", INT32, 4), ("temperature", FLOAT32, 1), ("plugin_version", OTHER, 49)]
    assert read_fields(host, *fields, ("plugin_namespace", OTHER, []))[1] == ""


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"num_experts": None}, "attribute num_experts is missing; expected 1 to 16"),
        ({"temperature": None}, "attribute temperature is missing; expected a finite number above 0"),
        ({"num_experts": (INT32, 0)}, "attribute num_experts is 0; expected a whole number from 1 to 16"),
        ({"num_experts": (INT64, 2**40)}, "attribute num_experts is 1099511627776; expected"),
        ({"num_experts": (FLOAT32, 2.5)}, "attribute num_experts is 2.5; expected a whole number"),
        ({"num_experts": (INT32, [4, 4])}, "attribute num_experts is not one number"),
        ({"num_experts": (OTHER, 4)}, "attribute num_experts is not one number"),
        ({"temperature": (FLOAT32, 0.0)}, "attribute temperature is 0; expected a finite number above 0"),
        ({"temperature": (FLOAT32, float("nan"))}, "attribute temperature is nan"),
        ({"temperature": (FLOAT64, 1e300)}, "attribute temperature is 1"),
        ({"with_weights": (INT32, 2)}, "attribute with_weights is 2; expected 0 or 1"),
        ({"experts": (INT32, 4)}, "unknown attribute 'experts'; expected num_experts, temperature, with_weights"),
    ],
    ids=str,
)
def test_wrong_attributes_are_refused_by_name(host: ctypes.CDLL, changed: dict[str, Any], expected: str) -> None:
    fields: dict[str, Any] = {"num_experts": (INT32, 4), "temperature": (FLOAT32, 1.0), **changed}
    _, error = read_fields(host, *((name, *value) for name, value in fields.items() if value))
    assert error.startswith(expected)


LINEAR, HWC, HWC8, HWC16, OTHER_FORMAT = range(5)


def test_types_and_formats_are_those_with_a_kernel(host: ctypes.CDLL) -> None:
    """What TensorRT documents of its formats: kHWC is float32, kHWC8 16 bits, kHWC16 float16 alone."""
    taken = {(t, f) for t in range(-1, 3) for f in range(5) if host.host_supports(0, t, f, 0)}
    fp32, fp16, bf16 = 0, 1, 2
    assert taken == {
        *((fp32, LINEAR), (fp16, LINEAR), (bf16, LINEAR)),
        *((fp32, HWC), (fp16, HWC8), (bf16, HWC8), (fp16, HWC16)),
    }
    for position in range(1, 8):
        taken = {(t, f) for t in range(-1, 3) for f in range(5) if host.host_supports(position, t, f, 1)}
        assert taken == {(fp32, LINEAR)}, position
    assert not host.host_supports(7, fp32, LINEAR, 0)  # the third output that was not asked for
    assert not host.host_supports(8, fp32, LINEAR, 1)
    assert not host.host_supports(-1, fp32, LINEAR, 1)


SHAPES = {
    "hidden": (2, 160, 6, 7),
    "expert_weight": (4, 2, 32),
    "expert_bias": (4, 2),
    "gate_weight": (4, 32),
    "gate_bias": (4,),
}


def read_sizes(host: ctypes.CDLL, changed: dict[str, Any], type_: int = 1, format_: int = LINEAR) -> tuple[Sizes, str]:
    shapes = {**SHAPES, **changed}.values()
    ranks = (ctypes.c_int * len(shapes))(*map(len, shapes))
    flat = (ctypes.c_int64 * (8 * len(shapes)))()
    for i, shape in enumerate(shapes):
        flat[8 * i : 8 * i + len(shape)] = shape
    read, error = Sizes(), ctypes.create_string_buffer(500)
    host.host_read_sizes(ranks, flat, type_, format_, 4, ctypes.byref(read), error, len(error))
    return read, error.value.decode()


def test_sizes_come_from_the_shapes(host: ctypes.CDLL) -> None:
    changed = {"hidden": (2, 88, 6, 7), "expert_weight": (4, 2, 16), "gate_weight": (4, 24)}
    for format_, type_, layout, stride in ((LINEAR, 2, 0, 0), (HWC, 0, 1, 88), (HWC8, 1, 1, 88), (HWC16, 1, 1, 96)):
        read, error = read_sizes(host, changed, type_, format_)
        assert error == ""
        assert (read.type, read.layout, read.pixel_stride) == (type_, layout, stride)
        assert (read.views, read.height, read.width) == (2, 6, 7)
        assert (read.experts, read.expert_width, read.gate_width) == (4, 16, 24)


def test_a_map_whose_size_is_open_is_taken(host: ctypes.CDLL) -> None:
    read, error = read_sizes(host, {"hidden": (-1, 160, -1, -1)})
    assert error == ""
    assert (read.views, read.height, read.width) == (0, 0, 0)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (
            {"hidden": (2, 128, 6, 7)},
            "input hidden is (2, 128, 6, 7); expected (N, 160, H, W), 4 experts of 32 channels and a gate of 32",
        ),
        ({"hidden": (160, 6, 7)}, "input hidden is (160, 6, 7); expected (N, 160, H, W)"),
        ({"hidden": (2, -1, 6, 7)}, "input hidden is (2, ?, 6, 7); expected (N, 160, H, W)"),
        ({"hidden": (2**40, 160, 2**11, 2**11)}, "the tensors are too large"),
        (
            {"expert_weight": (4, 3, 32)},
            "input expert_weight is (4, 3, 32); expected (4, 2, Ce) with Ce a multiple of 8",
        ),
        ({"expert_weight": (4, 2, 12)}, "with Ce a multiple of 8"),
        ({"expert_weight": (3, 2, 32)}, "input expert_weight is (3, 2, 32); expected (4, 2, Ce)"),
        ({"expert_weight": (4, 2, -1)}, "input expert_weight is (4, 2, ?)"),
        ({"expert_bias": (4, 1)}, "input expert_bias is (4, 1); expected (4, 2)"),
        ({"gate_weight": (4, 20)}, "input gate_weight is (4, 20); expected (4, Cg) with Cg a multiple of 8"),
        ({"gate_weight": (4,)}, "input gate_weight is (4)"),
        ({"gate_bias": (5,)}, "input gate_bias is (5); expected (4)"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused_by_input(host: ctypes.CDLL, changed: dict[str, Any], expected: str) -> None:
    assert expected in read_sizes(host, changed)[1]


def test_other_numbers_of_inputs_and_outputs_are_refused(host: ctypes.CDLL) -> None:
    def error(inputs: int, outputs: int, with_weights: int) -> str:
        text = ctypes.create_string_buffer(500)
        host.host_check_counts(inputs, outputs, with_weights, text, len(text))
        return text.value.decode()

    assert (error(5, 2, 0), error(5, 3, 1)) == ("", "")
    assert error(4, 2, 0) == "4 inputs; expected 5: hidden and the four operands"
    assert error(5, 3, 0) == "3 outputs; expected 2 with with_weights=0"
    assert error(5, 2, 1) == "2 outputs; expected 3 with with_weights=1"


def test_a_type_in_a_format_without_kernel_is_refused(host: ctypes.CDLL) -> None:
    assert "in a type or format without a kernel" in read_sizes(host, {}, type_=0, format_=HWC8)[1]


def test_timings_are_shared_by_plugins_with_the_same_kernel(host: ctypes.CDLL) -> None:
    def timing_id(experts: int, temperature: float, with_weights: int) -> str:
        text = ctypes.create_string_buffer(200)
        host.host_timing_id(experts, ctypes.c_float(temperature), with_weights, text, len(text))
        return text.value.decode()

    assert timing_id(4, 1.0, 0) == "moe3d-ExpertMix-K4-weights0-revision1"
    assert timing_id(4, 0.5, 0) == timing_id(4, 1.0, 0)
    assert len({timing_id(4, 1.0, 0), timing_id(5, 1.0, 0), timing_id(4, 1.0, 1)}) == 3

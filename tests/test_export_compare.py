"""Errors between two runs, by hand, and the limits that an export has to keep."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from moe3d_deploy.errors import ExportError
from moe3d_deploy.export.compare import Limits, errors, require_headroom, require_within
from moe3d_deploy.export.precision import PRECISIONS

INF, NAN = math.inf, math.nan


def error_of(found: object, expected: object) -> dict[str, float]:
    arrays = [np.asarray(values, np.float32) for values in (found, expected)]
    return errors({"depth": arrays[0]}, {"depth": arrays[1]})["depth"]


def test_the_three_errors_by_hand() -> None:
    # differences 0, 1, 2, 1 of sizes 1, 2, 8, 5; the largest size is 8, the mean size 4
    error = error_of([1, -3, 6, 6], [1, -2, 8, 5])

    assert error["max"] == 2 / 8
    assert error["mean"] == 1 / 4
    assert error["p99"] == 1 / 2  # of 0, 1/2, 1/4, 1/5


def test_p99_leaves_out_the_worst_hundredth() -> None:
    expected = np.ones(1000, np.float32)
    found = expected.copy()
    found[:9] = 3  # 0.9 % of the values are off by 200 %
    assert error_of(found, expected)["p99"] == 0
    found[:11] = 3
    assert error_of(found, expected)["p99"] == 2


def test_equal_values_have_no_error() -> None:
    assert error_of([0, 1e-30, 5], [0, 1e-30, 5]) == {"max": 0, "mean": 0, "p99": 0}
    assert error_of([[0, 0]], [[0, 0]]) == {"max": 0, "mean": 0, "p99": 0}


def test_a_reference_of_zeros_forgives_nothing() -> None:
    assert error_of([0, 1e-6], [0, 0])["max"] > 1e30


def test_differences_are_taken_in_float64() -> None:
    """float16 or float32 sums would lose a difference this small beside values this large."""
    found, expected = np.full(3, 60000, np.float16), np.full(3, 60001, np.float64)
    error = errors({"depth": found}, {"depth": expected})["depth"]
    assert error["max"] == pytest.approx(1 / 60001, rel=1e-12)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([1, NAN], [1, 2]),
        ([1, 2], [1, NAN]),
        ([1, NAN], [1, NAN]),
        ([1, INF], [1, 2]),
        ([1, 2], [1, INF]),
        ([1, -INF], [1, INF]),
        ([1, NAN], [1, INF]),
        ([INF, INF], [INF, 2]),
    ],
)
def test_a_value_that_is_not_finite_on_one_side_is_an_infinite_error(found: list[float], expected: list[float]) -> None:
    error = error_of(found, expected)
    assert error["max"] == INF
    assert error["mean"] == INF


def test_an_infinity_that_pytorch_has_too_is_no_error() -> None:
    """A field of view of 0 has an infinite focal length; the other values are measured against the finite ones."""
    assert error_of([INF, -INF, 3], [INF, -INF, 2]) == {"max": 1 / 2, "mean": pytest.approx(1 / 2), "p99": 1 / 2}


@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (2, 2), (3,), ()])
def test_another_shape_is_an_infinite_error_even_if_it_broadcasts(shape: tuple[int, ...]) -> None:
    assert error_of(np.ones(shape), np.ones(2)) == {"max": INF, "mean": INF, "p99": INF}


def test_every_output_of_the_reference_is_compared() -> None:
    one: NDArray[np.float32] = np.ones(2, np.float32)
    assert list(errors({"a": one, "b": one, "c": one}, {"b": one, "a": one})) == ["b", "a"]
    with pytest.raises(KeyError):
        errors({"a": one}, {"a": one, "b": one})


def test_the_limits_are_those_that_the_project_promises() -> None:
    """In README and docs. They are not loosened to pass: a larger number here is a decision, not a fix."""
    assert Limits.of("fp32") == Limits({"*": {"max": 5e-5}}, None)
    assert Limits.of("fp16") == Limits({"depth": {"max": 1e-2, "mean": 1e-3}, "*": {"max": 1e-2}}, 0.5)
    assert Limits.of("fp16-fp32heads") == Limits.of("fp16")
    assert Limits.of("bf16-fp16heads") == Limits.of("bf16")


def test_the_limits_of_bf16_are_those_of_half_times_the_ratio_of_their_roundings() -> None:
    """2^-8 to 2^-11, for bfloat16 has 8 bits of significand and half 11."""
    import torch

    ratio = torch.finfo(torch.bfloat16).eps / torch.finfo(torch.float16).eps
    half, brain = Limits.of("fp16"), Limits.of("bf16")
    assert ratio == 8
    for output, bounds in half.errors.items():
        assert brain.errors[output] == pytest.approx({kind: ratio * bound for kind, bound in bounds.items()})
    assert brain.errors.keys() == half.errors.keys()
    assert brain.headroom == half.headroom


def test_int8_has_the_limits_of_bf16() -> None:
    """8 bits of the largest value of a token or a column, where bfloat16 has 8 bits of every value."""
    assert Limits.of("int8").errors == Limits.of("bf16").errors


def test_every_precision_has_limits() -> None:
    for precision in PRECISIONS:
        assert set(Limits.of(precision).errors["*"]) <= {"max", "mean", "p99"}
        assert (Limits.of(precision).headroom is None) == (precision in ("fp32", "int8"))


def within(precision: str, **values: dict[str, float]) -> None:
    require_within("ONNX Runtime at B=1", values, Limits.of(precision), "Try something else")


def error(largest: float, mean: float = 0.0) -> dict[str, float]:
    return {"max": largest, "mean": mean, "p99": 0.0}


def test_errors_at_the_limit_pass() -> None:
    within("fp32", depth=error(5e-5, mean=1.0), intrinsics=error(5e-5))
    within("fp16", depth=error(1e-2, mean=1e-3), intrinsics=error(1e-2, mean=1.0))


@pytest.mark.parametrize(
    ("precision", "values", "message"),
    [
        ("fp32", {"depth": error(5.1e-5)}, "depth is off by 5.1e-05 (max relative), the limit is 5e-05"),
        ("fp32", {"pose_enc": error(6e-5)}, "pose_enc is off by 6e-05 (max relative), the limit is 5e-05"),
        ("fp16", {"depth": error(0.011)}, "depth is off by 0.011 (max relative), the limit is 0.01"),
        ("fp16", {"depth": error(0.001, 0.0011)}, "depth is off by 0.0011 (mean relative), the limit is 0.001"),
        ("fp16", {"depth": error(0), "depth_conf": error(0.02)}, "depth_conf is off by 0.02 (max relative)"),
        ("fp16", {"depth": error(INF)}, "depth is off by inf (max relative)"),
        ("fp16", {"depth": error(NAN)}, "depth is off by nan (max relative)"),
    ],
)
def test_errors_beyond_the_limit_fail(precision: str, values: dict[str, dict[str, float]], message: str) -> None:
    with pytest.raises(ExportError) as caught:
        within(precision, **values)

    text = str(caught.value)
    assert text.startswith(f"verification failed: ONNX Runtime at B=1: {message}")
    assert text.endswith("; nothing was written. Try something else")
    assert "\n" not in text


def test_headroom_up_to_half_of_the_range_passes() -> None:
    require_headroom({"a: mm": 0.5, "b: mm": 0.1}, 0.5, "")
    require_headroom({}, 0.5, "")


@pytest.mark.parametrize(("share", "shown"), [(0.51, "0.51"), (1.0, "1"), (INF, "inf")])
def test_less_headroom_fails_and_names_the_tensor(share: float, shown: str) -> None:
    with pytest.raises(ExportError) as caught:
        require_headroom({"a: mm": 0.1, "depth_head.x: convolution": share, "b: mm": 0.5}, 0.5, "Try something else")

    assert str(caught.value) == (
        f"verification failed: tensor 'depth_head.x: convolution' reaches {shown} of its 16-bit range, the limit is "
        "0.5; nothing was written. Try something else"
    )

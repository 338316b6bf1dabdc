"""The colours of depth maps and of experts' weights."""

import numpy as np
import pytest

from moe3d_deploy.errors import InputError
from moe3d_deploy.runtime.colormaps import colorize, expert_map, inverse_depth, palette, robust_range


def test_the_ends_of_turbo_are_blue_and_red() -> None:
    """Turbo runs from dark blue-violet (48, 18, 59) to dark red (122, 4, 3): the ends of its published table."""
    colors = colorize(np.array([[-5.0, 0.0, 1.0, 9.0]]), lo=0, hi=1)
    assert colors.dtype == np.uint8
    assert colors[0].tolist() == [[48, 18, 59], [48, 18, 59], [122, 4, 3], [122, 4, 3]]


def test_near_depth_is_warm_and_far_depth_cold() -> None:
    depth = np.array([[0.5, 8.0, -1.0]])
    near, far, invalid = colorize(inverse_depth(depth, depth > 0))[0].astype(int)
    assert near[0] > near[2] + 50
    assert far[2] > far[0] + 5
    assert not invalid.any()


def test_outliers_do_not_take_the_color_range() -> None:
    values = np.linspace(0, 1, 10_000)
    values[:100], values[-100:] = -1e30, 1e30
    lo, hi = robust_range(values) or (np.nan, np.nan)
    assert (lo, hi) == pytest.approx((0.02, 0.98), abs=1e-3)  # the percentiles' own values on the ramp


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-45, 3e38, 1e308])
def test_a_constant_map_has_one_middle_color(value: float) -> None:
    with np.errstate(all="raise", under="ignore"):
        colors = colorize(np.full((3, 4), value), colormap="gray")
    assert (colors == 128).all()


def test_the_whole_float_range_is_colored_without_overflow() -> None:
    limit = np.finfo(np.float64).max
    with np.errstate(all="raise"):
        colors = colorize(np.array([[-limit, 0.0, limit]]), lo=-limit, hi=limit, colormap="gray")
    assert colors[0, :, 0].tolist() == [0, 128, 255]


def test_a_map_without_valid_values_is_black() -> None:
    assert robust_range(np.full((2, 2), np.nan)) is None
    assert not colorize(np.full((2, 2), np.nan)).any()
    assert not colorize(np.ones((2, 2)), valid=np.zeros((2, 2), bool)).any()


def test_bad_color_arguments_are_refused() -> None:
    values = np.ones((2, 2))
    with pytest.raises(InputError, match="colormap 'jet' is unknown; choose one of turbo"):
        colorize(values, colormap="jet")
    with pytest.raises(InputError, match="give lo <= hi"):
        colorize(values, lo=1, hi=0)
    with pytest.raises(InputError, match="they must be equal"):
        colorize(values, valid=np.ones(2, bool))


def test_expert_map_shows_the_strongest_expert_as_bright_as_its_weight() -> None:
    weights = np.array([[[1.0, 0.25, 0.5, np.nan]], [[0.0, 0.75, 0.5, 1.0]]])
    colors = expert_map(weights)
    first, second = palette(2)
    assert colors[0, 0].tolist() == first.tolist()
    assert colors[0, 1].tolist() == np.rint(second * 0.75).tolist()
    assert colors[0, 2].tolist() == np.rint(first * 0.5).tolist()  # a tie goes to the first
    assert colors[0, 3].tolist() == [0, 0, 0]


@pytest.mark.parametrize("count", [1, 4, 8, 9, 32])
def test_experts_have_distinct_colors(count: int) -> None:
    assert len({tuple(color) for color in palette(count).tolist()}) == count

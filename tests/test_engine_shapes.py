"""Shape profiles: reading ranges, refusing contradictions, what a profile says of a shape."""

from typing import Any

import pytest

from moe3d_deploy.engines.shapes import ShapeProfile
from moe3d_deploy.errors import InputError


def test_ranges_fill_the_three_shapes() -> None:
    profile = ShapeProfile.from_ranges(batch="1:2", views="1:4:8", height="140:392:518", width="518")
    assert profile.min == (1, 1, 140, 518)
    assert profile.opt == (2, 4, 392, 518)  # min:max tunes for the largest
    assert profile.max == (2, 8, 518, 518)


def test_defaults_are_one_scene_of_up_to_eight_views() -> None:
    profile = ShapeProfile.from_ranges()
    assert (profile.min, profile.opt, profile.max) == ((1, 1, 140, 518), (1, 4, 392, 518), (1, 8, 518, 518))


@pytest.mark.parametrize("text", ["", "a", "1:", ":4", "1:2:3:4", "-1", "1.5", " 4", "+4", "٤", "1e2", "9999999"])
def test_text_that_is_no_range_names_flag_and_form(text: str) -> None:
    with pytest.raises(InputError, match=r"^--views .*expected a number, min:max or min:opt:max") as error:
        ShapeProfile.from_ranges(views=text)
    assert repr(text) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ({"views": "8:4"}, "--views 8:4:4: sizes must rise, min <= opt <= max"),
        ({"views": "1:9:8"}, "--views 1:9:8: sizes must rise, min <= opt <= max"),
        ({"batch": "0"}, "--batch 0: every size must be at least 1"),
        ({"height": "140:390:518"}, "390 is not a multiple of the patch size 14; nearest is 392"),
        ({"width": "520"}, "--width 520: 520 is not a multiple of the patch size 14; nearest is 518"),
        ({"height": "3:518"}, "3 is not a multiple of the patch size 14; nearest is 14"),
    ],
)
def test_contradictions_are_refused_with_the_nearest_valid_value(ranges: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        ShapeProfile.from_ranges(**ranges)
    assert message in str(error.value)


def test_patch_size_sets_the_grid() -> None:
    assert ShapeProfile.from_ranges(height="160", width="320", patch_size=16).opt == (1, 4, 160, 320)
    with pytest.raises(InputError, match="392 is not a multiple of the patch size 16; nearest is 400"):
        ShapeProfile.from_ranges(height="392", width="320", patch_size=16)
    with pytest.raises(InputError, match="patch_size must be a positive integer, got 0"):
        ShapeProfile((1, 1, 14, 14), (1, 1, 14, 14), (1, 1, 14, 14), patch_size=0)


@pytest.mark.parametrize("shape", [(1, 1, 14), (1, 1, 14, 14, 14), (1, 1, 14, 14.0), (1, True, 14, 14), "1144", None])
def test_a_shape_that_is_not_four_integers_is_refused(shape: object) -> None:
    with pytest.raises(InputError, match=r"min must be 4 integers \(batch, views, height, width\)"):
        ShapeProfile(shape, (1, 1, 14, 14), (1, 1, 14, 14))  # type: ignore[arg-type]


def test_dict_form_reads_back_equal() -> None:
    profile = ShapeProfile.from_ranges(views="1:16")
    assert profile.as_dict() == {"min": [1, 1, 140, 518], "opt": [1, 16, 392, 518], "max": [1, 16, 518, 518]}
    assert ShapeProfile.from_dict(profile.as_dict()) == profile


@pytest.mark.parametrize("values", [None, [], {}, {"min": [1, 1, 14, 14], "opt": [1, 1, 14, 14]}])
def test_a_dict_of_another_form_is_refused(values: object) -> None:
    with pytest.raises(InputError, match="expected an object with min, opt and max"):
        ShapeProfile.from_dict(values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "accepted"),
    [
        ((1, 1, 140, 518), True),
        ((1, 8, 518, 518), True),
        ((1, 3, 154, 518), True),
        ((2, 1, 140, 518), False),
        ((1, 9, 140, 518), False),
        ((1, 1, 126, 518), False),
        ((1, 1, 150, 518), False),  # inside, but no multiple of 14
        ((1, 1, 140, 504), False),
        ((1, 1, 140), False),
    ],
)
def test_accepts_the_shapes_between_min_and_max_on_the_patch_grid(shape: tuple[int, ...], accepted: bool) -> None:
    assert ShapeProfile.from_ranges().accepts(shape) is accepted


def test_image_shapes_put_the_channels_where_the_input_has_them() -> None:
    profile = ShapeProfile.from_ranges()
    assert profile.image_shapes() == ((1, 1, 3, 140, 518), (1, 4, 3, 392, 518), (1, 8, 3, 518, 518))
    assert profile.image_shapes(channels_last=True)[1] == (1, 4, 392, 518, 3)

"""Axes that a file fixes: the grammar, and what follows for shapes, ranges, photographs and the verification."""

import dataclasses
import re

import pytest
from exports import MOE

from moe3d_deploy.errors import InputError
from moe3d_deploy.export.static import StaticShape
from moe3d_deploy.export.verify import SHAPES_IN_PATCHES
from moe3d_deploy.manifest import Preprocessing, Range, ShapeRanges

FREE = StaticShape()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1x2x392x518", StaticShape(1, 2, 392, 518)),
        ("?x1x?x?", StaticShape(views=1)),
        ("1x?x392x518", StaticShape(1, None, 392, 518)),
        ("BxSx392x518", StaticShape(None, None, 392, 518)),
    ],
)
def test_sizes_are_read(text: str, expected: StaticShape) -> None:
    assert StaticShape.parse(text) == expected


NO_SHAPES = """
    1 1x2x3 1x2x3x4x5 0x1x14x14 -1x?x?x? 1x?x?x 1,2,14,14 ?x?x1e3x? 01x?x?x? 1x?x9999999x? SxBxHxW
    1xsx14x14 1x1x1x\u00b2
"""


@pytest.mark.parametrize("text", ["", " 1x?x?x?", *NO_SHAPES.split()])
def test_another_grammar_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InputError) as caught:
        StaticShape.parse(text)
    assert str(caught.value) == (
        f"--static {text!r}: expected scenes x views x height x width, BxSxHxW with numbers in place of what is fixed; "
        "for example 1xSx392x518 fixes all but the views"
    )


@pytest.mark.parametrize("text", ["BxSxHxW", "?x?x?x?"])
def test_fixing_nothing_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=f"^--static {re.escape(text)} fixes nothing: leave it out, or give a size; "):
        StaticShape.parse(text)


@pytest.mark.parametrize(
    ("static", "message"),
    [
        (StaticShape(height=100), "height 100 is not a multiple of the patch size 14; nearest is 98"),
        (StaticShape(width=6), "width 6 is not a multiple of the patch size 14; nearest is 14"),
        (StaticShape(views=3, height=28, width=42), None),
        (FREE, None),
    ],
)
def test_sides_are_whole_patches(static: StaticShape, message: str | None) -> None:
    if message is None:
        static.check(14)
        return
    with pytest.raises(InputError) as caught:
        static.check(14)
    assert str(caught.value) == f"--static: {message}"


def test_symbols_become_sizes_and_numbers_stay() -> None:
    static = StaticShape(1, None, 28, 42)
    assert static.bind(("B", "S", 3, "H", "W")) == (1, "S", 3, 28, 42)
    assert static.bind(("B", "S", 2, "H", "W")) == (1, "S", 2, 28, 42)
    assert FREE.bind(("B", "S", 9)) == ("B", "S", 9)


def test_a_fixed_axis_accepts_one_value() -> None:
    free = ShapeRanges.of(MOE)
    assert StaticShape(2, None, 28, None).ranges(free) == ShapeRanges(
        Range(2, 2), Range(1, None), Range(28, 28), Range(14, None, 14)
    )
    assert FREE.ranges(free) == free


@pytest.mark.parametrize(
    ("static", "size", "mode"),
    [
        (FREE, 42, "crop"),
        (StaticShape(views=1), 42, "crop"),
        (StaticShape(height=28), 42, "crop"),
        (StaticShape(width=70), 70, "crop"),
        (StaticShape(height=28, width=70), 70, "crop"),
        (StaticShape(height=70, width=70), 70, "pad"),  # the one shape that padding gives of any photograph
    ],
)
def test_photographs_are_fitted_to_the_fixed_width(static: StaticShape, size: int, mode: str) -> None:
    free = Preprocessing.of(MOE)
    assert static.preprocessing(free) == dataclasses.replace(free, size=size, mode=mode)


def test_what_is_verified_is_what_the_file_accepts_each_shape_once() -> None:
    assert FREE.verified(SHAPES_IN_PATCHES, 14) == SHAPES_IN_PATCHES
    assert StaticShape(1, 2, 392, 518).verified(SHAPES_IN_PATCHES, 14) == ((1, 2, 28, 37),)
    assert StaticShape(views=1).verified(SHAPES_IN_PATCHES, 14) == (
        (1, 1, 1, 1), (1, 1, 6, 5), (2, 1, 3, 6), (1, 1, 5, 3), (1, 1, 2, 3), (1, 1, 11, 37),
    )  # fmt: skip

"""The shape flags of an engine: ranges, trtexec's shapes, several profiles; what is refused, and what is near."""

import pytest

from moe3d_deploy.engines.options import parse_size, parse_targets
from moe3d_deploy.engines.profiles import MOST_PROFILES, ShapeFlags, read_profiles
from moe3d_deploy.engines.shapes import ShapeProfile
from moe3d_deploy.errors import InputError
from moe3d_deploy.manifest import Range, ShapeRanges

PIXELS = Range(14, None, 14)
FREE = ShapeRanges(Range(1, None), Range(1, None), PIXELS, PIXELS)
FIXED = ShapeRanges(Range(1, 1), Range(1, 16), Range(392, 392, 14), Range(14, 518, 14))


def read(
    accepted: ShapeRanges = FREE, channels_last: bool = False, **flags: str | tuple[str, ...]
) -> tuple[ShapeProfile, ...]:
    given = {name: (value,) if isinstance(value, str) else value for name, value in flags.items()}
    return read_profiles(ShapeFlags(**given), accepted, 14, 518, channels_last=channels_last)  # type: ignore[arg-type]


def refusal(accepted: ShapeRanges = FREE, channels_last: bool = False, **flags: str | tuple[str, ...]) -> str:
    with pytest.raises(InputError) as caught:
        read(accepted, channels_last, **flags)
    return str(caught.value)


def test_no_flag_is_one_scene_of_up_to_eight_views_from_ten_patches_to_the_models_size() -> None:
    assert read() == (ShapeProfile((1, 1, 140, 140), (1, 2, 518, 518), (1, 8, 518, 518)),)


def test_trtexecs_shapes_are_those_of_the_input() -> None:
    (profile,) = read(
        min_shapes="images:1x1x3x140x518", opt_shapes="images:1x2x3x392x518", max_shapes="images:1x4x3x518x518"
    )
    assert profile == ShapeProfile((1, 1, 140, 518), (1, 2, 392, 518), (1, 4, 518, 518))
    assert profile.image_shapes()[1] == (1, 2, 3, 392, 518)


def test_shapes_of_8_bit_pixels_have_the_channels_last() -> None:
    assert read(channels_last=True, opt_shapes="images:1x2x392x518x3") == read(opt_shapes="1x2x3x392x518")
    assert refusal(channels_last=True, opt_shapes="1x2x3x392x518") == (
        "--opt-shapes 1x2x3x392x518: the model takes B x S x H x W x 3, as images:1x2x392x518x3"
    )


@pytest.mark.parametrize(
    ("given", "views"),
    [
        # trtexec fills in what is left out from the next one that is given
        ({"opt_shapes": 2}, (2, 2, 2)),
        ({"max_shapes": 4}, (4, 4, 4)),
        ({"min_shapes": 1}, (1, 1, 1)),
        ({"min_shapes": 1, "max_shapes": 4}, (1, 4, 4)),
        ({"min_shapes": 1, "opt_shapes": 2}, (1, 2, 2)),
        ({"opt_shapes": 2, "max_shapes": 4}, (2, 2, 4)),
    ],
)
def test_a_shape_that_is_left_out_is_the_next_one(given: dict[str, int], views: tuple[int, ...]) -> None:
    (profile,) = read(**{name: f"images:1x{count}x3x392x518" for name, count in given.items()})
    assert tuple(shape[1] for shape in (profile.min, profile.opt, profile.max)) == views


def test_repeated_flags_are_profiles_and_a_single_one_holds_for_all() -> None:
    profiles = read(views=("1", "2:4:8"), height=("392", "140:518"), width="518")
    assert profiles == (
        ShapeProfile((1, 1, 392, 518), (1, 1, 392, 518), (1, 1, 392, 518)),
        ShapeProfile((1, 2, 140, 518), (1, 4, 518, 518), (1, 8, 518, 518)),
    )
    shapes = read(min_shapes="1x1x3x140x140", max_shapes=("1x1x3x518x518", "1x8x3x140x140"))
    assert [(profile.min[1], profile.max) for profile in shapes] == [(1, (1, 1, 518, 518)), (1, (1, 8, 140, 140))]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"views": ("1", "2", "4"), "height": ("140", "392")},
            "--height is given 2 times and --views 3 times: give a shape flag once for all profiles, or once for each",
        ),
        ({"views": ("1", "2:4", "1")}, "profile 3 is the same as profile 1: leave it out"),
        (
            {"max_shapes": "1x1x3x140x140", "views": "2"},
            "--max-shapes says all sizes: leave --views out, or give ranges alone",
        ),
        ({"views": ("1",) * 9}, f"9 profiles are more than the {MOST_PROFILES} an engine may have here: build several"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags: dict[str, tuple[str, ...]], message: str) -> None:
    assert refusal(**flags) == message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("images:1x2x3x100x518", "height 100 is not a multiple of the patch size 14; nearest is images:1x2x3x98x518"),
        (
            "images:1x0x3x1x520",
            "views 0 is less than 1, height 1 is not a multiple of the patch size 14, width 520 is not a multiple of "
            "the patch size 14; nearest is images:1x1x3x14x518",
        ),
        ("images:1x2x1x392x518", "the model takes B x S x 3 x H x W, as images:1x2x3x392x518"),
        ("input:1x2x3x392x518", "there is no input 'input'; the model takes images, as images:1x2x3x392x518"),
    ],
)
def test_an_impossible_shape_is_named_with_the_nearest(text: str, message: str) -> None:
    assert refusal(opt_shapes=text) == f"--opt-shapes {text}: {message}"


@pytest.mark.parametrize(
    "text",
    [
        "", "images:", "images", "2x3x392x518", "1x2x3x392x518x1", "1,2,3,392,518", "images:1x-2x3x4x5", "1x٢x3x14x14",
        "images:1x2x3x14x14,other:1",
    ],
)  # fmt: skip
def test_text_that_is_no_shape_is_refused_with_an_example(text: str) -> None:
    assert refusal(max_shapes=text).endswith("as images:1x2x3x392x518")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        # what the file itself takes: 1 scene, 1 to 16 views, 392 high, up to 518 wide
        ({"views": "1:20"}, "--views 1:20: 20 is not what the file takes, 1 to 16; nearest is 16"),
        ({"width": "140:532"}, "--width 140:532: 532 is not what the file takes, 14 to 518; nearest is 518"),
        ({"height": "140:392"}, "--height 140:392: the file fixes height at 392 (--static), leave --height out"),
        (
            {"max_shapes": "images:2x17x3x378x518"},
            "--max-shapes images:2x17x3x378x518: batch 2 is not the 1 that the file fixes (--static), views 17 is not "
            "what the file takes, 1 to 16, height 378 is not the 392 that the file fixes (--static); nearest is "
            "images:1x16x3x392x518",
        ),
    ],
)
def test_shapes_beyond_the_file_are_refused_with_the_nearest(flags: dict[str, str], message: str) -> None:
    assert refusal(FIXED, **flags) == message


def test_what_the_file_fixes_needs_no_flag() -> None:
    (profile,) = read(FIXED, views="1:16", width="140:518")
    assert (profile.min, profile.max) == ((1, 1, 392, 140), (1, 16, 392, 518))


def test_a_largest_shape_below_the_smallest_is_refused_with_the_order() -> None:
    assert refusal(views="8:4:1") == "--views 8:4:1: sizes must rise, min <= opt <= max; in order: 1:4:8"
    assert refusal(min_shapes="1x8x3x140x518", max_shapes="1x4x3x518x392") == (
        "--min-shapes 1x8x3x140x518 --max-shapes 1x4x3x518x392: views must rise, min <= opt <= max; in order: "
        "--min-shapes images:1x4x3x140x392 --max-shapes images:1x8x3x518x518"
    )


# Texts of the other flags


def test_targets_are_compute_capabilities_each_once() -> None:
    assert parse_targets("sm89,SM120, 8.6,12.0,sm_75") == ((8, 9), (12, 0), (8, 6), (7, 5))


@pytest.mark.parametrize("text", ["", "sm", "89,", "sm9", "ada", "8.9.0", "sm89;sm86", "sm1234", "٨9"])
def test_targets_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^--target .*: expected GPUs by compute capability, for example sm89,sm120$"):
        parse_targets(text)


def test_sizes_are_powers_of_two() -> None:
    assert [parse_size("--workspace", text) for text in ("4G", "512m", "0.5K", "1T")] == [2**32, 2**29, 512, 2**40]


@pytest.mark.parametrize("text", ["4", "4GB", "0G", "-1G", "G", "", "1e3M", "٤G"])
def test_a_size_without_its_unit_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"^--workspace .*: expected a size with its unit, K, M, G or T, for example"):
        parse_size("--workspace", text)

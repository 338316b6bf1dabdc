"""Image loading: VGGT's bytes, the way back to original pixels, and files that cannot be used."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from moe3d_deploy.errors import InputError
from moe3d_deploy.images import load_images

GOLDEN = np.load(Path(__file__).parent / "data" / "golden_preprocess.npz")
MODES = ["crop", "pad", "square"]


@pytest.fixture(scope="module")
def golden_paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    paths = [folder / f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        path.write_bytes(GOLDEN[f"png_{i}"].tobytes())
    return paths


def save(path, pixels, **options):
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **options)
    return path


def ramp(width, height):
    """Red rises along x, green along y, both linear and clear of 0 and 255; blue is 128."""
    v, u = np.mgrid[:height, :width]
    return np.stack([20 + 200 * u / width, 20 + 200 * v / height, np.full_like(u, 128)], -1).round()


def assert_golden(case, batch):
    expected = GOLDEN[f"{case}/sample"]
    assert batch.images.dtype == np.float32
    assert batch.images.shape == tuple(GOLDEN[f"{case}/shape"])
    np.testing.assert_array_equal(batch.images[..., ::11, ::13], expected)
    digest = hashlib.sha256(np.ascontiguousarray(batch.images).tobytes()).hexdigest()
    assert digest == str(GOLDEN[f"{case}/sha256_f32"])


@pytest.mark.parametrize("i", range(4))
@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_one_image_equals_vggt_to_the_byte(golden_paths, mode, i):
    assert_golden(f"{mode}_{i}", load_images(golden_paths[i : i + 1], mode=mode))


@pytest.mark.parametrize("i", range(4))
def test_square_image_and_its_box_equal_vggt(golden_paths, i):
    batch = load_images(golden_paths[i : i + 1], mode="square", size=140)
    assert_golden(f"square140_{i}", batch)
    (view,) = batch.views
    x1, y1, x2, y2, width, height = GOLDEN[f"square140_{i}/coords"][0]
    assert (view.original_width, view.original_height) == (width, height)
    corners = view.to_original([[x1 - 0.5, y1 - 0.5], [x2 - 0.5, y2 - 0.5]])  # outer edges of the corner pixels
    np.testing.assert_allclose(corners, [[-0.5, -0.5], [width - 0.5, height - 0.5]], atol=1e-4)  # float32 coords


@pytest.mark.parametrize("mode", ["crop", "pad"])
def test_views_of_mixed_size_are_padded_with_white_as_in_vggt(golden_paths, mode):
    batch = load_images(golden_paths, mode=mode)
    assert_golden(f"{mode}_batch", batch)
    assert [view.name for view in batch.views] == ["0.png", "1.png", "2.png", "3.png"]


@pytest.mark.parametrize(
    ("mode", "width", "height", "shape"),
    [
        ("crop", 90, 60, (56, 84)),  # 60 * 84/90 / 14 = 4 rows of patches
        ("crop", 60, 90, (84, 84)),  # 126 rows, cropped
        ("crop", 84, 35, (28, 84)),  # 2.5 rounds to the even 2
        ("pad", 90, 60, (84, 84)),
        ("square", 90, 60, (84, 84)),
    ],
)
def test_size_generalises(tmp_path, mode, width, height, shape):
    path = save(tmp_path / "a.png", ramp(width, height))
    assert load_images([path], mode=mode, size=84).images.shape == (1, 3, *shape)


def test_patch_size_sets_the_rounding(tmp_path):
    path = save(tmp_path / "a.png", ramp(64, 40))
    assert load_images([path], size=64, patch_size=16).images.shape == (1, 3, 32, 64)  # 40/16 = 2.5 -> 2


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("width", "height"), [(101, 67), (67, 101), (60, 200), (40, 30)])
def test_mapped_pixels_show_the_same_place(tmp_path, mode, width, height):
    """The picture is a ramp, so a network pixel's colour says where in the photograph it comes from."""
    wide = save(tmp_path / "wide.png", ramp(100, 20))  # a second view, so that batch padding is mapped too
    batch = load_images([save(tmp_path / "a.png", ramp(width, height)), wide], mode=mode, size=70)
    view, image = batch.views[0], batch.images[0] * 255
    v, u = np.nonzero(view.valid_mask(*image.shape[1:]))
    original = view.to_original(np.stack([u, v], -1))
    inner = ((original > 4) & (original < np.array([width, height]) - 5)).all(-1)  # clear of the kernel's edge
    assert inner.sum() > 100
    expected = 20 + 200 * original[inner] / [width, height]
    found = image[:2, v[inner], u[inner]].T
    assert np.abs(found - expected).max() < 1.5  # two roundings to 8 bit and bicubic overshoot of them


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(MODES), st.integers(8, 40), st.integers(8, 40))
def test_original_pixels_match_a_solid_picture(tmp_path_factory, mode, width, height):
    """The mask is exact where padding is added after the resize: a grey picture is grey there and nowhere else."""
    path = save(tmp_path_factory.mktemp("solid") / "a.png", np.full((height, width, 3), 128))
    batch = load_images([path], mode=mode, size=42)
    mask = batch.views[0].valid_mask(*batch.images.shape[2:])
    v, u = np.nonzero(mask)
    original = batch.views[0].to_original(np.stack([u, v], -1))
    assert (original > -0.5 - 1e-9).all()  # float64 rounding where a bar ends in the middle of a pixel
    assert (original < np.array([width, height]) - 0.5 + 1e-9).all()
    if mode != "square":
        np.testing.assert_array_equal(mask, np.abs(batch.images[0, 0] - 128 / 255) < 1e-6)


@pytest.mark.parametrize(("size", "first", "end"), [(20, 5, 15), (2, 0, 1)])
def test_square_mask_leaves_the_black_bars_out(tmp_path, size, first, end):
    """40x20 has bars of 10 rows above and below: 5 rows at size 20; at size 2 both edges fall on pixel centres,
    of which the first counts as inside."""
    (view,) = load_images([save(tmp_path / "a.png", ramp(40, 20))], mode="square", size=size).views
    expected = np.zeros((size, size), bool)
    expected[first:end] = True
    np.testing.assert_array_equal(view.valid_mask(size, size), expected)


def test_intrinsics_follow_the_pixels(tmp_path):
    """60x200 at size 42: resized to 42x140, rows 49..91 kept, so v_original = (v + 49.5) * 200/140 - 0.5."""
    (view,) = load_images([save(tmp_path / "a.png", ramp(60, 200))], size=42).views
    k = np.array([[50.0, 0.0, 21.0], [0.0, 60.0, 20.0], [0.0, 0.0, 1.0]])
    mapped = view.intrinsics_to_original(k)
    sx, sy = 60 / 42, 200 / 140
    expected = [[50 * sx, 0, 21.5 * sx - 0.5], [0, 60 * sy, 69.5 * sy - 0.5], [0, 0, 1]]
    np.testing.assert_allclose(mapped, expected)
    ray = np.array([0.3, -0.1, 1.0])
    np.testing.assert_allclose((mapped @ ray)[:2], view.to_original((k @ ray)[:2]))


def test_mapping_becomes_json(tmp_path):
    (view,) = load_images([save(tmp_path / "a.png", ramp(56, 28))], mode="pad", size=28).views
    assert json.loads(json.dumps(view.to_dict())) == {
        "name": "a.png",
        "original_width": 56,
        "original_height": 28,
        "scale_x": 2.0,
        "scale_y": 2.0,
        "offset_x": 0,
        "offset_y": 7,
    }


def test_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r'image ".*nothing\.png" is neither a file nor a folder; check the path'):
        load_images([tmp_path / "nothing.png"])


def test_empty_file_is_named(tmp_path):
    (tmp_path / "a.png").touch()
    with pytest.raises(InputError, match=r'"[^"]*a\.png" is empty \(0 bytes\)'):
        load_images([tmp_path / "a.png"])


def test_other_file_is_named(tmp_path):
    (tmp_path / "a.png").write_text("not an image")
    with pytest.raises(InputError, match=r'a\.png" cannot be decoded \(unknown format\); save it as PNG or JPEG'):
        load_images([tmp_path / "a.png"])


def test_postscript_never_reaches_pillow(tmp_path):
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    with pytest.raises(InputError, match="unknown format"):
        load_images([tmp_path / "a.png"])


def test_decompression_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    path = save(tmp_path / "bomb.png", ramp(28, 28))
    with pytest.raises(InputError, match=r'bomb\.png" has too many pixels to decode safely; downscale it'):
        load_images([path])


@pytest.mark.parametrize(
    ("mode", "width", "height"), [("crop", 296, 4), ("pad", 296, 4), ("pad", 4, 296), ("crop", 2000, 3)]
)
def test_aspect_ratio_that_leaves_no_pixels_is_refused(tmp_path, mode, width, height):
    """At 74:1 the short side is half a patch, which rounds to the even 0."""
    path = save(tmp_path / "strip.png", ramp(width, height))
    with pytest.raises(InputError, match=rf'strip\.png" is {width}x{height}.* crop it to .* below 74:1'):
        load_images([path], mode=mode)


@pytest.mark.parametrize(("mode", "height"), [("crop", 2000), ("square", 20000)])
def test_aspect_ratio_that_needs_gigabytes_is_refused(tmp_path, mode, height):
    """1x2000 in mode crop needs 518x1035998 pixels before its crop; 1x20000 in mode square 20000x20000."""
    path = save(tmp_path / "strip.png", np.zeros((height, 1, 3)))
    with pytest.raises(InputError, match=r'strip\.png" is 1x\d+ and needs \d+x\d+ pixels on the way; crop it'):
        load_images([path], mode=mode)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "stretch"}, 'image mode is "stretch"; choose crop, pad or square'),
        ({"exif": "no"}, 'exif is "no"; choose apply or ignore'),
        ({"size": 500}, "image size 500 is not a multiple of the patch size 14; use 504"),
        ({"size": 0}, "must be positive"),
    ],
)
def test_options_out_of_range_are_refused(golden_paths, options, message):
    with pytest.raises(InputError, match=message):
        load_images(golden_paths, **options)


def test_coordinates_of_wrong_shape_are_refused(golden_paths):
    (view,) = load_images(golden_paths[:1]).views
    with pytest.raises(InputError, match=r"pixel coordinates have shape \(3,\); pass \(\.\.\., 2\)"):
        view.to_original(np.zeros(3))
    with pytest.raises(InputError, match="intrinsics have shape"):
        view.intrinsics_to_original(np.zeros((3, 4)))


@pytest.mark.parametrize(("width", "height"), [(1, 1), (7, 7), (1, 7)])
def test_picture_too_small_to_show_anything_is_refused(tmp_path, width, height):
    path = save(tmp_path / "dot.png", ramp(width, height))
    with pytest.raises(InputError, match=rf'dot\.png" is {width}x{height}, too small .*; use one of 8 pixels or more'):
        load_images([path])


def test_exif_is_applied_unless_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held a quarter turn: display by turning clockwise
    pixels = np.zeros((28, 56, 3), np.uint8)
    pixels[:, :28] = 255  # left half white; upright it is the upper half
    path = save(tmp_path / "a.png", pixels, exif=exif)
    upright = load_images([path], mode="pad", size=56)
    assert (upright.views[0].original_width, upright.views[0].original_height) == (28, 56)
    assert upright.images[0, 0, 5, 28] == 1
    assert upright.images[0, 0, 50, 28] == 0
    stored = load_images([path], size=56, exif="ignore")
    assert (stored.views[0].original_width, stored.views[0].original_height) == (56, 28)
    assert stored.images.shape == (1, 3, 28, 56)
    assert stored.images[0, 0, 14, 5] == 1


def test_single_path_is_not_split_into_characters(golden_paths):
    assert len(load_images(str(golden_paths[0])).views) == 1
    assert len(load_images(os.fsencode(golden_paths[0])).views) == 1


def test_no_paths_are_refused():
    with pytest.raises(InputError, match="no images given; pass at least one image file"):
        load_images([])

"""8-bit pixels and floats into one session: the same bits, and what is refused rather than rounded."""

import dataclasses
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest
import variants
from exports import MOE
from numpy.typing import NDArray
from PIL import Image
from sessions import of_bundle

from moe3d_deploy.cli.main import main
from moe3d_deploy.errors import InputError
from moe3d_deploy.export.verify import pixels_for
from moe3d_deploy.manifest import MANIFEST_NAME, Preprocessing, Range, ShapeRanges
from moe3d_deploy.runtime.onnx_backend import OnnxBackend
from moe3d_deploy.runtime.pixels import to_floats, to_pixels
from moe3d_deploy.runtime.session import Session

# ---- the two forms


def test_every_level_survives_the_way_there_and_back() -> None:
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    floats = to_floats(levels)
    assert (floats.dtype, floats.shape) == (np.dtype(np.float32), (1, 3, 16, 16))
    assert floats[0, :, 3, 5].tolist() == [np.float32(53) / np.float32(255)] * 3
    np.testing.assert_array_equal(to_pixels(floats), levels)
    np.testing.assert_array_equal(to_pixels(floats.astype(np.float64)), levels)


def test_channels_change_places_and_nothing_else() -> None:
    levels = np.random.default_rng(0).integers(0, 256, (2, 3, 14, 28, 3), dtype=np.uint8)
    floats = to_floats(levels)
    assert floats.shape == (2, 3, 3, 14, 28)
    for channel in range(3):
        np.testing.assert_array_equal(floats[:, :, channel], levels[..., channel].astype(np.float32) / 255)
    assert floats.flags.c_contiguous
    assert to_pixels(floats).flags.c_contiguous


@pytest.mark.parametrize("value", [0.5, 1 / 256, 1e-9, np.nextafter(np.float32(1 / 255), np.float32(1))])
def test_a_value_between_two_levels_is_refused_not_rounded(value: float) -> None:
    floats = np.zeros((1, 3, 14, 14), np.float32)
    floats[0, 1, 2, 3] = value
    with pytest.raises(InputError) as caught:
        to_pixels(floats)
    assert str(caught.value) == (
        "images: values lie between the levels of 8-bit pixels, which is all that this model takes; pass uint8 pixels "
        "(S, H, W, 3), or export with --input float32"
    )


# ---- a session takes both


class Recorder:
    """A backend that keeps what it is given."""

    output_names = ("depth",)

    def __init__(self, input_type: str) -> None:
        self.input_type = input_type
        self.images: NDArray[Any] = np.empty(0)

    def load(self) -> None:
        pass

    def run(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]:
        self.images = images
        return {"depth": np.ones((2, 3, 14, 28), np.float32)[: images.shape[0]]}


@pytest.mark.parametrize("input_type", ["float32", "uint8"])
@pytest.mark.parametrize("given", ["float32", "uint8"])
@pytest.mark.parametrize("scenes", [None, 2])
def test_the_backend_gets_its_own_form_whatever_is_given(input_type: str, given: str, scenes: int | None) -> None:
    levels = np.random.default_rng(0).integers(0, 256, (scenes or 1, 3, 14, 28, 3), dtype=np.uint8)
    images: NDArray[Any] = levels if given == "uint8" else to_floats(levels)
    backend = Recorder(input_type)
    session = Session(backend, "small", Preprocessing.of(MOE), ShapeRanges.of(MOE))

    result = session.run(images if scenes else images[0])

    expected = levels if input_type == "uint8" else to_floats(levels)
    assert backend.images.dtype == np.dtype(input_type)
    np.testing.assert_array_equal(backend.images, expected)
    assert result["depth"].ndim == (4 if scenes else 3)


def test_a_float_bundle_and_a_pixel_bundle_take_pixels() -> None:
    levels = pixels_for((1, 2, 2, 3), MOE.patch_size)
    half = of_bundle()
    np.testing.assert_array_equal(half.run(levels)["depth"], half.run(to_floats(levels))["depth"])

    session = Session.open(variants.pixels().path)
    depth = session.run(levels[0])["depth"]
    assert depth.shape == (2, 28, 42)
    np.testing.assert_array_equal(depth, session.run(to_floats(levels))["depth"][0])
    expected = OnnxBackend(exports.merged().path).run(to_floats(levels))["depth"]
    np.testing.assert_array_equal(depth, expected[0])
    with pytest.raises(InputError, match="between the levels of 8-bit pixels"):
        session.run(np.full((1, 3, 14, 14), 0.3, np.float32))


def test_moe3d_run_gives_the_depth_of_the_float_file(tmp_path: Path) -> None:
    """From photographs to scene.npz: the bundle of pixels against the float32 file of the same weights, bit by bit."""
    for name in ("left.png", "right.png"):
        noise = np.random.default_rng(len(name)).integers(0, 256, (28, 42, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / name)
    photographs = [str(tmp_path / "left.png"), str(tmp_path / "right.png")]

    assert (
        main(["run", str(variants.pixels().path), *photographs, "-o", str(tmp_path / "out"), "--formats", "npz"]) == 0
    )

    from moe3d_deploy.images import load_images

    expected = OnnxBackend(exports.merged().path).run(load_images(photographs, size=MOE.img_size).images[None])
    (written,) = (tmp_path / "out").rglob("scene.npz")
    with np.load(written) as scene:
        np.testing.assert_array_equal(scene["depth"], expected["depth"][0])


# ---- fixed shapes, and files that no CPU runs


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 3, 28, 42), "images: views is 3; this model is fixed at 2"),
        ((2, 3, 30, 42), "images: height is 30; accepted are 14 and more in steps of 14, the nearest is 28"),
        ((1, 3, 28, 42), "images: views is 1; this model is fixed at 2"),
    ],
)
def test_another_size_on_a_fixed_axis_is_refused_with_the_one_it_takes(shape: tuple[int, ...], message: str) -> None:
    ranges = dataclasses.replace(ShapeRanges.of(MOE), views=Range(2, 2))
    session = Session(Recorder("float32"), "small", Preprocessing.of(MOE), ranges)
    with pytest.raises(InputError) as caught:
        session.run(np.zeros(shape, np.float32))
    assert str(caught.value) == message
    session.run(np.zeros((2, 3, 14, 14), np.float32))


@pytest.mark.full
def test_a_file_of_fixed_views_runs_at_any_size() -> None:
    session = Session.open(variants.operator().path)
    assert session.shapes.views == Range(2, 2)
    assert session.run(np.zeros((2, 3, 14, 28), np.float32))["depth"].shape == (2, 14, 28)


NO_CPU = (
    "bundle {path} is bf16, and bf16 graphs run in TensorRT only, as an engine on a GPU: ONNX Runtime has no bf16 "
    "kernels on a CPU; for this backend export with --precision fp16 or fp32"
)


def test_a_bf16_bundle_is_refused_before_its_file_is_opened() -> None:
    path = variants.brain().path
    with pytest.raises(InputError) as caught:
        Session.open(path, load=False)
    assert str(caught.value) == NO_CPU.format(path=path)


def test_moe3d_run_says_it_of_a_bf16_bundle_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = dataclasses.replace(exports.bundle().report.bundle.manifest, precision="bf16-fp16heads")
    copy = variants.copy(exports.bundle().report.bundle, tmp_path)
    (copy.path / MANIFEST_NAME).write_text(manifest.to_json())
    Image.new("RGB", (42, 28)).save(tmp_path / "a.png")
    assert main(["run", str(copy.path), str(tmp_path / "a.png"), "-o", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "moe3d: " + NO_CPU.format(path=copy.path).replace("is bf16,", "is bf16-fp16heads,") + "\n"
    assert not (tmp_path / "out").exists()


def test_inspect_says_what_can_run_a_bf16_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(variants.brain().path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert (
        "precision     bf16, opset 23; runs in TensorRT only, as an engine (no CPU runtime has bf16 kernels)" in lines
    )
    assert any("twin" in line and "depth" in line and "limit 5e-05" in line for line in lines)
    assert any("rounded" in line and "depth" in line and "limit 0.08" in line for line in lines)
    assert main(["inspect", str(variants.pixels().path)]) == 0
    assert "precision     fp32, opset 20" in capsys.readouterr().out.splitlines()

"""One session over a bundle in ONNX Runtime and a checkpoint in PyTorch: equal results, and what it refuses to run."""

import re
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest
import torch
from exports import MOE
from numpy.typing import NDArray
from sessions import Images, images, of_bundle, of_checkpoint

from moe3d_deploy.bundle import Bundle
from moe3d_deploy.errors import BundleError, InputError, Moe3dError
from moe3d_deploy.export.compare import Limits, errors, require_within
from moe3d_deploy.manifest import Preprocessing, Range, ShapeRanges
from moe3d_deploy.model import MoE3D
from moe3d_deploy.runtime.onnx_backend import OnnxBackend
from moe3d_deploy.runtime.session import Session
from moe3d_deploy.runtime.torch_backend import _NO_CPU_MEMORY


def test_a_bundle_gives_what_its_checkpoint_gives_in_pytorch() -> None:
    scene = images(1, 3, 3, 4)
    found, expected = of_bundle().run(scene), of_checkpoint().run(scene)
    assert set(found) == {"depth", "depth_conf", "extrinsics", "intrinsics"}
    assert set(expected) == {*found, "pose_enc"}
    require_within("fp16 bundle", errors(found, {name: expected[name] for name in found}), Limits.of("fp16"), "")


@pytest.mark.parametrize("session", [of_bundle, of_checkpoint])
def test_outputs_have_the_scene_axis_only_if_the_images_have(session: Any) -> None:
    batch = images(2, 3, 2, 3)
    together = session().run(batch)
    alone = session().run(batch[1])

    assert together["depth"].shape == (2, 3, 28, 42)
    assert together["intrinsics"].shape == (2, 3, 3, 3)
    assert alone["depth"].shape == (3, 28, 42)
    assert alone["extrinsics"].shape == (3, 3, 4)
    for name, values in alone.items():  # another batch may be summed in another order
        np.testing.assert_allclose(values, together[name][1], rtol=1e-3, atol=1e-4, err_msg=name)
        assert values.dtype == np.float32
    one = session().run(batch[:1])
    assert one["depth"].shape == (1, 3, 28, 42)


@pytest.mark.filterwarnings("error")
def test_other_float_types_layouts_and_lists_are_taken() -> None:
    scene = images(1, 2, 1, 2)[0]
    expected = of_bundle().run(scene)["depth"]
    strided = np.ascontiguousarray(scene.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    frozen = scene.copy()
    frozen.flags.writeable = False
    for same in (scene.astype(np.float64), strided, scene.tolist(), frozen):
        np.testing.assert_array_equal(of_bundle().run(same)["depth"], expected)
        assert np.isfinite(of_checkpoint().run(same)["depth"]).all()
    assert of_bundle().run(scene.astype(np.float16))["depth"].shape == expected.shape


def test_the_session_tells_its_name_outputs_and_preprocessing() -> None:
    assert (of_bundle().name, of_checkpoint().name) == ("small", "small")
    assert of_bundle().output_names == ("depth", "depth_conf", "extrinsics", "intrinsics")
    assert of_checkpoint().output_names == ("depth", "depth_conf", "extrinsics", "intrinsics", "pose_enc")
    assert of_bundle().preprocessing == of_checkpoint().preprocessing == Preprocessing.of(MOE)
    assert of_bundle().shapes == of_checkpoint().shapes


def test_pytorch_adds_the_outputs_that_are_asked_for() -> None:
    session = Session.open(exports.checkpoint(), outputs=("expert_weights", "point_map", "depth"))
    result = session.run(images(1, 1, 2, 3)[0])
    assert session.output_names[-2:] == ("expert_weights", "point_map")
    assert result["expert_weights"].shape == (1, 2, 28, 42)
    assert result["point_map"].shape == (1, 28, 42, 3)


def test_views_in_chunks_give_the_same() -> None:
    """Convolutions of fewer views may be summed in another order: float32 rounding, far below 1e-4."""
    scene = images(1, 5, 2, 3)
    chunked = Session.open(exports.checkpoint(), view_chunk=2).run(scene)
    for name, expected in of_checkpoint().run(scene).items():
        np.testing.assert_allclose(chunked[name], expected, rtol=1e-4, atol=1e-5, err_msg=name)


# ---- what it refuses to run


BAD_IMAGES: list[tuple[Any, str]] = [
    (np.zeros((3, 14, 14), np.float32), r"images: expected (S, 3, H, W) or (B, S, 3, H, W), got (3, 14, 14)"),
    (np.zeros((1, 14, 14, 3), np.float32), r"images: expected (S, 3, H, W) or (B, S, 3, H, W), got (1, 1, 14, 14, 3)"),
    (
        np.zeros((1, 1, 4, 14, 14), np.float32),
        r"images: expected (S, 3, H, W) or (B, S, 3, H, W), got (1, 1, 4, 14, 14)",
    ),
    (np.float32(0), r"images: expected (S, 3, H, W) or (B, S, 3, H, W), got ()"),
    (
        np.zeros((1, 3, 14, 14), np.uint8),
        "images: 8-bit pixels are (S, H, W, 3) or (B, S, H, W, 3), got (1, 1, 3, 14, 14)",
    ),
    (np.zeros((14, 14, 3), np.uint8), "images: 8-bit pixels are (S, H, W, 3) or (B, S, H, W, 3), got (14, 14, 3)"),
    (
        np.zeros((1, 15, 14, 3), np.uint8),
        "images: height is 15; accepted are 14 and more in steps of 14, the nearest is 14",
    ),
    (np.zeros((1, 3, 14, 14), bool), "images: expected floats in [0, 1] or uint8 pixels, got bool; convert them"),
    (np.zeros((1, 3, 14, 14), np.int64), "images: expected floats in [0, 1] or uint8 pixels, got int64; convert them"),
    (np.full((1, 3, 14, 14), 255.0), "images: values lie in [255, 255]; expected RGB in [0, 1]"),
    (np.full((1, 3, 14, 14), -0.01), "images: values lie in [-0.01, -0.01]; expected RGB in [0, 1]"),
    (np.full((1, 3, 14, 14), np.nan), "images: values lie in [nan, nan]; expected RGB in [0, 1]"),
    (np.full((1, 3, 14, 14), np.inf), "images: values lie in [inf, inf]; expected RGB in [0, 1]"),
    (np.zeros((1, 3, 15, 14)), "images: height is 15; accepted are 14 and more in steps of 14, the nearest is 14"),
    (np.zeros((1, 3, 14, 34)), "images: width is 34; accepted are 14 and more in steps of 14, the nearest is 28"),
    (np.zeros((1, 3, 14, 36)), "images: width is 36; accepted are 14 and more in steps of 14, the nearest is 42"),
    (np.zeros((1, 3, 7, 14)), "images: height is 7; accepted are 14 and more in steps of 14, the nearest is 14"),
    (np.zeros((1, 3, 0, 14)), "images: height is 0; accepted are 14 and more in steps of 14, the nearest is 14"),
    (np.zeros((0, 3, 14, 14)), "images: views is 0; accepted are 1 and more in steps of 1, the nearest is 1"),
    (np.zeros((0, 1, 3, 14, 14)), "images: batch is 0; accepted are 1 and more in steps of 1, the nearest is 1"),
]


@pytest.mark.parametrize("session", [of_bundle, of_checkpoint])
@pytest.mark.parametrize(("bad", "message"), BAD_IMAGES, ids=[message[8:] for _, message in BAD_IMAGES])
def test_images_that_do_not_fit_are_refused_in_one_line(session: Any, bad: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        session().run(bad)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (140, None),
        (518, None),
        (126, "images: height is 126; accepted are 140 to 518 in steps of 14, the nearest is 140"),
        (532, "images: height is 532; accepted are 140 to 518 in steps of 14, the nearest is 518"),
        (150, "images: height is 150; accepted are 140 to 518 in steps of 14, the nearest is 154"),
    ],
)
def test_a_range_with_an_end_names_it(size: int, message: str | None) -> None:
    class Ones:
        output_names = ("depth",)
        input_type = "float32"

        def load(self) -> None:
            pass

        def run(self, images: Images) -> dict[str, NDArray[Any]]:
            return {"depth": np.ones((*images.shape[:2], *images.shape[3:]), np.float32)}

    side = Range(140, 518, 14)
    session = Session(Ones(), "small", Preprocessing.of(MOE), ShapeRanges(Range(1, 1), Range(1, 8), side, side))
    array = np.zeros((2, 3, size, 140), np.float32)
    if message is None:
        assert session.run(array)["depth"].shape == (2, size, 140)
        return
    with pytest.raises(InputError) as caught:
        session.run(array)
    assert str(caught.value) == message


def test_images_that_are_no_array_are_refused_in_one_line() -> None:
    with pytest.raises(InputError, match=r"^images: expected an array of numbers, got a list that is none$"):
        of_bundle().run([[1.0], [1.0, 2.0]])


# ---- the backend


def test_a_file_that_is_no_model_is_an_error_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(BundleError) as caught:
        OnnxBackend(tmp_path / "model.onnx")
    assert str(caught.value).startswith(f"{tmp_path}/model.onnx: ONNX Runtime ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_pytorch_out_of_memory_is_one_line_with_what_to_do(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    session = Session.open(exports.checkpoint())
    monkeypatch.setattr(MoE3D, "forward", fail)
    with pytest.raises(Moe3dError) as caught:
        session.run(images(1, 2, 1, 1))
    assert str(caught.value) == (
        "PyTorch ran out of memory on images 1x2x3x14x14; use fewer views, a smaller --size, or --view-chunk"
    )


def test_another_runtime_error_of_pytorch_is_not_called_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes differ")

    session = Session.open(exports.checkpoint())
    monkeypatch.setattr(MoE3D, "forward", fail)
    with pytest.raises(RuntimeError, match="^shapes differ$"):
        session.run(images(1, 2, 1, 1))


def test_the_cpu_allocators_own_error_is_recognised() -> None:
    """What torch itself says when memory ends, so that a new wording does not go unnoticed."""
    with pytest.raises(RuntimeError, match=re.escape(_NO_CPU_MEMORY)):
        torch.empty(1 << 60, dtype=torch.uint8)


def test_a_failure_of_onnxruntime_is_one_line_with_the_shape() -> None:
    backend = OnnxBackend(Bundle.open(exports.bundle().path).model_path, threads=1)
    with pytest.raises(Moe3dError) as caught:
        backend.run(np.zeros((1, 1, 4, 14, 14), np.float32))
    assert str(caught.value).startswith("ONNX Runtime failed on images 1x1x4x14x14: ")
    assert str(caught.value).endswith("; try fewer views")
    assert "\n" not in str(caught.value)

"""One session over a bundle in ONNX Runtime and a checkpoint in PyTorch: equal results, and what it refuses."""

import functools
import importlib
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest
import torch
from exports import MOE
from numpy.typing import NDArray
from test_manifest import example_engine

from moe3d_deploy import checkpoint
from moe3d_deploy.bundle import Bundle, add_engine
from moe3d_deploy.errors import BundleError, InputError, MissingExtraError, Moe3dError
from moe3d_deploy.export.compare import Limits, errors, require_within
from moe3d_deploy.export.verify import images_for
from moe3d_deploy.manifest import Manifest, Preprocessing, Range, ShapeRanges
from moe3d_deploy.model import MoE3D
from moe3d_deploy.runtime.onnx_backend import OnnxBackend
from moe3d_deploy.runtime.session import Session
from moe3d_deploy.runtime.torch_backend import _NO_CPU_MEMORY

Images = NDArray[np.float32]


@functools.cache
def of_bundle() -> Session:
    return Session.open(exports.bundle().path)


@functools.cache
def of_checkpoint() -> Session:
    return Session.open(exports.checkpoint())


def images(*shape: int) -> Images:
    """B, S, rows, columns in patches."""
    batch, views, rows, columns = shape
    return images_for((batch, views, rows, columns), MOE.patch_size)


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
    (np.zeros((1, 3, 14, 14), np.uint8), "images: expected floats in [0, 1], got uint8; divide 8-bit images by 255"),
    (np.zeros((1, 3, 14, 14), bool), "images: expected floats in [0, 1], got bool; divide 8-bit images by 255"),
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


# ---- opening


def test_auto_and_the_named_backend_are_the_same() -> None:
    scene = images(1, 1, 1, 1)
    for source, backend, session in (
        (exports.bundle().path, "onnxruntime", of_bundle()),
        (exports.checkpoint(), "pytorch", of_checkpoint()),
    ):
        named = Session.open(str(source), backend=backend)
        np.testing.assert_array_equal(named.run(scene)["depth"], session.run(scene)["depth"])


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        ("bundle", {"backend": "tensorrt"}, "backend 'tensorrt' is unknown; choose from auto, onnxruntime, pytorch"),
        (
            "bundle",
            {"backend": "pytorch"},
            "{source} is a bundle, which holds no PyTorch weights; name its checkpoint instead",
        ),
        (
            "checkpoint",
            {"backend": "onnxruntime"},
            "{source} is not a bundle; make one with: moe3d-export {source} -o bundle",
        ),
        (
            "bundle",
            {"outputs": ["pose_enc"]},
            "the outputs of bundle {source} were chosen at export; export again with --outputs",
        ),
        ("bundle", {"view_chunk": 2}, "view_chunk is for PyTorch alone; leave it out for bundle {source}"),
        ("bundle", {"seed": 1}, "seed is for PyTorch alone; leave it out for bundle {source}"),
        ("bundle", {"allow_pickle": True}, "allow_pickle is for PyTorch alone; leave it out for bundle {source}"),
        ("checkpoint", {"outputs": ["normals"]}, "output 'normals' is unknown; choose from depth, "),
    ],
)
def test_what_a_source_cannot_do_is_refused(source: str, arguments: dict[str, Any], message: str) -> None:
    path = exports.bundle().path if source == "bundle" else exports.checkpoint()
    with pytest.raises(InputError) as caught:
        Session.open(path, **arguments)
    assert str(caught.value).startswith(message.format(source=path))


def test_a_source_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Moe3dError, match="nothing-here: no such file or folder, nor a preset") as caught:
        Session.open(tmp_path / "nothing-here")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("backend", ["auto", "onnxruntime", "pytorch"])
@pytest.mark.parametrize(
    ("source", "remedy"),
    [("bundel", "check the path"), ("moe3d-tinny", "did you mean moe3d-tiny?"), ("preset:moe3d", "did you mean")],
)
def test_a_typing_error_is_one_even_without_torch(
    source: str, remedy: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError) as caught:
        Session.open(source, backend=backend)
    assert str(caught.value).startswith(f"{source}: no such file or folder, nor a preset (")
    assert f"; {remedy}" in str(caught.value)


def test_a_bundle_that_was_moved_aside_is_said_to_be_so(tmp_path: Path) -> None:
    (tmp_path / ".bundle.old-0123456789abcdef").mkdir()
    with pytest.raises(BundleError, match="was moved aside for a new one that did not come; rename"):
        Session.open(tmp_path / "bundle")


@pytest.mark.parametrize(
    ("package", "extra", "source"),
    [("onnxruntime", "cpu", lambda: exports.bundle().path), ("torch", "export", lambda: exports.checkpoint())],
)
def test_a_package_that_is_not_installed_and_one_that_is_broken_are_two_errors(
    package: str, extra: str, source: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = source()
    import_module = importlib.import_module

    def with_error(error: Exception) -> Any:
        def load(name: str) -> Any:
            if name == package:
                raise error
            return import_module(name)

        return load

    monkeypatch.setattr(importlib, "import_module", with_error(ModuleNotFoundError("No module", name=package)))
    with pytest.raises(
        MissingExtraError, match=rf"^{package} is not installed: pip install 'moe3d-deploy\[{extra}\]'$"
    ):
        Session.open(path)
    for error in (
        ImportError("libcudart.so.13: cannot open\nshared object file"),
        ModuleNotFoundError("libcudart.so.13: cannot open shared object file", name="typing_extensions"),
        OSError("libcudart.so.13: cannot open shared object file"),
    ):
        monkeypatch.setattr(importlib, "import_module", with_error(error))
        with pytest.raises(Moe3dError) as caught:
            Session.open(path)
        assert str(caught.value) == (
            f"{package} is installed but cannot be loaded: libcudart.so.13: cannot open shared object file; "
            "install it again"
        )


@pytest.mark.parametrize("of", [of_bundle, of_checkpoint])
def test_what_a_session_tells_of_itself_needs_no_weights(of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = of()  # before loading is forbidden

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("the weights were loaded")

    with monkeypatch.context() as patch:
        patch.setattr(OnnxBackend, "__init__", refuse)
        patch.setattr(checkpoint, "load_model", refuse)
        session = Session.open(exports.bundle().path if of is of_bundle else exports.checkpoint(), load=False)
        assert session.config is not None
        assert session.config.moe == MOE.moe
        assert session.preprocessing == Preprocessing.of(MOE)
        assert session.output_names == loaded.output_names
        with pytest.raises(InputError, match="height is 15"):
            session.run(np.zeros((1, 3, 15, 14)))
    session = Session.open(exports.bundle().path if of is of_bundle else exports.checkpoint(), load=False)
    scene = images(1, 1, 1, 1)
    np.testing.assert_array_equal(session.run(scene)["depth"], loaded.run(scene)["depth"])


@pytest.mark.parametrize("spoilt", ["missing", "damaged"])
def test_a_bundle_runs_on_the_cpu_whatever_has_become_of_its_engines(tmp_path: Path, spoilt: str) -> None:
    def build(temp: Path, manifest: Manifest) -> None:
        temp.write_bytes(b"engine")

    path = shutil.copytree(exports.bundle().path, tmp_path / "bundle")
    add_engine(path, example_engine(), build)
    if spoilt == "missing":
        shutil.rmtree(path / "engines")
    else:
        (path / example_engine().file).write_bytes(b"ENGINE")
    scene = images(1, 1, 1, 1)
    np.testing.assert_array_equal(Session.open(path).run(scene)["depth"], of_bundle().run(scene)["depth"])


def test_a_bundle_that_is_damaged_after_the_opening_is_refused_before_it_is_loaded(tmp_path: Path) -> None:
    path = shutil.copytree(exports.bundle().path, tmp_path / "bundle")
    session = Session.open(path, load=False)
    data = bytearray((path / "model.onnx.data").read_bytes())
    data[1000] ^= 1
    (path / "model.onnx.data").write_bytes(data)
    with pytest.raises(BundleError, match=r"model\.onnx\.data is damaged"):
        session.load()


def test_a_damaged_bundle_is_refused_before_onnxruntime_sees_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shutil.copytree(exports.bundle().path, tmp_path / "bundle")
    data = bytearray((path / "model.onnx.data").read_bytes())
    data[1000] ^= 1
    (path / "model.onnx.data").write_bytes(data)
    opened: list[Path] = []
    monkeypatch.setattr(OnnxBackend, "__init__", lambda self, model: opened.append(model))
    with pytest.raises(BundleError, match=r"model\.onnx\.data is damaged: its SHA-256 is not the manifest's; copy"):
        Session.open(path)
    assert opened == []


def test_a_bundle_without_its_manifest_is_said_to_be_none(tmp_path: Path) -> None:
    """Not taken for a checkpoint folder that lacks its weights."""
    path = shutil.copytree(exports.bundle().path, tmp_path / "bundle")
    (path / "manifest.json").unlink()
    with pytest.raises(BundleError, match=r"bundle has no manifest\.json, so it is not a bundle"):
        Session.open(path)


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

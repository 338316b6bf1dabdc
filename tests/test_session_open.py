"""Opening a session: the backend for a source, what a source cannot do, and what is wrong with it."""

import importlib
import shutil
import sys
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest
from exports import MOE
from manifests import example_engine
from sessions import images, of_bundle, of_checkpoint

from moe3d_deploy import checkpoint
from moe3d_deploy.bundle import add_engine
from moe3d_deploy.errors import BundleError, InputError, MissingExtraError, Moe3dError
from moe3d_deploy.manifest import Manifest, Preprocessing
from moe3d_deploy.runtime.onnx_backend import OnnxBackend
from moe3d_deploy.runtime.session import Session


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
        (
            "bundle",
            {"view_chunk": 2},
            "view_chunk is for PyTorch and for split models, and the model of bundle {source} is one file: leave it "
            "out, or export with --split heads",
        ),
        ("bundle", {"seed": 1}, "seed is for PyTorch alone; leave it out for bundle {source}"),
        ("bundle", {"plugin": "none"}, "plugin is for PyTorch alone; leave it out for bundle {source}"),
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

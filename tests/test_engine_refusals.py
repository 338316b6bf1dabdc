"""Models, arguments and places that no engine can be built from, and which builder builds: each refusal is one line."""

import ctypes
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from engine_models import PROFILE, Build, Write, build_in_child, one_line

from moe3d_deploy import trt
from moe3d_deploy.engines import build as engine_build
from moe3d_deploy.engines.shapes import ShapeProfile
from moe3d_deploy.errors import EngineError, InputError, MissingExtraError
from moe3d_deploy.trt import installed

pytest_plugins = ["engine_fixtures"]
pytestmark = pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")


# Models and arguments that cannot be used


def test_an_unsupported_op_is_named_with_its_node(write_model: Write, tmp_path: Path) -> None:
    with pytest.raises(EngineError) as error:
        build_in_child(write_model("ghost.onnx", tail=("Wobble", "ghost")), tmp_path / "plan")
    assert one_line(error).startswith("ghost.onnx: TensorRT-RTX ")
    assert 'node "Wobble_7" (Wobble): ' in str(error.value)
    assert not (tmp_path / "plan").exists()


@pytest.mark.parametrize("keep", [0.5, 0.0])
def test_a_truncated_file_is_refused(write_model: Write, build_here: Build, tmp_path: Path, keep: float) -> None:
    whole = write_model("small.onnx").read_bytes()
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(whole[: int(keep * len(whole))])
    with pytest.raises(EngineError, match=r"^cut.onnx: .*export it again$") as error:
        build_here(cut)
    one_line(error)


def test_missing_weights_are_named(write_model: Write, build_here: Build, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(write_model("small.onnx"))
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    (tmp_path / "m.data").unlink()
    with pytest.raises(EngineError, match=r"m\.onnx: .*Failed to open file: .*m\.data; put the weight file") as error:
        build_here(tmp_path / "m.onnx")
    one_line(error)


def test_a_profile_against_the_models_fixed_size_is_refused(write_model: Write, tmp_path: Path) -> None:
    path = write_model("fixed.onnx", sizes=("B", "S", 3, 56, "W"))
    with pytest.raises(EngineError) as error:
        build_in_child(path, tmp_path / "plan")
    assert one_line(error) == (
        "fixed.onnx: its height is fixed at 56, the profile asks for 56:56:112; "
        "build with --height 56 or export with a free height"
    )


def test_a_profile_the_graph_cannot_run_is_refused(write_model: Write, build_here: Build) -> None:
    profile = ShapeProfile.from_ranges(views="1", height="14", width="14")  # 588 values: no multiple of 64
    with pytest.raises(EngineError, match=r"Reshape_0: reshape wildcard -1 has no integer solution") as error:
        build_here(write_model("small.onnx"), profile=profile)
    one_line(error)


def test_an_unknown_capability_is_refused_with_the_known_ones(write_model: Write, build_here: Build) -> None:
    with pytest.raises(InputError, match=r"^compute capability 9\.0: TensorRT-RTX .* builds for .*8\.9, 12\.0"):
        build_here(write_model("small.onnx"), compute_capabilities=[(8, 0), (9, 0)])


def test_a_missing_model_is_refused_before_any_process_starts(write_model: Write, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nope\.onnx: no such file"):
        build_in_child(tmp_path / "nope.onnx", tmp_path / "plan")


@pytest.mark.parametrize("size", [0, -1])
def test_a_workspace_that_is_none_is_refused(write_model: Write, tmp_path: Path, size: int) -> None:
    with pytest.raises(InputError, match=rf"^workspace of {size} bytes: give a positive number"):
        build_in_child(write_model("small.onnx"), tmp_path / "plan", flags=trt.BuildFlags(workspace_bytes=size))


def test_an_unwritable_place_is_an_error(write_model: Write, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="absent/plan: No such file or directory after 0 MB of the engine; make room"):
        build_in_child(write_model("small.onnx"), tmp_path / "absent" / "plan")


# Which builder


def test_auto_takes_tensorrt_where_it_sees_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt, "require", lambda builder: None)
    monkeypatch.setattr(trt, "available", lambda: {"tensorrt": "11.4.0", "tensorrt-rtx": "1.7.1"})
    monkeypatch.setattr(trt, "visible_gpus", lambda: [(8, 9)])
    assert engine_build.resolve_builder("auto") == "tensorrt"
    monkeypatch.setattr(trt, "visible_gpus", list)
    assert engine_build.resolve_builder("auto") == "tensorrt-rtx"
    assert engine_build.resolve_builder("tensorrt") == "tensorrt"


@pytest.mark.parametrize("installed", [{}, {"tensorrt": "11.4.0"}])
def test_no_usable_builder_names_the_package(monkeypatch: pytest.MonkeyPatch, installed: dict[str, str]) -> None:
    monkeypatch.setattr(trt, "available", lambda: installed)
    monkeypatch.setattr(trt, "visible_gpus", list)
    with pytest.raises(EngineError, match=r"pip install 'moe3d-deploy\[rtx\]'$"):
        engine_build.resolve_builder("auto")


def test_a_builder_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="builder 'trtexec' is unknown; use one of tensorrt, tensorrt-rtx"):
        engine_build.resolve_builder("trtexec")
    monkeypatch.setattr(installed, "_is_installed", lambda module: False)
    with pytest.raises(MissingExtraError, match=r"tensorrt is not installed: pip install 'moe3d-deploy\[trt\]'"):
        engine_build.resolve_builder("tensorrt")


def test_a_process_keeps_its_first_builder(
    write_model: Write, build_here: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model("small.onnx")
    build_here(path)
    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("tensorrt"))
    monkeypatch.setattr(installed, "require", lambda builder: None)
    with pytest.raises(EngineError, match="cannot use TensorRT; start another process"):
        trt.build_engine(path, tmp_path / "plan", PROFILE, builder="tensorrt")


def test_targets_are_known_before_a_library_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trt.target_capabilities("tensorrt-rtx") == trt.RTX_CAPABILITIES
    assert trt.target_capabilities("tensorrt-rtx", [(8, 9), (8, 6), (8, 9)]) == ((8, 9), (8, 6))
    monkeypatch.setattr(installed, "visible_gpus", lambda: [(8, 7), (8, 9)])
    assert trt.target_capabilities("tensorrt") == ((8, 7),)
    with pytest.raises(InputError, match="builds for this machine's GPU"):
        trt.target_capabilities("tensorrt", [(8, 9)])
    monkeypatch.setattr(installed, "visible_gpus", list)
    with pytest.raises(EngineError, match="none is visible; use tensorrt-rtx"):
        trt.target_capabilities("tensorrt")


def test_visible_gpus_asks_the_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = [(8, 7), (12, 0)]

    class Driver:
        cuInit = staticmethod(lambda flags: 0)

        @staticmethod
        def cuDeviceGetCount(count: Any) -> int:
            count._obj.value = len(capabilities)
            return 0

        @staticmethod
        def cuDeviceGet(device: Any, index: int) -> int:
            device._obj.value = index
            return 0

        @staticmethod
        def cuDeviceGetAttribute(value: Any, attribute: int, device: Any) -> int:
            value._obj.value = capabilities[device.value][attribute - 75]
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver)
    assert trt.visible_gpus() == capabilities


def test_the_runner_says_that_it_needs_a_gpu(built: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "visible_gpus", list)
    with pytest.raises(EngineError, match=r"^fp16\.plan: running an engine needs an NVIDIA GPU and its driver"):
        trt.EngineRunner(built["fp16"]["plan"], builder="tensorrt-rtx")


@pytest.mark.skipif(bool(trt.visible_gpus()), reason="shows what happens where no engine loads; this machine has a GPU")
def test_an_engine_that_does_not_load_is_one_line(
    built: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installed, "visible_gpus", lambda: [(8, 9)])
    with pytest.raises(EngineError, match=r"^fp16\.plan: TensorRT-RTX .* cannot load it: Cuda Runtime") as error:
        trt.EngineRunner(built["fp16"]["plan"], builder="tensorrt-rtx")
    assert "/_src" not in one_line(error)

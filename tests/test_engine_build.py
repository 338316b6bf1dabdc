"""Engines from small ONNX models: TensorRT-RTX builds them without a GPU; running them needs one."""

import ctypes
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe3d_deploy import trt
from moe3d_deploy.engines import build as engine_build
from moe3d_deploy.engines.shapes import ShapeProfile
from moe3d_deploy.errors import EngineError, InputError, MissingExtraError
from moe3d_deploy.manifest import EngineRecord
from moe3d_deploy.trt import library

PROFILE = ShapeProfile.from_ranges(views="1:2:12", height="56:56:112", width="56")
pytestmark = pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")
Write = Callable[..., Path]
Build = Callable[..., trt.BuiltEngine]


@pytest.fixture(scope="session")
def write_model(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """write(name, dtype="fp16", layers=2, attention=False, sizes=..., tail=None, functions=()) -> path of an ONNX file.

    images (B, S, 3, H, W) -> tokens of 64 channels -> `layers` of MatMul, Relu and maybe attention -> depth, float32.
    """
    pytest.importorskip("tensorrt_rtx", reason="builds engines: pip install 'moe3d-deploy[rtx]'")
    onnx = pytest.importorskip("onnx", reason="writes ONNX models: pip install 'moe3d-deploy[export]'")
    folder = tmp_path_factory.mktemp("models")

    def write(
        name: str,
        dtype: str = "fp16",
        layers: int = 2,
        attention: bool = False,
        sizes: tuple[int | str, ...] = ("B", "S", 3, "H", "W"),
        tail: tuple[str, str] | None = None,
        functions: tuple[Any, ...] = (),
    ) -> Path:
        half = onnx.TensorProto.FLOAT16 if dtype == "fp16" else onnx.TensorProto.FLOAT
        rng = np.random.default_rng(0)
        nodes: list[Any] = []
        weights: list[Any] = []

        def constant(value: np.ndarray) -> str:
            weights.append(onnx.numpy_helper.from_array(value, f"w{len(weights)}"))
            return str(weights[-1].name)

        def node(op: str, *inputs: str, **attributes: Any) -> str:
            output = f"t{len(nodes)}"
            nodes.append(onnx.helper.make_node(op, inputs, [output], name=f"{op}_{len(nodes)}", **attributes))
            return output

        def linear(x: str) -> str:
            weight = rng.standard_normal((64, 64)) / 8
            return node("MatMul", x, constant(weight.astype(np.float16 if dtype == "fp16" else np.float32)))

        def heads(x: str, perm: tuple[int, ...] = (0, 2, 1, 3)) -> str:
            return node("Transpose", node("Reshape", x, constant(np.array([0, -1, 2, 32]))), perm=perm)

        x = node("Cast", node("Reshape", "images", constant(np.array([0, -1, 64]))), to=half)
        for _ in range(layers):
            if attention:
                q, k, v = heads(linear(x)), heads(linear(x), (0, 2, 3, 1)), heads(linear(x))
                mixed = node("MatMul", node("Softmax", node("MatMul", q, k), axis=-1), v)
                x = node("Reshape", node("Transpose", mixed, perm=[0, 2, 1, 3]), constant(np.array([0, -1, 64])))
            x = node("Relu", linear(x))
        x = node("Cast", x, to=onnx.TensorProto.FLOAT)
        if tail:
            x = node(tail[0], x, domain=tail[1])
        nodes[-1].output[0] = "depth"
        graph = onnx.helper.make_graph(
            nodes,
            "test",
            [onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, sizes)],
            [onnx.helper.make_tensor_value_info("depth", onnx.TensorProto.FLOAT, None)],
            weights,
        )
        opsets = [onnx.helper.make_opsetid("", 20)] + ([onnx.helper.make_opsetid(tail[1], 1)] if tail else [])
        model = onnx.helper.make_model(graph, opset_imports=opsets, functions=functions, ir_version=9)
        onnx.save(model, folder / name)
        return folder / name

    return write


@pytest.fixture(scope="session")
def built(write_model: Write, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Records of an fp16 and an fp32 attention engine, with the plan's path and the progress events added."""
    folder = tmp_path_factory.mktemp("built")

    def build(dtype: str) -> dict[str, Any]:
        model, plan = write_model(f"attention_{dtype}.onnx", dtype, attention=True), folder / f"{dtype}.plan"
        events: list[tuple[str, int, int]] = []
        record = engine_build.build(
            model, plan, PROFILE, precision=dtype, builder="tensorrt-rtx", progress=lambda *event: events.append(event)
        )
        return {"record": record, "plan": plan, "events": events}

    return {dtype: build(dtype) for dtype in ("fp16", "fp32")}


@pytest.fixture
def build_here(tmp_path: Path) -> Build:
    """build_here(onnx_path, out=tmp_path / "plan", profile=PROFILE, **options): build in this process."""

    def build(
        path: Path, out: Path = tmp_path / "plan", profile: ShapeProfile = PROFILE, **options: Any
    ) -> trt.BuiltEngine:
        return trt.build_engine(path, out, profile, builder="tensorrt-rtx", **options)

    return build


def build_in_child(path: Path, out: Path, **options: Any) -> dict[str, Any]:
    return engine_build.build(path, out, PROFILE, precision="fp16", builder="tensorrt-rtx", **options)


# What a build leaves


def test_a_build_writes_the_plan_and_a_record_for_the_manifest(built: dict[str, dict[str, Any]]) -> None:
    record, plan = built["fp16"]["record"], built["fp16"]["plan"]
    assert plan.stat().st_size == record["build"]["plan_bytes"] > 10_000
    assert record["builder"] == "tensorrt-rtx"
    assert record["builder_version"] == trt.available()["tensorrt-rtx"]
    assert record["compute_capabilities"] == [80, 86, 89, 120]
    assert record["precision"] == "fp16"
    assert record["profiles"] == [PROFILE.as_dict()]
    assert record["plugin"] is None
    assert {field.name for field in dataclasses.fields(EngineRecord)} == {"file", *record}
    assert json.loads(json.dumps(record)) == record


def test_build_figures_are_of_the_child(built: dict[str, dict[str, Any]]) -> None:
    figures = built["fp16"]["record"]["build"]
    assert 0 < figures["build_seconds"] < figures["seconds"]
    # TensorRT-RTX's libraries alone take more than 50 MB; an interpreter takes 10.
    assert figures["peak_bytes"] > 50e6
    assert figures["host_cpu"]


def test_the_peak_is_not_the_parents(write_model: Write, tmp_path: Path) -> None:
    ballast = np.ones(500_000_000, np.uint8)
    record = build_in_child(write_model("small.onnx"), tmp_path / "plan")
    assert record["build"]["peak_bytes"] < ballast.nbytes


def test_progress_rises_within_each_phase(built: dict[str, dict[str, Any]]) -> None:
    events = built["fp16"]["events"]
    phases = list(dict.fromkeys(phase for phase, _, _ in events))
    assert phases[:2] == ["Parsing the model", "Building engine"]
    assert events[-1] == ("Writing the engine", 1, 1)
    for phase in phases:
        steps = [step for name, step, _ in events if name == phase]
        assert all(0 <= step <= total for name, step, total in events if name == phase)
        assert all(after >= before or after == 0 for before, after in zip(steps, steps[1:], strict=False))


# What is known of an engine without a GPU


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_the_audit_tells_fp16_from_fp32(built: dict[str, dict[str, Any]], dtype: str) -> None:
    audit = built[dtype]["record"]["audit"]
    # Two layers of q, k, v, scores, values and the one before Relu.
    assert audit["network"]["matmul"] == {dtype: 12}
    assert set(audit["compiled"]["layers"]["gemm"]) == {dtype}
    assert audit["strongly_typed"] is True
    assert audit["tf32"] is False


def test_fused_attention_is_counted_in_the_compiled_layers(built: dict[str, dict[str, Any]]) -> None:
    """TensorRT-RTX has a fused kernel for fp16 and none for fp32, whose logits then take memory."""
    half, full = (built[dtype]["record"]["audit"] for dtype in ("fp16", "fp32"))
    assert half["compiled"]["fused_attention"] == 2
    assert full["compiled"]["fused_attention"] == 0
    # 12 views of 3 x 112 x 56 values in tokens of 64: 3528 tokens, so 3528^2 float32 logits for each of 2 heads.
    assert full["activation_memory_bytes"][0] > 2 * 3528**2 * 4 > half["activation_memory_bytes"][0]


def test_no_listing_means_no_claim_about_compiled_layers() -> None:
    assert engine_build.compiled_layers("") is None


def test_function_calls_and_the_absence_of_plugins_are_seen(write_model: Write, build_here: Build) -> None:
    onnx = pytest.importorskip("onnx")
    body = [onnx.helper.make_node("Neg", ["mix_x"], ["mix_y"], name="mix_neg")]
    function = onnx.helper.make_function(
        "moe3d", "ExpertMix", ["mix_x"], ["mix_y"], body, [onnx.helper.make_opsetid("", 20)]
    )
    path = write_model("function.onnx", tail=("ExpertMix", "moe3d"), functions=(function,))
    facts = build_here(path).facts
    assert facts.functions == {"ExpertMix": 1}
    assert facts.plugins == ()


def test_a_build_in_this_process_prints_nothing_and_restores_what_it_set(
    write_model: Write, build_here: Build, capfd: pytest.CaptureFixture[str]
) -> None:
    environment, lines = dict(os.environ), list[str]()
    engine = build_here(write_model("small.onnx"), compute_capabilities=[(8, 9)], log=lines.append)
    assert capfd.readouterr() == ("", "")
    assert dict(os.environ) == environment
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert engine.compute_capabilities == ((8, 9),)
    assert engine.log == tuple(lines)
    assert any("Total Activation Memory" in line for line in lines)


# Writing the plan


def test_the_plan_is_streamed_and_never_whole_in_memory(
    write_model: Write, build_here: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, plan = write_model("small.onnx"), tmp_path / "plan"
    library.load("tensorrt-rtx")
    monkeypatch.setattr("polygraphy.backend.trt.engine_bytes_from_network", None)
    assert build_here(path, plan).plan_bytes == plan.stat().st_size > 10_000


def test_a_builder_that_cannot_stream_gives_the_same_engine(
    write_model: Write, build_here: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, streamed, whole = write_model("small.onnx"), tmp_path / "streamed", tmp_path / "whole"
    build_here(path, streamed)
    monkeypatch.delattr(library.load("tensorrt-rtx").Builder, "build_serialized_network_to_stream")
    phases: list[str] = []
    engine = build_here(path, whole, progress=lambda phase, step, total: phases.append(phase))
    assert engine.plan_bytes == whole.stat().st_size == streamed.stat().st_size
    # Two builds in a row are never quite equal: of 186,700 bytes, about 40 differed, streamed or not.
    plans = [np.frombuffer(path.read_bytes(), np.uint8) for path in (whole, streamed)]
    assert np.mean(plans[0] != plans[1]) < 0.01
    assert phases[-1] == "Writing the engine"


FULL = Path("/dev/full")  # takes no byte: ENOSPC
needs_full = pytest.mark.skipif(not FULL.is_char_device(), reason="needs the device /dev/full")


@needs_full
@pytest.mark.parametrize("streams", [True, False])
def test_a_full_disk_is_one_line_and_nothing_is_raised_inside_the_builder(
    write_model: Write,
    build_here: Build,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    streams: bool,
) -> None:
    if not streams:
        monkeypatch.delattr(library.load("tensorrt-rtx").Builder, "build_serialized_network_to_stream")
    (tmp_path / "link").symlink_to(FULL)
    with pytest.raises(EngineError) as error:
        build_here(write_model("small.onnx"), tmp_path / "link")
    assert one_line(error) == (
        f"{tmp_path}/link: No space left on device after 0 MB of the engine; make room or choose another place"
    )
    assert capfd.readouterr() == ("", "")  # the binding prints what is raised in a callback, and goes on


@needs_full
def test_a_full_disk_ends_the_child_with_the_same_line(write_model: Write, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(FULL)
    with pytest.raises(EngineError, match="link: No space left on device after 0 MB of the engine") as error:
        build_in_child(write_model("small.onnx"), tmp_path / "link")
    one_line(error)
    assert list(tmp_path.iterdir()) == []


# Models and arguments that cannot be used


def one_line(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 500
    return text


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
    monkeypatch.setattr(library, "_is_installed", lambda module: False)
    with pytest.raises(MissingExtraError, match=r"tensorrt is not installed: pip install 'moe3d-deploy\[trt\]'"):
        engine_build.resolve_builder("tensorrt")


def test_a_process_keeps_its_first_builder(
    write_model: Write, build_here: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_model("small.onnx")
    build_here(path)
    monkeypatch.setitem(sys.modules, "tensorrt", types.ModuleType("tensorrt"))
    monkeypatch.setattr(library, "require", lambda builder: None)
    with pytest.raises(EngineError, match="cannot use TensorRT; start another process"):
        trt.build_engine(path, tmp_path / "plan", PROFILE, builder="tensorrt")


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
    monkeypatch.setattr(library, "visible_gpus", list)
    with pytest.raises(EngineError, match=r"^fp16\.plan: running an engine needs an NVIDIA GPU and its driver"):
        trt.EngineRunner(built["fp16"]["plan"], builder="tensorrt-rtx")


@pytest.mark.skipif(bool(trt.visible_gpus()), reason="shows what happens where no engine loads; this machine has a GPU")
def test_an_engine_that_does_not_load_is_one_line(
    built: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(library, "visible_gpus", lambda: [(8, 9)])
    with pytest.raises(EngineError, match=r"^fp16\.plan: TensorRT-RTX .* cannot load it: Cuda Runtime") as error:
        trt.EngineRunner(built["fp16"]["plan"], builder="tensorrt-rtx")
    assert "/_src" not in one_line(error)


# Ending a build early


def test_cancelling_stops_after_the_current_step(write_model: Write, build_here: Build) -> None:
    events: list[str] = []
    with pytest.raises(EngineError, match=r"^small\.onnx: the engine build was cancelled"):
        build_here(
            write_model("small.onnx"),
            progress=lambda phase, step, total: events.append(phase),
            cancelled=lambda: "Cloning network graph" in events,
        )
    assert "Computing profile costs" not in events


def test_what_the_progress_function_raises_comes_out(write_model: Write, build_here: Build) -> None:
    def fail(phase: str, step: int, total: int) -> None:
        raise ValueError("the screen is gone")

    with pytest.raises(ValueError, match="the screen is gone"):
        build_here(write_model("small.onnx"), progress=fail)


def test_an_interrupt_in_this_process_ends_the_build(write_model: Write, build_here: Build) -> None:
    phases: list[str] = []

    def interrupt(phase: str, step: int, total: int) -> None:
        phases.append(phase)
        if phase == "Building engine":
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build_here(write_model("small.onnx"), progress=interrupt)
    assert "Computing profile costs" not in phases
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_while_the_plan_is_written_ends_the_build(
    write_model: Write, build_here: Build, tmp_path: Path
) -> None:
    events: list[tuple[str, int, int]] = []

    def interrupt(*event: Any) -> None:
        events.append(event)
        if event[0] == "Writing the engine":
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        build_here(write_model("small.onnx"), progress=interrupt)
    assert events[-1] == ("Writing the engine", 0, 1)


def test_a_killed_builder_is_one_line_and_leaves_nothing(write_model: Write, tmp_path: Path) -> None:
    def kill(phase: str, step: int, total: int) -> None:
        for pid in children(os.getpid()):
            os.kill(pid, signal.SIGKILL)

    path = write_model("slow.onnx", layers=150)
    with pytest.raises(EngineError, match=r"^slow\.onnx: .*killed.*memory.* lower the largest shape") as error:
        build_in_child(path, tmp_path / "plan", progress=kill)
    one_line(error)
    assert not (tmp_path / "plan").exists()


def test_ctrl_c_ends_a_busy_build_at_once_and_leaves_nothing(write_model: Write, tmp_path: Path) -> None:
    """The signal comes while the builder compiles, in the step that takes most of the time and cannot be cancelled."""
    script = f"""
        from pathlib import Path
        from moe3d_deploy.engines.build import build
        from moe3d_deploy.engines.shapes import ShapeProfile

        last = None

        def progress(*event):
            global last
            if event == last:  # told again after a second of silence
                print("compiling", flush=True)
            last = event

        profile = ShapeProfile.from_dict({PROFILE.as_dict()})
        build({str(write_model("busy.onnx", layers=150, attention=True))!r}, {str(tmp_path / "plan")!r}, profile,
              precision="fp16", builder="tensorrt-rtx", progress=progress)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "compiling\n"
        builders = children(process.pid)
        caught = re.findall(r"SigCgt:\s+(\w+)", Path(f"/proc/{builders[0]}/status").read_text())
        assert not int(caught[0], 16) & 1 << signal.SIGINT - 1  # a Python handler would wait for the step to end
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert errors.rstrip().endswith("KeyboardInterrupt")
    # Left alone, the step takes from 4 to 20 s on two cores; waiting for a child that does not stop takes 10 s.
    assert time.monotonic() - started < 3
    assert len(builders) == 1
    assert not any(Path(f"/proc/{pid}").exists() for pid in builders)
    assert list(tmp_path.iterdir()) == []


def test_a_long_step_shows_life(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_build, "REPEAT_SECONDS", 0.01)
    events: list[dict[str, Any]] = []
    with engine_build._Reporter(events.append) as reporter:
        reporter.progress("Compiling", 1, 5)
        deadline = time.monotonic() + 10
        while len(events) < 3 and time.monotonic() < deadline:
            time.sleep(0.005)
    assert len(events) >= 3
    assert {(event["phase"], event["step"], event["total"]) for event in events} == {("Compiling", 1, 5)}


def children(parent: int) -> list[int]:
    """Process ids whose parent is `parent`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended meanwhile
        if int(fields[1]) == parent:
            found.append(int(stat.parent.name))
    return found

"""A build's plan, record and progress, what is known of an engine without a GPU, and the plan's way to the disk."""

import dataclasses
import json
import os
import signal
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine_models import PROFILE, Build, Write, build_in_child, one_line

from moe3d_deploy import trt
from moe3d_deploy.engines import build as engine_build
from moe3d_deploy.errors import EngineError
from moe3d_deploy.manifest import EngineRecord
from moe3d_deploy.trt import installed
from moe3d_deploy.trt.network import network_facts

pytest_plugins = ["engine_fixtures"]
pytestmark = pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")


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
    known = {"file", "part"}  # the bundle says which
    assert {field.name for field in dataclasses.fields(EngineRecord)} == {*known, *record}
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
def test_the_record_tells_fp16_from_fp32(built: dict[str, dict[str, Any]], dtype: str) -> None:
    audit = built[dtype]["record"]["audit"]
    # Two layers of q, k, v, scores, values and the one before Relu.
    assert audit["network"]["matmul"] == {dtype: 12}
    assert set(audit["compiled"]["layers"]["gemm"]) == {dtype}
    assert audit["network"]["strongly_typed"] is True
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


def test_a_listing_in_which_nothing_is_found_is_one_without_fused_attention() -> None:
    assert engine_build.compiled_layers("Layers:\nin a new format") == {"layers": {}, "fused_attention": 0}


def listed(*names: str) -> str:
    tail = "Inputs: [ { Name: x, Datatype: Half } ], Constants: []"
    return "Layers:\n" + "\n".join(f"Name: {name}, LayerType: kgen, {tail}" for name in names)


def test_several_profiles_are_as_fused_as_the_one_that_is_least() -> None:
    """They are compiled one by one, into the graphs myl0, myl1, ...; the form is that of TensorRT-RTX 1.7.1."""
    first = ("_gemm_mha_v2_myl0_2", "_gemm_mha_v2_myl0_5", "MatMul_16_myl0_3")
    second = ("_gemm_mha_v2_myl1_7", "MatMul_16 [profile 1]_myl1_8")

    def fused(names: tuple[str, ...], profiles: int) -> Any:
        layers = engine_build.compiled_layers(listed(*names), profiles)
        assert layers is not None
        return layers["fused_attention"]

    assert fused(first, 1) == 2
    assert fused(first + second, 2) == 1
    assert fused((*first, second[1]), 2) == 0
    assert fused(first + second, 3) == 0, "one that is not found is not fused"
    assert fused(("_gemm_mha_v2", "_gemm_mha_v2"), 2) == 0


def test_whether_types_are_the_graphs_is_read_from_the_network() -> None:
    class Network(list[Any]):
        def get_flag(self, flag: int) -> bool:
            return bool(7 >> flag & 1)

    def library_with(**flags: int) -> Any:
        return types.SimpleNamespace(NetworkDefinitionCreationFlag=types.SimpleNamespace(**flags))

    assert network_facts(library_with(STRONGLY_TYPED=1), Network()).strongly_typed is True
    assert network_facts(library_with(STRONGLY_TYPED=3), Network()).strongly_typed is False
    assert network_facts(library_with(), Network()).strongly_typed is True  # TensorRT 11: there is no other kind


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


# The log


def test_the_log_is_kept_without_the_folders_of_this_machine(write_model: Write, tmp_path: Path) -> None:
    model = write_model("small.onnx")
    flags = trt.BuildFlags(workspace_bytes=1 << 30, optimization_level=1, weight_streaming=True)
    record = build_in_child(model, tmp_path / "plan", flags=flags, log_path=tmp_path / "log")
    text = (tmp_path / "log").read_text()
    assert "Input filename:   small.onnx\n" in text
    assert "Total Activation Memory: " in text
    assert str(model.parent) not in text
    assert "site-packages" not in text
    assert record["build"]["flags"] == {
        "workspace_bytes": 1 << 30, "optimization_level": 1, "weight_streaming": True,
    }  # fmt: skip


def test_a_log_that_cannot_be_written_leaves_the_build_alone() -> None:
    with engine_build._log_file({"log_path": "/dev/full", "onnx_path": "m.onnx"}) as log:
        assert log is not None
        log("a line")


# Writing the plan


def test_the_plan_is_streamed_and_never_whole_in_memory(
    write_model: Write, build_here: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, plan = write_model("small.onnx"), tmp_path / "plan"
    installed.load("tensorrt-rtx")
    monkeypatch.setattr("polygraphy.backend.trt.engine_bytes_from_network", None)
    assert build_here(path, plan).plan_bytes == plan.stat().st_size > 10_000


def test_a_builder_that_cannot_stream_gives_the_same_engine(
    write_model: Write, build_here: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, streamed, whole = write_model("small.onnx"), tmp_path / "streamed", tmp_path / "whole"
    build_here(path, streamed)
    monkeypatch.delattr(installed.load("tensorrt-rtx").Builder, "build_serialized_network_to_stream")
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
        monkeypatch.delattr(installed.load("tensorrt-rtx").Builder, "build_serialized_network_to_stream")
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

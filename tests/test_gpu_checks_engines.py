"""The GPU checks of TensorRT-RTX and ONNX Runtime, on the CPU: comparisons, placement, and what a failure says.

Not run here: an engine that loads, and ONNX Runtime on a card.
"""

import dataclasses
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from inspections import FIRST, fused, layer, text_of
from recorder import Recorder
from trained_weights import ship_small

from moe3d_deploy import trt
from moe3d_deploy.benchmarks import bundle_reference, checks_engines
from moe3d_deploy.benchmarks.checks_onnxruntime import misplaced, placement, profiled_session
from moe3d_deploy.bundle import Bundle
from moe3d_deploy.checkpoint import load_model, open_checkpoint
from moe3d_deploy.child import ChildResult
from moe3d_deploy.config import PRESETS
from moe3d_deploy.engines.shapes import ShapeProfile
from moe3d_deploy.errors import EngineError, InputError, Moe3dError

ENGINE = "engines/tiny.plan"


@pytest.fixture
def run(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path)


def test_shapes_to_try_are_the_profiles_own_and_one_between() -> None:
    profile = ShapeProfile.from_ranges(views="1:2:4", height="140:392:518", width="518")
    assert checks_engines.shapes_to_try(profile) == [
        (1, 1, 140, 518),
        (1, 2, 392, 518),
        (1, 4, 518, 518),
        (1, 3, 322, 518),  # (1 + 4 + 1) / 2 views, 329 pixels down to a multiple of 14
    ]
    assert all(profile.accepts(shape) for shape in checks_engines.shapes_to_try(profile))


def test_one_shape_is_tried_once() -> None:
    assert checks_engines.shapes_to_try(ShapeProfile.from_ranges("1", "2", "56", "84")) == [(1, 2, 56, 84)]


class FakeRunner:
    """An engine that gives PyTorch's outputs times a factor."""

    factor = 1.0
    seed: int | None = 0
    error: EngineError | None = None

    def __init__(self, path: Path, *, builder: str, built_by: str) -> None:
        assert (path.name, builder, bool(built_by)) == ("tiny.plan", "tensorrt-rtx", True)
        self.model = load_model(open_checkpoint("moe3d-tiny", seed=self.seed))

    def __enter__(self) -> "FakeRunner":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self.error:
            raise self.error
        with torch.inference_mode():
            outputs = self.model(torch.from_numpy(inputs["images"]))
        return {name: outputs[name].numpy() * self.factor for name in ("depth", "extrinsics")}


def checkpoint_of(seed: int | None) -> SimpleNamespace:
    """What a manifest says of the preset's weights."""
    source = open_checkpoint("moe3d-tiny", seed=seed)
    return SimpleNamespace(origin=source.origin, sha256=source.sha256())


@pytest.fixture
def engine_bundle(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A bundle of moe3d-tiny with an engine for sm80 and sm89 on an sm90 card; loading is told by `.loading`."""
    profile = SimpleNamespace(min=(1, 1, 28, 42), opt=(1, 2, 28, 42), max=(1, 2, 28, 42))
    record = SimpleNamespace(
        file=ENGINE,
        builder="tensorrt-rtx",
        builder_version="1.7.1",
        compute_capabilities=(80, 89),
        profiles=(profile,),
    )
    manifest = SimpleNamespace(
        engines=(record,),
        checkpoint=checkpoint_of(seed=0),
        outputs=(SimpleNamespace(name="depth"), SimpleNamespace(name="extrinsics")),
        precision="fp16",
        config=PRESETS["moe3d-tiny"],
    )
    bundle = SimpleNamespace(manifest=manifest, engine_path=lambda record: Path(record.file))
    bundle.loading = {"says": [], "validity": "VALID", "diagnostics": [], "loaded": True}

    bundle.inspector = {"told": True, "reason": None}

    def run_in_child(function: str, request: dict[str, Any], on_event: Any = None) -> ChildResult:
        assert request["plan"] == ENGINE
        if function.endswith(":inspect"):
            if isinstance(bundle.inspector, Moe3dError):
                raise bundle.inspector
            return ChildResult(bundle.inspector, 0.1, 1)
        assert function.endswith(":try_to_load")
        if isinstance(bundle.loading, Moe3dError):
            on_event({"validity": "VALID", "says": []})
            raise bundle.loading
        return ChildResult(bundle.loading, 0.1, 1)

    monkeypatch.setattr(trt, "require", lambda builder: None)
    monkeypatch.setattr(trt, "available", lambda: {"tensorrt-rtx": "1.7.1"})
    monkeypatch.setattr(trt, "visible_gpus", lambda: [(9, 0)])
    monkeypatch.setattr(trt, "EngineRunner", FakeRunner)
    monkeypatch.setattr(checks_engines, "find_bundle", lambda run: bundle)
    monkeypatch.setattr(checks_engines, "run_in_child", run_in_child)
    return bundle


def test_an_engine_that_runs_right_passes_even_if_built_for_other_cards(run: Recorder, engine_bundle: Any) -> None:
    checks_engines.rtx_engine_runs(run)
    assert run.failures == []
    (engine,) = run.figures["engines"]
    assert (run.figures["card"], engine["compute_capabilities"]) == (90, [80, 89])
    assert engine["built_for_this_card"] is False
    assert [case["shape"] for case in engine["shapes"]] == [[1, 1, 28, 42], [1, 2, 28, 42]]
    assert all(case["errors"]["depth"]["max"] < 1e-5 for case in engine["shapes"])  # the same float32 model twice


def test_what_the_inspector_tells_is_kept_and_its_silence_is_a_note(run: Recorder, engine_bundle: Any) -> None:
    checks_engines.rtx_engine_runs(run)
    assert run.figures["engines"][0]["inspector"] == {"told": True, "reason": None}
    assert run.notes == []
    engine_bundle.inspector = Moe3dError("inspect ended with code -11: segmentation fault")
    checks_engines.rtx_engine_runs(run)
    assert run.figures["engines"][0]["inspector"]["told"] is False
    assert run.notes == [
        "tiny.plan: the engine inspector tells nothing: inspect ended with code -11: segmentation fault"
    ]
    assert run.failures == []


def test_the_inspectors_text_is_kept_as_it_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    text = text_of(fused(FIRST), *[layer(f"l{i}", "gemm") for i in range(100)])
    monkeypatch.setattr(trt, "layer_information", lambda plan, *, builder: text)
    facts = checks_engines.inspect({"plan": ENGINE}, lambda event: None)
    assert (facts["characters"], facts["begins"]) == (len(text), text[:2000])
    assert facts["layers"] == {"kgen": {"fp16": 1}, "gemm": {"fp16": 100}}


def test_a_split_bundle_is_skipped_by_the_checks_that_take_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = SimpleNamespace(manifest=SimpleNamespace(split="heads"))
    monkeypatch.setattr(bundle_reference.Bundle, "open", lambda path: split)
    with pytest.raises(Exception, match="the bundle's model is split over two files, and the check takes one"):
        bundle_reference.find_bundle(Recorder(tmp_path, tmp_path / "bundle"))


def test_an_engine_with_wrong_depth_fails(run: Recorder, engine_bundle: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeRunner, "factor", 1.1)
    checks_engines.rtx_engine_runs(run)
    assert "tiny.plan at 1x1x28x42: depth is off by 0.1 (max relative), limit 0.01" in run.failures


def test_an_engine_that_does_not_load_fails_with_the_librarys_own_words(run: Recorder, engine_bundle: Any) -> None:
    says = ["INFO: Loaded engine size: 7 MiB", "ERROR: no kernel for this device", "ERROR: another"]
    engine_bundle.loading = {"says": says, "validity": "INVALID", "diagnostics": ["UNSUPPORTED_CC"], "loaded": False}
    checks_engines.rtx_engine_runs(run)
    assert run.failures == [
        "tiny.plan does not load; validity: INVALID UNSUPPORTED_CC; the library says: ERROR: no kernel for this device"
    ]
    assert run.figures["engines"][0]["loading"] == engine_bundle.loading
    assert "shapes" not in run.figures["engines"][0]


def test_a_crash_while_loading_is_kept_with_what_was_known_before(run: Recorder, engine_bundle: Any) -> None:
    engine_bundle.loading = Moe3dError("try_to_load ended with code -6: abort")
    checks_engines.rtx_engine_runs(run)
    assert len(run.failures) == 1
    assert "validity: VALID; the library says: try_to_load ended with code -6: abort" in run.failures[0]
    assert run.figures["engines"][0]["loading"]["loaded"] is False


def test_an_engine_that_loads_but_does_not_run_fails(
    run: Recorder, engine_bundle: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeRunner, "error", EngineError("tiny.plan: the engine did not run: no memory"))
    checks_engines.rtx_engine_runs(run)
    assert run.failures == ["tiny.plan: the engine did not run: no memory"]
    assert run.figures["engines"][0]["run_error"] == run.failures[0]


def test_a_bundle_whose_weights_no_preset_has_is_skipped(run: Recorder, engine_bundle: Any) -> None:
    engine_bundle.manifest.checkpoint.origin = "VGGT-1B"
    with pytest.raises(Exception, match="the bundle's weights are 'VGGT-1B'; give a bundle of a preset"):
        checks_engines.rtx_engine_runs(run)


def test_a_bundle_of_the_shipped_weights_is_compared_with_them(
    run: Recorder, engine_bundle: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ship_small(tmp_path, monkeypatch)
    engine_bundle.manifest.checkpoint = checkpoint_of(seed=None)
    engine_bundle.manifest.config = PRESETS["moe3d-tiny"]
    assert engine_bundle.manifest.checkpoint.origin == "preset:moe3d-tiny trained weights"
    checks_engines.rtx_engine_runs(run)
    assert any("tiny.plan at 1x1x28x42: depth is off by " in failure for failure in run.failures)  # still seed 0's

    run.failures.clear()
    monkeypatch.setattr(FakeRunner, "seed", None)
    checks_engines.rtx_engine_runs(run)
    assert run.failures == []


@pytest.mark.parametrize("changed", ["weights", "config"])
def test_a_bundle_of_another_versions_preset_is_skipped(run: Recorder, engine_bundle: Any, changed: str) -> None:
    """A preset and its trained weights may change; what the bundle was made of is gone then."""
    manifest = engine_bundle.manifest
    if changed == "weights":
        manifest.checkpoint.sha256 = "0" * 64
    else:
        manifest.config = dataclasses.replace(manifest.config, img_size=252)
    with pytest.raises(Exception, match="'preset:moe3d-tiny seed 0' of another version of moe3d-deploy; export it"):
        checks_engines.rtx_engine_runs(run)


def build_for(
    run: Recorder, monkeypatch: pytest.MonkeyPatch, card: tuple[int, int], refusal: Moe3dError | None = None
) -> list[Any]:
    """Build for a card that the builder refuses or not; returns the capabilities asked for, attempt by attempt."""
    asked: list[Any] = []

    def build(model: Path, plan: Path, profile: ShapeProfile, **options: Any) -> dict[str, Any]:
        asked.append(options["compute_capabilities"])
        if refusal and card in asked[-1]:
            raise refusal
        capabilities = [10 * major + minor for major, minor in asked[-1]]
        return {"build": {}, "audit": {}, "compute_capabilities": capabilities, "builder_version": "1"}

    monkeypatch.setattr(checks_engines, "build", build)
    manifest = SimpleNamespace(config=PRESETS["moe3d-tiny"], precision="fp16")
    checks_engines._build(run, Bundle(Path("b"), manifest), card)  # type: ignore[arg-type]
    return asked


@pytest.fixture
def model_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bundle, "model_path", Path("model.onnx"))


def test_an_engine_is_built_for_this_card_too(run: Recorder, monkeypatch: pytest.MonkeyPatch, model_path: None) -> None:
    assert build_for(run, monkeypatch, (12, 1)) == [(*trt.RTX_CAPABILITIES, (12, 1))]
    assert run.notes == []


@pytest.mark.parametrize(
    "refusal",
    [InputError("compute capability 9.0: not among this builder's"), EngineError("model.onnx: cannot build it: GEMM")],
)
def test_a_card_that_the_builder_refuses_gets_the_engine_for_the_others_and_a_note(
    run: Recorder, monkeypatch: pytest.MonkeyPatch, model_path: None, refusal: Moe3dError
) -> None:
    asked = build_for(run, monkeypatch, (9, 0), refusal)
    assert asked == [(*trt.RTX_CAPABILITIES, (9, 0)), trt.RTX_CAPABILITIES]
    assert run.notes == [str(refusal)]


def test_the_library_tells_of_a_file_that_is_no_engine(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx", reason="asks TensorRT-RTX: pip install 'moe3d-deploy[rtx]'")
    plan = tmp_path / "bad.plan"
    plan.write_bytes(b"x" * 1000)
    events: list[dict[str, Any]] = []
    found = checks_engines.try_to_load({"plan": str(plan)}, lambda event: events.append(dict(event)))
    assert events[0]["validity"] == found["validity"] == "INVALID"
    assert found["diagnostics"] == ["MALFORMED_ENGINE"]
    assert found["loaded"] is False
    assert any(line.startswith("ERROR: ") for line in found["says"])


def test_what_cannot_be_exported_here_is_skipped_with_the_remedy(
    run: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    with pytest.raises(Exception, match="onnxscript is not installed, so nothing can be exported here; give --bundle"):
        bundle_reference.find_bundle(run)


def node(name: str, operator: str, provider: str) -> dict[str, Any]:
    return {"cat": "Node", "name": f"{name}_kernel_time", "args": {"op_name": operator, "provider": provider}}


def test_placement_counts_each_node_once_and_strays_are_compute_nodes_alone() -> None:
    events = [
        node("a", "MatMul", "CUDAExecutionProvider"),
        node("a", "MatMul", "CUDAExecutionProvider"),  # the second run
        node("b", "MatMul", "CPUExecutionProvider"),
        node("c", "Shape", "CPUExecutionProvider"),  # on the CPU by design
        {"cat": "Session", "name": "model_run", "args": {}},
        {"cat": "Node", "name": "d_fence_before", "args": {"op_name": "Conv"}},
    ]
    placed = placement(events)
    assert placed == {"CUDAExecutionProvider": {"MatMul": 1}, "CPUExecutionProvider": {"MatMul": 1, "Shape": 1}}
    assert misplaced(placed, "CUDAExecutionProvider") == {"MatMul": 1}
    assert misplaced({"CUDAExecutionProvider": {"MatMul": 2}}, "CUDAExecutionProvider") == {}


def test_onnxruntimes_own_profile_tells_the_provider_of_each_node(tmp_path: Path) -> None:
    """On the CPU provider: if the form of the profile changes, the check on a GPU would see no nodes at all."""
    pytest.importorskip("onnxruntime", reason="runs ONNX Runtime: pip install 'moe3d-deploy[cpu]'")
    onnx = pytest.importorskip("onnx", reason="writes ONNX models: pip install 'moe3d-deploy[export]'")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["a", "a"], ["b"], "product"),
            helper.make_node("Softmax", ["b"], ["c"], "softmax"),
        ],
        "test",
        [helper.make_tensor_value_info("a", kind, [4, 4])],
        [helper.make_tensor_value_info("c", kind, [4, 4])],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    session = profiled_session(path, tmp_path, ["CPUExecutionProvider"])
    for _ in range(2):
        session.run(None, {"a": np.ones((4, 4), np.float32)})
    placed = placement(json.loads(Path(session.end_profiling()).read_text()))
    assert placed == {"CPUExecutionProvider": {"MatMul": 1, "Softmax": 1}}
    assert misplaced(placed, "CUDAExecutionProvider") == {"MatMul": 1, "Softmax": 1}

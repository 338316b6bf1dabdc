"""Asking the engine inspector: TensorRT is a stand-in, and the process it is asked in is this one."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from inspections import CAMERA, FIRST, apart, fused, text_of
from plugin_files import FakeTensorRT, load_polygraphy, plugin_file

from moe3d_deploy import trt
from moe3d_deploy.child import ChildResult
from moe3d_deploy.engines import build as engine_build
from moe3d_deploy.engines.shapes import ShapeProfile
from moe3d_deploy.errors import EngineError, Moe3dError
from moe3d_deploy.trt import installed, plugin_library

SHAPES = ShapeProfile.from_ranges(views="1:2:4", height="56", width="56")
TEXT = text_of(fused(FIRST), *apart(CAMERA, dtype="Float"))


class Inspected(FakeTensorRT):
    """A runtime whose engine has an inspector that gives TEXT."""

    LayerInformationFormat = SimpleNamespace(JSON="json", ONELINE="line")
    loads = True
    inspects = True

    def Runtime(self, logger: object) -> Any:
        self.runtime = SimpleNamespace(deserialize_cuda_engine=self._deserialise)
        return self.runtime

    def _deserialise(self, plan: bytes) -> Any:
        self.calls.append(("deserialize", plan, getattr(self.runtime, "engine_host_code_allowed", False)))
        return SimpleNamespace(create_engine_inspector=lambda: self if self.inspects else None) if self.loads else None

    def get_engine_information(self, form: str) -> str:
        self.calls.append(("inspect", form))
        return TEXT


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Inspected:
    load_polygraphy()
    stand_in = Inspected()
    monkeypatch.setattr(plugin_library, "_registered", [])
    monkeypatch.setattr(installed, "require", lambda builder: None)
    monkeypatch.setattr(installed, "load", lambda builder: stand_in)
    return stand_in


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "a.plan"
    path.write_bytes(b"plan")
    return path


def test_the_engine_is_loaded_and_asked_for_json(machine: Inspected, plan: Path) -> None:
    assert trt.layer_information(plan, builder="tensorrt") == TEXT
    assert machine.calls == [("deserialize", b"plan", False), ("inspect", "json")]


def test_the_plugin_comes_first_and_host_code_is_allowed_only_where_it_is_asked_for(
    machine: Inspected, plan: Path, tmp_path: Path
) -> None:
    library = trt.PluginLibrary.of(plugin_file(tmp_path / "libmoe3d_plugin_trt10.so"))
    trt.layer_information(plan, builder="tensorrt", plugin=library, host_code=True)
    assert [call[0] for call in machine.calls] == ["load_library", "get_creator", "deserialize", "inspect"]
    assert machine.calls[2] == ("deserialize", b"plan", True)


@pytest.mark.parametrize(
    ("attribute", "line"),
    [
        ("loads", "TensorRT 10.16.1.11 does not load its own engine to inspect it: it gives no reason"),
        ("inspects", "TensorRT 10.16.1.11 gives no inspector for its engine"),
    ],
)
def test_an_engine_that_is_not_inspected_is_one_line(machine: Inspected, plan: Path, attribute: str, line: str) -> None:
    setattr(machine, attribute, False)
    with pytest.raises(EngineError) as error:
        trt.layer_information(plan, builder="tensorrt")
    assert str(error.value) == line


# After a build


@pytest.fixture
def after(machine: Inspected, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """after(gpus, died=None) -> record and events of a build by TensorRT for sm89; `died` ends the inspector."""
    network = trt.NetworkFacts(True, {}, {}, {}, {}, (), {})
    events: list[tuple[str, int, int]] = []

    def build_engine(onnx: Path, out: Path, *_: Any, **__: Any) -> trt.BuiltEngine:
        out.write_bytes(b"plan")
        attentions = (FIRST, CAMERA)
        return trt.BuiltEngine(4, "tensorrt", "10.16.1", ((8, 9),), network, (1,), "", (), 1.0, 2.0, attentions)

    def run(gpus: list[trt.Capability], died: BaseException | None = None) -> dict[str, Any]:
        def run_in_child(function: str, request: dict[str, Any], *, on_event: Any, **_: Any) -> ChildResult:
            name = function.rpartition(":")[2]
            if name == "inspect_in_child" and died:
                raise died
            asked = json.loads(json.dumps(request))  # as it goes to another process, and back
            return ChildResult(json.loads(json.dumps(getattr(engine_build, name)(asked, on_event))), 4.0, 5)

        monkeypatch.setattr(engine_build, "run_in_child", run_in_child)
        monkeypatch.setattr(installed, "visible_gpus", lambda: gpus)
        monkeypatch.setattr(trt, "visible_gpus", lambda: gpus)
        return engine_build.build(
            model, tmp_path / "plan", SHAPES, precision="fp16", builder="tensorrt",
            progress=lambda *event: events.append(event),
        )  # fmt: skip

    monkeypatch.setattr(trt, "build_engine", build_engine)
    monkeypatch.setattr(trt, "require", lambda builder: None)
    monkeypatch.setattr(trt, "available", lambda: {"tensorrt": "10.16.1"})
    monkeypatch.setattr(engine_build.signal, "signal", lambda *_: None)
    model = tmp_path / "model.onnx"
    model.write_bytes(b"")
    run.events = events  # type: ignore[attr-defined]
    return run


def test_an_engine_is_inspected_after_its_build_on_the_gpu_it_is_for(after: Any) -> None:
    record = after([(8, 9)])
    found = record["audit"]["inspector"]
    assert found["attentions"] == {"fp16": {"fused": 1}, "fp32": {"apart": 1}}
    assert after.events[-1] == ("Inspecting the engine", 0, 1)
    assert "attentions" not in record


@pytest.mark.parametrize("gpus", [[], [(9, 0)], [(9, 0), (8, 9)]])
def test_without_that_gpu_in_first_place_nothing_is_loaded(
    machine: Inspected, after: Any, gpus: list[trt.Capability]
) -> None:
    assert after(gpus)["audit"]["inspector"] is None
    assert machine.calls == []


def test_an_inspector_that_dies_leaves_the_engine_and_its_reason(after: Any, tmp_path: Path) -> None:
    record = after([(8, 9)], Moe3dError("the inspector was ended by signal 11"))
    assert record["audit"]["inspector"] == {"told": False, "reason": "the inspector was ended by signal 11"}
    assert (tmp_path / "plan").exists()


def test_an_interrupt_while_inspecting_leaves_nothing(after: Any, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        after([(8, 9)], KeyboardInterrupt())
    assert not (tmp_path / "plan").exists()

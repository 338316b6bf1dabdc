"""Loading an engine that needs the plugin: the very library that it was built with, before the engine, or a refusal.

A stand-in takes the place of TensorRT.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from bundles import build_old, write_bundle
from manifests import ENGINE, example_engine
from plugin_files import FakeTensorRT, load_polygraphy, plugin_file

from moe3d_deploy import trt
from moe3d_deploy.bundle import Bundle, add_engine
from moe3d_deploy.errors import EngineError, InputError
from moe3d_deploy.manifest import EngineRecord
from moe3d_deploy.trt import PluginLibrary, installed, plugin_library
from moe3d_deploy.trt.load_checks import load_faults, rebuild_command

DIGEST = "d1" * 32


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PluginLibrary:
    monkeypatch.setattr(plugin_library, "_registered", [])
    return PluginLibrary.of(plugin_file(tmp_path / "libmoe3d_plugin_trt10.so"))


def with_plugin(digest: str | None = DIGEST, builder: str = "tensorrt") -> EngineRecord:
    plugin = {"layers": ["ExpertMix"], "library": "libmoe3d_plugin_trt10.so", "sha256": digest}
    return replace(example_engine(), builder=builder, builder_version="10.16.1.11", plugin=plugin)


@pytest.mark.parametrize(
    ("record", "given", "fault"),
    [
        (with_plugin(), DIGEST, None),
        (with_plugin(), None, f"it needs the plugin library of SHA-256 {DIGEST}, and none is given: give it"),
        (
            with_plugin(),
            "e2" * 32,
            f"it was built with the plugin library of SHA-256 {DIGEST}, the given one has {'e2' * 32}: give that one",
        ),
        (with_plugin(None), DIGEST, "it needs a plugin library, and its record does not say which"),
        (with_plugin(builder="tensorrt-rtx"), DIGEST, "it needs a plugin library, and TensorRT-RTX takes none"),
        (
            replace(with_plugin(), plugin=None),
            DIGEST,
            f"it needs no plugin library, and one is given (SHA-256 {DIGEST})",
        ),
        (replace(with_plugin(), plugin=None), None, None),
    ],
)
def test_an_engine_wants_the_very_library_it_was_built_with(
    record: EngineRecord, given: str | None, fault: str | None
) -> None:
    faults = load_faults(record, version=None, gpus=[], plugin=given)
    assert len(faults) == bool(fault)
    assert not fault or faults[0].startswith(fault)


def test_the_command_that_rebuilds_has_the_library_and_what_was_accepted() -> None:
    findings = [{"name": "attention", "text": "so it is", "accepted": True}, {"name": "x", "accepted": False}, 3]
    record = replace(with_plugin(), audit={"findings": findings})
    start = "moe3d-export b --builder tensorrt --views 1:4:8 --height 392 --width 518"
    assert rebuild_command("b", record) == f"{start} --plugin libmoe3d_plugin_trt10.so --accept attention"
    assert (
        rebuild_command("b", record, plugin=Path("my") / "lib.so") == f"{start} --plugin my/lib.so --accept attention"
    )


class Deserialiser(FakeTensorRT):
    """A runtime that keeps what reached it, and gives no engine."""

    def Runtime(self, logger: object) -> "Deserialiser":
        return self

    def deserialize_cuda_engine(self, plan: bytes) -> None:
        self.calls.append(("deserialize", plan))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Deserialiser:
    load_polygraphy()
    stand_in = Deserialiser()
    monkeypatch.setattr(installed, "visible_gpus", lambda: [(8, 9)])
    monkeypatch.setattr(installed, "available", lambda: {"tensorrt": "10.16.1.11", "tensorrt-rtx": "1.6.1"})
    monkeypatch.setattr(installed, "require", lambda builder: None)
    monkeypatch.setattr(installed, "load", lambda builder: stand_in)
    return stand_in


def loading(tmp_path: Path, record: EngineRecord, plugin: Path | None) -> str:
    path = tmp_path / "bundle"
    write_bundle(path)
    add_engine(path, record, build_old)
    bundle = Bundle.open(path)
    with pytest.raises((EngineError, InputError)) as caught:
        trt.EngineRunner.of_bundle(bundle, bundle.manifest.engines[0], plugin=plugin)
    return str(caught.value)


def test_the_right_library_is_loaded_before_the_engine(
    tmp_path: Path, library: PluginLibrary, machine: Deserialiser
) -> None:
    line = loading(tmp_path, with_plugin(library.sha256), library.path)
    assert "TensorRT 10.16.1.11 cannot load it" in line  # the stand-in gives no engine
    assert [call[0] for call in machine.calls] == ["load_library", "get_creator", "deserialize"]
    assert f"--plugin {library.path}" in line


def test_another_library_reaches_neither_registry_nor_deserialiser(
    tmp_path: Path, library: PluginLibrary, machine: Deserialiser
) -> None:
    assert loading(tmp_path, with_plugin(), library.path) == (
        f"{tmp_path / 'bundle' / ENGINE} cannot be used here: it was built with the plugin library of SHA-256 "
        f"{DIGEST}, the given one has {library.sha256}: give that one; build it again: moe3d-export "
        f"{tmp_path / 'bundle'} --builder tensorrt --views 1:4:8 --height 392 --width 518 --plugin {library.path}"
    )
    assert machine.calls == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda record: record, "and none is given: give it (docs/plugin.md)"),
        (lambda record: replace(record, plugin=None), "it needs no plugin library, and one is given"),
        (
            lambda record: replace(record, builder="tensorrt-rtx", builder_version="1.6.1"),
            "TensorRT-RTX takes no plugins",
        ),
    ],
)
def test_a_library_too_few_or_too_many_is_refused(
    tmp_path: Path,
    library: PluginLibrary,
    machine: Deserialiser,
    change: Callable[[EngineRecord], EngineRecord],
    message: str,
) -> None:
    record = change(with_plugin(library.sha256))
    plugin = None if record == with_plugin(library.sha256) else library.path
    assert message in loading(tmp_path, record, plugin)
    assert machine.calls == []


def test_a_plan_without_a_record_gets_the_library_first(
    tmp_path: Path, library: PluginLibrary, machine: Deserialiser
) -> None:
    (tmp_path / "a.plan").write_bytes(b"plan")
    with pytest.raises(EngineError, match="cannot load it"):
        trt.EngineRunner(tmp_path / "a.plan", builder="tensorrt", plugin=library.path)
    assert [call[0] for call in machine.calls] == ["load_library", "get_creator", "deserialize"]

"""The GPU check of TensorRT's plugin and `verify_tensorrt` around it, on stand-ins for TensorRT, CMake and the card.

Not run here: TensorRT itself, and so an engine.
"""

import dataclasses
import importlib.util
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from plugin_files import plugin_file
from recorder import Recorder

from moe3d_deploy import trt
from moe3d_deploy.benchmarks import checks_tensorrt, verify_tensorrt
from moe3d_deploy.benchmarks.gpu_checks import CHECKS
from moe3d_deploy.benchmarks.timing import Ratio, Timing
from moe3d_deploy.checkpoint import load_model, open_checkpoint
from moe3d_deploy.config import PRESETS
from moe3d_deploy.errors import Moe3dError

VERSION = "10.16.1.11"


@pytest.fixture
def run(tmp_path: Path) -> Recorder:
    work = tmp_path / "work"
    work.mkdir()
    return Recorder(work)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = plugin_file(tmp_path / "libmoe3d_plugin_trt10.so")
    monkeypatch.setenv(checks_tensorrt.VARIABLE, str(path))
    return path


@dataclasses.dataclass
class Machine:
    """TensorRT on a card: what was asked of it, and by how much the engine with the plugin is off."""

    builds: list[trt.PluginLibrary | None] = dataclasses.field(default_factory=list)
    loads: list[tuple[str, Path | None]] = dataclasses.field(default_factory=list)
    closed: int = 0
    factor: float = 1.0
    kind: str = "float32"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    found = Machine()
    source = open_checkpoint("moe3d-tiny", seed=0)
    model = load_model(source)
    manifest = SimpleNamespace(
        checkpoint=SimpleNamespace(origin=source.origin, sha256=source.sha256()),
        inputs=(SimpleNamespace(dtype=found.kind),),
        outputs=(SimpleNamespace(name="depth"), SimpleNamespace(name="extrinsics")),
        precision="fp16",
        config=PRESETS["moe3d-tiny"],
    )
    bundle = SimpleNamespace(manifest=manifest, path=Path("bundle"))

    class Runner:
        def __init__(self, factor: float) -> None:
            self.factor = factor

        def run(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            with torch.inference_mode():
                outputs = model(torch.from_numpy(inputs["images"]))
            return {name: outputs[name].numpy() * self.factor for name in ("depth", "extrinsics")}

        def close(self) -> None:
            found.closed += 1

    def add_built_engine(bundle: Any, builder: str, profile: Any, *, plugin: trt.PluginLibrary | None) -> Any:
        assert builder == "tensorrt"
        found.builds.append(plugin)
        name = "with" if plugin else "without"
        facts = {"build": {}, "audit": {"summary": name}, "plugin": plugin and {"sha256": plugin.sha256}}
        return bundle, SimpleNamespace(file=f"engines/{name}.plan", **facts)

    def of_bundle(bundle: Any, record: Any, *, plugin: Path | None) -> Runner:
        found.loads.append((record.file, plugin))
        return Runner(found.factor if plugin else 1.0)

    def interleave(*timers: Any, effort: Any) -> Ratio:
        milliseconds = [timer() for timer in timers]
        assert min(milliseconds) > 0
        return Ratio(0.5, 0.4, 0.6, *(Timing(value, value, value, 1, 0, True) for value in (4.0, 2.0)))

    monkeypatch.setattr(trt, "require", lambda builder: None)
    monkeypatch.setattr(trt, "available", lambda: {"tensorrt": VERSION})
    monkeypatch.setattr(trt, "visible_gpus", lambda: [(8, 9)])
    monkeypatch.setattr(trt, "EngineRunner", SimpleNamespace(of_bundle=of_bundle))
    monkeypatch.setattr(checks_tensorrt, "find_bundle", lambda run: bundle)
    monkeypatch.setattr(checks_tensorrt, "_copy", lambda run, bundle: bundle)
    monkeypatch.setattr(checks_tensorrt, "add_built_engine", add_built_engine)
    monkeypatch.setattr(checks_tensorrt, "interleave", interleave)
    for name, text in (("VIEWS", "1:2"), ("HEIGHT", "28"), ("WIDTH", "42")):
        monkeypatch.setattr(checks_tensorrt, name, text)
    return found


# The check


def test_both_engines_are_built_run_compared_and_timed(run: Recorder, machine: Machine, library: Path) -> None:
    checks_tensorrt.tensorrt_plugin(run)
    assert run.failures == []
    opened = trt.PluginLibrary.of(library)
    assert machine.builds == [None, opened]
    assert machine.loads == [("engines/without.plan", None), ("engines/with.plan", library)]
    assert machine.closed == 2
    figures = run.figures
    assert figures["plugin"] == {"library": library.name, "sha256": opened.sha256, "tensorrt": 10}
    assert (figures["tensorrt"], figures["card"]) == (VERSION, 89)
    assert [(row["shape"], row["engine"]) for row in figures["shapes"]] == [
        ([1, 1, 28, 42], "without"),
        ([1, 1, 28, 42], "with"),
        ([1, 2, 28, 42], "without"),
        ([1, 2, 28, 42], "with"),
    ]
    assert all(row["errors"]["depth"]["max"] < 1e-5 for row in figures["shapes"])
    assert [(row["shape"], row["with_over_without"]) for row in figures["times"]] == [
        ([1, 1, 28, 42], 0.5),
        ([1, 2, 28, 42], 0.5),
    ]
    assert figures["times"][0]["without_plugin"]["median_ms"] == 4.0
    assert figures["engine_with_plugin"]["audit"] == {"summary": "with"}


def test_an_inspector_that_does_not_tell_of_attention_is_a_note(run: Recorder) -> None:
    said = "the engine with the plugin: the inspector does not tell whether attention is fused: "
    for audit, why in (
        ({"inspector": None}, "it was not asked"),
        ({"inspector": {"told": False, "reason": "it crashed"}, "attention_source": "memory"}, "it crashed"),
        (
            {"inspector": {"told": True, "attentions": {"fp16": {"not told": 72}}}, "attention_source": None},
            "its attentions are {'fp16': {'not told': 72}}",
        ),
        ({"inspector": {"told": True}, "attention_source": "inspector"}, None),
    ):
        run.notes.clear()
        checks_tensorrt._note_inspector(run, "with", audit)
        assert run.notes == ([said + why] if why else [])


def test_a_plugin_that_mixes_wrongly_fails_and_the_other_engine_does_not(
    run: Recorder, machine: Machine, library: Path
) -> None:
    machine.factor = 1.1
    checks_tensorrt.tensorrt_plugin(run)
    assert "the engine with the plugin at 1x1x28x42: depth is off by 0.1 (max relative), limit 0.01" in run.failures
    assert not [failure for failure in run.failures if "without" in failure]


def test_images_are_other_ones_in_every_run_and_the_seed_is_kept(
    run: Recorder, machine: Machine, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks_tensorrt.secrets, "randbits", lambda bits: 7)
    checks_tensorrt.tensorrt_plugin(run)
    assert run.figures["seed"] == 7
    first, again, other = (checks_tensorrt.fresh_images((1, 1, 28, 42), seed) for seed in (7, 7, 8))
    assert first.shape == (1, 1, 3, 28, 42)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_without_tensorrt_or_a_card_it_is_skipped(run: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("tensorrt") is None:
        with pytest.raises(Moe3dError, match="tensorrt is not installed"):
            checks_tensorrt.tensorrt_plugin(run)
    monkeypatch.setattr(trt, "require", lambda builder: None)
    monkeypatch.setattr(trt, "visible_gpus", list)
    with pytest.raises(Exception, match="the CUDA driver shows no GPU"):
        checks_tensorrt.tensorrt_plugin(run)


# The plugin's build


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """cmake and nvcc that do nothing but tell; cmake finds the headers of TensorRT 10. Returns the told words' file."""
    folder, words = tmp_path / "bin", tmp_path / "words"
    folder.mkdir()
    made = plugin_file(tmp_path / "made.so")
    cmake = f"""#!/bin/sh
echo "$@" >> {words}
case "$1" in
-S) echo "-- TensorRT plugin: moe3d_plugin_trt10 from the headers of 10.16";;
--build) mkdir -p "$2" && cp {made} "$2/libmoe3d_plugin_trt10.so";;
--version) echo "cmake version 3.30.1";;
esac
"""
    for name, text in (
        ("cmake", cmake),
        ("nvcc", "#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.48'\n"),
    ):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("CUDACXX", str(folder / "nvcc"))
    monkeypatch.delenv(checks_tensorrt.VARIABLE, raising=False)
    return words


def test_cmake_builds_the_plugin_of_this_tensorrt_for_this_card(run: Recorder, tools: Path) -> None:
    path = checks_tensorrt.plugin_path(run, VERSION, (8, 9))
    assert path == run.work / "native" / "libmoe3d_plugin_trt10.so"
    assert path.is_file()
    configure, build = tools.read_text().splitlines()
    assert configure.endswith("-DCMAKE_CUDA_ARCHITECTURES=89")
    assert build == f"--build {run.work / 'native'} --target moe3d_plugin_trt10"


def test_without_the_headers_of_this_major_it_says_where_to_name_them(run: Recorder, tools: Path) -> None:
    with pytest.raises(
        Moe3dError, match=r"^CMake found no headers of TensorRT 11: set TENSORRT_INCLUDE_DIR to the fol"
    ):
        checks_tensorrt.plugin_path(run, "11.1.0.2", (8, 9))


def test_without_cmake_it_is_skipped(run: Recorder, tools: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks_tensorrt.shutil, "which", lambda *_, **__: None)
    with pytest.raises(Exception, match="cmake was not found: install it, or set MOE3D_TENSORRT_PLUGIN"):
        checks_tensorrt.plugin_path(run, VERSION, (8, 9))


# The command


def lines_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def test_a_machine_that_lacks_everything_is_told_all_at_once_and_nothing_is_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trt, "available", dict)
    monkeypatch.setattr(trt, "visible_gpus", list)
    monkeypatch.setattr(verify_tensorrt.shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(verify_tensorrt, "run_checks", lambda *_, **__: pytest.fail("something was done"))
    assert verify_tensorrt.main([]) == 1
    assert lines_of(capsys) == [
        "verify_tensorrt: TensorRT is not installed: pip install 'moe3d-deploy[trt]', or NVIDIA's packages",
        "verify_tensorrt: no NVIDIA GPU is visible: run it on a machine with one, and its driver",
        "verify_tensorrt: cmake was not found: install CMake 3.22 or newer, or give a library that is built: --plugin",
        "verify_tensorrt: nvcc was not found: install the CUDA toolkit, or give a library that is built: --plugin",
        "verify_tensorrt: polygraphy is not installed: pip install 'moe3d-deploy[trt]'",
        "verify_tensorrt: torch is not installed: pip install 'moe3d-deploy[export]'",
        "verify_tensorrt: onnx is not installed: pip install 'moe3d-deploy[export]'",
        "verify_tensorrt: onnxscript is not installed: pip install 'moe3d-deploy[export]'",
        "verify_tensorrt: onnxruntime is not installed: pip install 'moe3d-deploy[cpu]'",
    ]
    assert len(verify_tensorrt.missing(plugin_given=True, bundle_given=True)) == 4


def test_an_old_tensorrt_is_told(monkeypatch: pytest.MonkeyPatch, tools: Path) -> None:
    monkeypatch.setattr(trt, "available", lambda: {"tensorrt": "8.6.1"})
    monkeypatch.setattr(trt, "visible_gpus", lambda: [(8, 9)])
    lines = verify_tensorrt.missing(plugin_given=False, bundle_given=True)
    assert [line for line in lines if "TensorRT" in line] == [
        "TensorRT 8.6.1 is too old: engines are built by 10.3 or newer, whose networks are strongly typed; update it"
    ]
    assert not [line for line in lines if "cmake" in line or "nvcc" in line]


GPU = {"name": "Card", "compute_capability": "8.9", "memory_bytes": 8}


@pytest.mark.parametrize(("status", "code"), [("passed", 0), ("failed", 1), ("skipped", 1), ("error", 1)])
def test_what_is_there_the_verdict_and_a_block_to_report_are_printed(
    status: str,
    code: int,
    library: Path,
    tools: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    timing = {"median_ms": 4.0}
    figures = {
        "engine_with_plugin": {"audit": {"summary": "ExpertMix as plugin"}},
        "times": [{"shape": [1, 2, 28, 42], "without_plugin": timing, "with_plugin": timing, "with_over_without": 1.0}],
    }
    report = {"checks": {"tensorrt_plugin": {"status": status, "seconds": 3.0, "figures": figures}}}
    asked: list[Any] = []

    def run_checks(checks: Any, out: Path, **options: Any) -> dict[str, Any]:
        asked.extend([[check.name for check in checks], os.environ[checks_tensorrt.VARIABLE], options["bundle"]])
        return report

    monkeypatch.setattr(trt, "available", lambda: {"tensorrt": VERSION})
    monkeypatch.setattr(verify_tensorrt, "missing", lambda **_: [])
    monkeypatch.setattr(verify_tensorrt, "environment", lambda: {"gpus": [GPU], "driver": "580.1"})
    monkeypatch.setattr(verify_tensorrt, "run_checks", run_checks)
    assert verify_tensorrt.main(["--plugin", str(library), "--bundle", "b"]) == code
    assert asked == [["tensorrt_plugin"], str(library), Path("b")]
    out = capsys.readouterr().out
    assert out.splitlines()[:4] == [
        f"TensorRT     {VERSION}",
        "GPU          Card, compute capability 8.9, driver 580.1",
        "nvcc         Cuda compilation tools, release 13.0, V13.0.48",
        "cmake        cmake version 3.30.1",
    ]
    assert f"tensorrt_plugin  {status:7}      3.0 s" in out
    assert "with    plugin  ExpertMix as plugin\n" in out
    assert "1x2x28x42           4.00 ms without,     4.00 ms with: 1.000\n" in out
    block = out.partition(verify_tensorrt.BEGIN)[2].partition(verify_tensorrt.END)[0]
    assert json.loads(block) == report


def test_the_check_is_one_of_all() -> None:
    assert [check.target for check in CHECKS if check.name == verify_tensorrt.CHECK] == [
        "moe3d_deploy.benchmarks.checks_tensorrt:tensorrt_plugin"
    ]

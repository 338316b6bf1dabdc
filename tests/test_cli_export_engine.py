"""The engine's flags of `moe3d export`, its events for machines, and an engine built where torch is not installed."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import exports
import pytest
from plugin_files import plugin_file

from moe3d_deploy import trt
from moe3d_deploy.bundle import Bundle
from moe3d_deploy.cli import export as export_command
from moe3d_deploy.cli import export_engine
from moe3d_deploy.cli.export_engine import expected_seconds
from moe3d_deploy.cli.export_events import Reporter
from moe3d_deploy.cli.main import export_main
from moe3d_deploy.engines.shapes import ShapeProfile
from moe3d_deploy.errors import EngineError
from moe3d_deploy.manifest import EngineRecord, Profile

Capture = pytest.CaptureFixture[str]

# Not on a robot: what the extras export, cpu, train and viz bring.
ABSENT = ("torch", "onnx", "onnxscript", "onnx_ir", "safetensors", "sympy", "onnxruntime", "scipy", "rerun")


@pytest.fixture
def bundle() -> str:
    return str(exports.bundle().path)


@dataclass
class Built:
    """A run of the command on a copy of the small bundle."""

    code: int
    events: list[dict[str, Any]]
    errors: str
    path: Path
    cache: Path


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """An engine of two profiles, built in a process, and by one, that cannot import torch."""
    pytest.importorskip("tensorrt_rtx", reason="builds an engine: pip install 'moe3d-deploy[rtx]'")
    import shutil

    folder = tmp_path_factory.mktemp("robot")
    for name in ABSENT:
        (folder / "absent" / name).mkdir(parents=True)
        (folder / "absent" / name / "__init__.py").write_text(f"raise ModuleNotFoundError('blocked', name={name!r})")
    path = shutil.copytree(exports.bundle().path, folder / "small")
    flags = ["--builder", "tensorrt-rtx", "--views", "1", "--views", "2:3", "--height", "28:42", "--width", "42"]
    flags += ["--target", "sm89", "--workspace", "2G", "--optimization-level", "1", "--weight-streaming"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder / "absent"), *filter(None, sys.path)]),
        "MOE3D_CACHE": str(folder / "cache"),
    }
    ended = subprocess.run(
        [sys.executable, "-m", "moe3d_deploy", "export", str(path), *flags, "--json-events"],
        capture_output=True, text=True, env=environment, cwd=folder,
    )  # fmt: skip
    events = [json.loads(line) for line in ended.stdout.splitlines()]
    return Built(ended.returncode, events, ended.stderr, path, folder / "cache")


def test_a_bundle_builds_its_engine_without_torch(built: Built) -> None:
    assert (built.code, built.errors) == (0, "")
    (record,) = Bundle.open(built.path).manifest.engines
    assert record.file.startswith("engines/small_1x28-42-42x42+2-3-3x28-42-42x42_fp16_sm89_rtx")
    assert record.compute_capabilities == (89,)
    assert [profile.max for profile in record.profiles] == [(1, 1, 42, 42), (1, 3, 42, 42)]
    assert record.build["flags"] == {"workspace_bytes": 2 << 30, "optimization_level": 1, "weight_streaming": True}
    assert record.audit["fused_attention"] == 3
    assert len(record.audit["activation_memory_bytes"]) == 2, "one for each profile"


def test_events_are_lines_of_json_that_end_with_the_result(built: Built) -> None:
    kinds = [event["event"] for event in built.events]
    assert set(kinds) == {"progress", "line", "result"}
    assert kinds.index("result") == len(kinds) - 1
    progress = [event for event in built.events if event["event"] == "progress"]
    assert {event["stage"] for event in progress} == {"engine"}
    phases = list(dict.fromkeys(event["phase"] for event in progress))
    assert phases[:2] == ["Parsing the model", "Building engine"]
    assert phases[-1] == "Writing the engine"
    seconds = [event["seconds"] for event in progress]
    assert seconds == sorted(seconds)
    assert all(event["seconds_left"] is None for event in progress), "nothing tells before the first build"
    assert [event["label"] for event in built.events if event["event"] == "line"] == ["engine", "audit"]
    result = built.events[-1]
    (record,) = Bundle.open(built.path).manifest.engines
    assert result["engine"] == {"file": record.file, **record.build}
    assert result["files"][record.file] == (built.path / record.file).stat().st_size


def test_the_log_lies_beside_the_engine_and_the_engine_in_the_cache(built: Built) -> None:
    (record,) = Bundle.open(built.path).manifest.engines
    log = (built.path / record.file).with_suffix(".log")
    assert "Total Activation Memory" in log.read_text()
    (entry,) = built.cache.iterdir()
    assert (entry / "engine.plan").read_bytes() == (built.path / record.file).read_bytes()
    assert (entry / "build.log").read_text() == log.read_text()


# ---- flags


class Asked:
    """Stands in for the build, and keeps what it was asked for."""

    def __init__(self) -> None:
        self.profiles: tuple[ShapeProfile, ...] = ()
        self.options: dict[str, Any] = {}
        self.steps: list[tuple[float, str, int, int]] = []
        self.clock = 0.0
        self.fail: Exception | None = None
        self.from_cache = False
        self.audit: dict[str, Any] = {}

    def add_built_engine(
        self, bundle: Bundle, builder: str, profiles: tuple[ShapeProfile, ...], *, progress: Any, **options: Any
    ) -> tuple[Bundle, EngineRecord]:
        self.profiles, self.options = profiles, options
        for moment, *step in self.steps:
            self.clock = moment
            progress(*step)
        if self.fail:
            raise self.fail
        record = EngineRecord(
            "engines/e.plan", "tensorrt-rtx", "1.7.1", (89,), "fp16",
            tuple(Profile(profile.min, profile.opt, profile.max) for profile in profiles),
            audit={"summary": "all is well"} | self.audit,
            build={"seconds": 51.2, "peak_bytes": 2_200_000_000, "from_cache": self.from_cache},
        )  # fmt: skip
        return bundle, record


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    stand_in = Asked()
    monkeypatch.setattr(export_engine, "add_built_engine", stand_in.add_built_engine)
    monkeypatch.setattr(export_engine, "check_request", lambda builder, *asked, **file: "tensorrt")
    monkeypatch.setattr(time, "monotonic", lambda: stand_in.clock)
    return stand_in


def test_every_flag_reaches_the_builder(asked: Asked, bundle: str, tmp_path: Path) -> None:
    flags = "--target sm89,sm120 --workspace 4G --optimization-level 5 --version-compatible --hardware-compatible"
    flags += f" --weight-streaming --strip-weights --timing-cache {tmp_path}/timings"
    assert export_main([bundle, *flags.split()]) == 0
    assert asked.options["compute_capabilities"] == ((8, 9), (12, 0))
    assert asked.options["flags"] == trt.BuildFlags(
        4 << 30, 5, version_compatible=True, hardware_compatible=True, weight_streaming=True, strip_weights=True,
        timing_cache=f"{tmp_path}/timings",
    )  # fmt: skip


def test_the_plugin_and_what_is_accepted_reach_the_builder(
    asked: Asked, bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model of these tests is narrower than what the plugin takes."""
    monkeypatch.setattr(export_engine, "check_model_for_plugin", lambda *_: None)
    path = plugin_file(tmp_path / "lib.so")
    flags = ["--plugin", str(path), "--accept", "attention", "--accept", "expert-mix"]
    assert export_main([bundle, *flags]) == 0
    assert asked.options["plugin"] == trt.PluginLibrary.of(path)
    assert asked.options["accept"] == ("attention", "expert-mix")


def test_what_was_accepted_and_the_notes_end_the_build(asked: Asked, bundle: str, capsys: Capture) -> None:
    asked.audit = {
        "findings": [{"name": "attention", "text": "not all are fused", "accepted": True}],
        "notes": ["--accept expert-mix was not needed"],
        "plan": {"notes": ["the engine's size: 2 MB where 1 MB are predicted"]},
    }
    assert export_main([bundle]) == 0
    assert [line.split(maxsplit=1) for line in capsys.readouterr().err.splitlines()[1:5]] == [
        ["audit", "all is well"],
        ["accepted", "attention: not all are fused"],
        ["note", "--accept expert-mix was not needed"],
        ["note", "the engine's size: 2 MB where 1 MB are predicted"],
    ]


def test_without_flags_all_is_the_builders_choice(asked: Asked, bundle: str) -> None:
    assert export_main([bundle]) == 0
    assert asked.options["compute_capabilities"] is None
    assert asked.options["flags"] == trt.BuildFlags()


def test_trtexecs_shapes_and_repeated_flags_become_profiles(asked: Asked, bundle: str) -> None:
    shapes = "--min-shapes images:1x1x3x28x42 --opt-shapes images:1x2x3x42x42 --max-shapes images:1x4x3x42x42"
    assert export_main([bundle, *shapes.split()]) == 0
    assert asked.profiles == (ShapeProfile((1, 1, 28, 42), (1, 2, 42, 42), (1, 4, 42, 42)),)
    assert export_main([bundle, "--views", "1", "--views", "2:4", "--height", "42"]) == 0
    assert [(profile.min[1], profile.max[1]) for profile in asked.profiles] == [(1, 1), (2, 4)]


def test_the_cache_is_the_users_unless_the_environment_names_one(
    asked: Asked, bundle: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE3D_CACHE", str(tmp_path))
    assert export_main([bundle]) == 0
    assert asked.options["cache"].folder == tmp_path
    monkeypatch.delenv("MOE3D_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert export_main([bundle]) == 0
    assert asked.options["cache"].folder == tmp_path / "home" / ".cache" / "moe3d" / "engines"
    assert export_main([bundle, "--no-cache"]) == 0
    assert asked.options["cache"] is None


def test_an_engine_from_the_cache_says_so(asked: Asked, bundle: str, capsys: Capture) -> None:
    asked.from_cache = True
    assert export_main([bundle]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "engine       from the cache, SHA-256 checked; built in 51.2 s   tensorrt-rtx 1.7.1, sm89"


def test_a_tensor_beyond_2_to_31_values_is_a_warning_with_the_views_that_are_safe(
    asked: Asked, bundle: str, capsys: Capture
) -> None:
    """The merged map of the small model is its widest tensor, and 2,147,483,647 values are the most."""
    config = Bundle.open(bundle).manifest.config
    assert config.moe
    wide = config.moe.num_experts * config.moe.hidden_channels + config.moe.gate_hidden_channels
    fitting = (2**31 - 1) // (wide * 1400 * 1400)
    flags = ["--height", "1400", "--width", "1400"]
    assert export_main([bundle, "--views", str(fitting), *flags]) == 0
    assert "2^31" not in capsys.readouterr().err
    assert export_main([bundle, "--views", str(fitting + 1), *flags]) == 0
    warning = capsys.readouterr().err.splitlines()[0]
    assert warning.startswith("warning      a convolution has ")
    assert f"more than the 2^31 - 1 that TensorRT documents; {fitting} views in all stay below" in warning


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--target ada", "--target 'ada': expected GPUs by compute capability, for example sm89,sm120"),
        ("--workspace 4", "--workspace '4': expected a size with its unit, K, M, G or T, for example 4G (4 x 2^30)"),
        ("--builder none --target sm89", "--target is a flag of an engine and --builder none builds none: leave one"),
        ("--builder none --max-shapes 1x1x3x14x14", "--max-shapes is a shape of an engine and --builder none builds"),
        ("--max-shapes images:1x2x3x43x42", "--max-shapes images:1x2x3x43x42: height 43 is not a multiple of the "
         "patch size 14; nearest is images:1x2x3x42x42"),
        ("--accept types", "--accept types: the audit has no such finding; its findings are strong-typing, matmul-"),
        ("--builder none --accept attention", "--accept is a flag of an engine and --builder none builds none"),
        ("--plugin none.so", "plugin library none.so cannot be read: No such file or directory; build it as docs/plug"),
        ("--json --json-events", "--json and --json-events are two forms of one answer: leave one of them out"),
    ],
)  # fmt: skip
def test_bad_flags_are_one_line_and_code_2(
    flags: str, message: str, asked: Asked, bundle: str, capsys: Capture
) -> None:
    assert export_main([bundle, *flags.split()]) == 2
    assert message in capsys.readouterr().err
    assert asked.options == {}


def test_what_the_builder_lacks_is_told_before_an_export(tmp_path: Path, capsys: Capture) -> None:
    pytest.importorskip("tensorrt_rtx", reason="reads its version: pip install 'moe3d-deploy[rtx]'")
    flags = ["--builder", "tensorrt-rtx", "--version-compatible"]
    assert export_main(["moe3d-tiny", "-o", str(tmp_path / "bundle"), *flags]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "moe3d-export: --version-compatible: no TensorRT-RTX has it, TensorRT 8.6 or newer does; leave it out, build "
        "again for each version; or export without an engine: --builder none"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("builder", "message", "code"),
    [
        ("tensorrt", "tensorrt is not installed: pip install 'moe3d-deploy[trt]'", 1),
        ("auto", "TensorRT is not installed; build without a GPU with TensorRT-RTX: pip install 'moe3d-deploy[rtx]'; "
         "or export without an engine: --builder none", 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("source", ["moe3d-tiny", "bundle"])
def test_a_builder_that_is_not_installed_is_named_before_any_work(
    builder: str,
    message: str,
    code: int,
    source: str,
    tmp_path: Path,
    capsys: Capture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    exported: list[Any] = []
    monkeypatch.setattr(export_command, "export_bundle", lambda *arguments, **_: exported.append(arguments))
    monkeypatch.setattr(trt, "available", dict)
    arguments = [str(exports.bundle().path)] if source == "bundle" else [source, "-o", str(tmp_path / "bundle")]
    assert export_main([*arguments, "--builder", builder]) == code
    if source == "bundle":  # there an engine is all that was asked for
        message = message.removesuffix("; or export without an engine: --builder none")
    assert capsys.readouterr().err.splitlines()[-1] == f"moe3d-export: {message}"
    assert exported == []


# ---- progress


def with_engine(bundle: str, builder: str, seconds: Any) -> Bundle:
    opened = Bundle.open(bundle)
    profile = Profile((1, 1, 42, 42), (1, 1, 42, 42), (1, 1, 42, 42))
    record = EngineRecord("engines/e.plan", builder, "1", (89,), "fp16", (profile,), build={"seconds": seconds})
    return replace(opened, manifest=replace(opened.manifest, engines=(record,)))


def test_the_last_build_of_the_bundle_tells_how_long_one_takes(bundle: str) -> None:
    assert expected_seconds(Bundle.open(bundle), "auto") is None
    assert expected_seconds(with_engine(bundle, "tensorrt-rtx", 51.5), "auto") == 51.5
    assert expected_seconds(with_engine(bundle, "tensorrt-rtx", 51.5), "tensorrt") is None
    assert expected_seconds(with_engine(bundle, "tensorrt-rtx", "long"), "auto") is None


def test_the_time_that_is_left_counts_down_and_is_never_below_nothing(
    asked: Asked, bundle: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(export_engine, "expected_seconds", lambda *_: 60.0)
    asked.steps = [(0.0, "Parsing", 0, 1), (45.0, "Compiling", 1, 2), (90.0, "Compiling", 1, 2)]
    assert export_main([bundle, "--json-events"]) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(event["seconds"], event["seconds_left"]) for event in events[:3]] == [(0, 60), (45, 15), (90, 0)]
    assert events[1] | {"phase": "Compiling", "phase_step": 1, "phase_total": 2, "stage": "engine"} == events[1]


def test_without_a_terminal_a_line_comes_every_half_minute(
    asked: Asked, bundle: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr(export_engine, "expected_seconds", lambda *_: 60.0)
    asked.steps = [(float(second), "Compiling", 1, 2) for second in range(75)]
    assert export_main([bundle]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "Compiling" in line]
    assert lines == [
        "engine           30 s   Compiling 1/2, about 30 s left",
        "engine           60 s   Compiling 1/2, longer than the last one (60 s)",
    ]


def test_a_failed_run_ends_its_events_with_the_error(asked: Asked, bundle: str, capsys: Capture) -> None:
    asked.fail = EngineError("the builder was killed")
    assert export_main([bundle, "--json-events"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out.splitlines()[-1]) == {"event": "error", "message": "the builder was killed"}
    assert err == "moe3d-export: the builder was killed\n"


def test_the_stages_of_an_export_are_events_too(capsys: Capture) -> None:
    reporter = Reporter(as_events=True)
    reporter.report("export", 1, 5, "trace")
    reporter.line("licence", "of\n the weights")
    out, err = capsys.readouterr()
    assert err == ""
    assert [json.loads(line) for line in out.splitlines()] == [
        {"event": "progress", "stage": "export", "step": 1, "total": 5, "detail": "trace"},
        {"event": "line", "label": "licence", "text": "of the weights"},
    ]

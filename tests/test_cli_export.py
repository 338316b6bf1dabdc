"""`moe3d export` and `moe3d-export`: what the flags do, what is refused before work begins, and what an end leaves."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exports
import pytest

from moe3d_deploy.bundle import Bundle, add_engine
from moe3d_deploy.cli import export as command
from moe3d_deploy.cli import export_engine
from moe3d_deploy.cli.main import export_main, main
from moe3d_deploy.engines.shapes import ShapeProfile
from moe3d_deploy.errors import EngineError, ExportError
from moe3d_deploy.export.pipeline import ExportOptions, ExportReport
from moe3d_deploy.export.precision import PrecisionPolicy
from moe3d_deploy.export.source import SourceSpec
from moe3d_deploy.export.static import StaticShape
from moe3d_deploy.manifest import EngineRecord, Profile

Capture = pytest.CaptureFixture[str]


def error_of(capsys: Capture) -> str:
    """The last line of stderr; nothing may be on stdout."""
    out, err = capsys.readouterr()
    assert out == ""
    return err.rstrip("\n").rpartition("\n")[2]


# ---- a real export


def test_an_export_from_the_command_line_and_its_bytes(tmp_path: Path, capsys: Capture) -> None:
    """The same checkpoint gives the same file, byte for byte: in another process, in another folder, unverified."""
    path = tmp_path / "again"
    source = str(exports.checkpoint())
    assert export_main([source, "-o", str(path), "--builder", "none", "--no-verify", "--json"]) == 0

    out, err = capsys.readouterr()
    report = json.loads(out)
    bundle = Bundle.open(path)
    assert report["bundle"] == str(path)
    assert report["files"] == {name: entry.size for name, entry in bundle.manifest.files.items()}
    assert report["verification"] == {"status": "skipped", "cases": []}
    assert list(report["stages"]) == ["export"]
    assert report["stages"]["export"]["peak_bytes"] > 1e8
    lines = err.splitlines()
    assert lines[0] == "checkpoint   seeded:small seed 0, 0.2 M parameters, 2 experts"
    assert lines[1] == "licence      seeded random weights, no licence"
    assert lines[2].startswith("export       ")
    assert lines[3] == "verify       skipped (--no-verify); the manifest says so"
    assert bundle.manifest.verification.status == "skipped"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["again"]
    for name in ("model.onnx", "model.onnx.data"):
        assert (path / name).read_bytes() == (exports.bundle().path / name).read_bytes(), name


def test_ctrl_c_ends_the_command_with_one_line_and_nothing_left(tmp_path: Path) -> None:
    """A process as a terminal runs it; the interrupt comes while the export's child is at work."""
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"  # background jobs ignore it
        "from moe3d_deploy.cli.main import export_main; sys.exit(export_main(sys.argv[1:]))"
    )
    arguments = ["moe3d-tiny", "-o", str(tmp_path / "bundle"), "--builder", "none"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)  # the folder is there: the child starts
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)

    assert process.returncode == 130
    assert out == ""
    assert err.splitlines()[-1] == "moe3d-export: interrupted"
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="pip install 'moe3d-deploy[rtx]'")
@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")
def test_a_bundle_gets_an_engine_in_place(tmp_path: Path, capsys: Capture) -> None:
    path = shutil.copytree(exports.bundle().path, tmp_path / "small")
    shapes = ["--views", "1:2:3", "--height", "28:42", "--width", "42"]
    assert main(["export", str(path), "--builder", "tensorrt-rtx", *shapes, "--json"]) == 0

    report = json.loads(capsys.readouterr().out)
    (engine,) = Bundle.open(path).manifest.engines
    assert engine.file.startswith("engines/small_1-2-3x28-42-42x42_fp16_sm")
    assert engine.profiles == (Profile((1, 1, 28, 42), (1, 2, 42, 42), (1, 3, 42, 42)),)
    assert engine.builder == "tensorrt-rtx"
    assert report["engine"]["file"] == engine.file
    assert report["files"][engine.file] == (path / engine.file).stat().st_size > 10_000
    assert report["verification"]["status"] == "passed"
    for name in ("model.onnx", "model.onnx.data"):
        assert (path / name).read_bytes() == (exports.bundle().path / name).read_bytes()


# ---- flags


class Calls:
    """Stands in for the export and the engine build, and keeps what they were asked for."""

    def __init__(self) -> None:
        self.exports: list[tuple[SourceSpec, Path, ExportOptions, bool]] = []
        self.engines: list[tuple[str, ShapeProfile]] = []
        self.asked: list[dict[str, Any]] = []
        self.fail: dict[str, BaseException] = {}
        self.dropped: list[str] = []

    def export_bundle(
        self, source: SourceSpec, path: Path, options: ExportOptions, *, overwrite: bool, on_event: Any
    ) -> ExportReport:
        self.exports.append((source, path, options, overwrite))
        on_event({"stage": "export", "step": 1, "total": 5, "detail": "trace"})
        if error := self.fail.get("export"):
            raise error
        cost = {"seconds": 12.25, "peak_bytes": 3.2e9}
        on_event({"stage": "export", "step": 5, "total": 5, "detail": "", "cost": cost})
        return ExportReport(exports.bundle().report.bundle, {"export": cost})

    def add_built_engine(
        self,
        bundle: Bundle,
        builder: str,
        profiles: tuple[ShapeProfile, ...],
        *,
        progress: Any,
        on_drop: Any,
        **asked: Any,
    ) -> tuple[Bundle, EngineRecord]:
        shapes = profiles[0]
        self.engines.append((builder, shapes))
        self.asked.append({"profiles": profiles, **asked})
        progress("Building", 1, 2)
        for name in self.dropped:
            on_drop(name)
        if error := self.fail.get("engine"):
            raise error
        build = {"seconds": 51.2, "peak_bytes": 2_200_000_000}
        profile = Profile(shapes.min, shapes.opt, shapes.max)
        audit = {"summary": "3 layers of 4 in fp16"}
        record = EngineRecord(
            "engines/e.plan", "tensorrt-rtx", "1.7.1", (80, 89), "fp16", (profile,), audit=audit, build=build
        )
        return bundle, record


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    stand_in = Calls()
    monkeypatch.setattr(command, "export_bundle", stand_in.export_bundle)
    monkeypatch.setattr(export_engine, "add_built_engine", stand_in.add_built_engine)
    monkeypatch.setattr(export_engine, "check_request", lambda builder, *asked, **file: "tensorrt-rtx")
    return stand_in


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ((), ExportOptions(PrecisionPolicy("fp16"))),
        (("--precision", "fp32"), ExportOptions(PrecisionPolicy("fp32"))),
        (("--precision", "fp16-fp32heads"), ExportOptions(PrecisionPolicy("fp16-fp32heads"))),
        (("--no-merge",), ExportOptions(merge=False)),
        (("--no-verify",), ExportOptions(verify=False)),
        (("--outputs", "pose_enc,expert_weights"), ExportOptions(outputs=("pose_enc", "expert_weights"))),
        (("--outputs", "pose_enc, world_points,"), ExportOptions(outputs=("pose_enc", "world_points"))),
        (("--precision", "bf16"), ExportOptions(PrecisionPolicy("bf16"))),
        (("--opset", "23"), ExportOptions(opset=23)),
        (("--input", "uint8"), ExportOptions(input="uint8")),
        (("--static", "1x?x392x518"), ExportOptions(static=StaticShape(1, None, 392, 518))),
        (("--verify-quality", "32"), ExportOptions(quality=32)),
        (("--verify-quality",), ExportOptions(quality=16)),
    ],
)
def test_flags_become_options(flags: tuple[str, ...], options: ExportOptions, calls: Calls, tmp_path: Path) -> None:
    assert export_main(["moe3d-tiny", "-o", str(tmp_path / "bundle"), "--builder", "none", *flags]) == 0
    assert calls.exports == [(SourceSpec("moe3d-tiny"), tmp_path / "bundle", options, False)]
    assert calls.engines == []


def test_seed_pickle_and_overwrite_are_passed_on(calls: Calls, tmp_path: Path) -> None:
    flags = ["--seed", "7", "--allow-pickle", "--overwrite", "--builder", "none"]
    assert export_main(["moe3d-tiny", "-o", str(tmp_path / "bundle"), *flags]) == 0
    assert calls.exports == [(SourceSpec("moe3d-tiny", 7, True), tmp_path / "bundle", ExportOptions(), True)]


@pytest.mark.parametrize(
    ("flags", "shapes"),
    [
        # 10 patches to img_size, but the bundle that the stand-in gives is of 42 pixels, less than 10 patches
        ("", ((1, 1, 42, 42), (1, 2, 42, 42), (1, 8, 42, 42))),
        ("--views 3 --height 28 --width 14:28", ((1, 3, 28, 14), (1, 3, 28, 28), (1, 3, 28, 28))),
        ("--batch 1:2 --views 1:2:4 --width 28", ((1, 1, 42, 28), (2, 2, 42, 28), (2, 4, 42, 28))),
        ("--static ?x2x?x? --views 2", ((1, 2, 42, 42), (1, 2, 42, 42), (1, 2, 42, 42))),
    ],
)
def test_shape_flags_become_the_engines_profile(
    flags: str, shapes: tuple[tuple[int, ...], ...], calls: Calls, tmp_path: Path
) -> None:
    assert export_main(["moe3d-tiny", "-o", str(tmp_path / "bundle"), *flags.split()]) == 0
    ((builder, profile),) = calls.engines
    assert builder == "auto"
    assert (profile.min, profile.opt, profile.max) == shapes


def test_the_report_says_what_was_done_and_what_comes_next(calls: Calls, tmp_path: Path, capsys: Capture) -> None:
    assert export_main(["moe3d-tiny", "-o", str(tmp_path / "bundle"), "--seed", "0"]) == 0

    out, err = capsys.readouterr()
    path = exports.bundle().path
    assert out == f"moe3d run {path} IMAGES... -o out\n"
    lines = err.splitlines()
    assert lines[0] == "checkpoint   preset:moe3d-tiny seed 0, 5.5 M parameters, 4 experts"
    assert lines[1] == "licence      seeded random weights, no licence"
    assert lines[2] == "export         12.2 s   peak 3.2 GB"
    assert lines[3].startswith("verify       6 shapes, depth off by max ")
    assert lines[3].endswith("(limits: max 0.01, mean 0.001)")
    assert lines[4] == "engine         51.2 s   peak 2.2 GB   tensorrt-rtx 1.7.1, sm80 sm89"
    assert lines[5] == "audit        3 layers of 4 in fp16"
    assert lines[6].startswith(f"bundle       {path}: 2 files, ")
    assert len(lines) == 7


@pytest.mark.parametrize("error", [EngineError("the builder was killed"), KeyboardInterrupt()])
def test_a_failed_engine_says_that_the_bundle_is_complete(
    error: BaseException, calls: Calls, tmp_path: Path, capsys: Capture
) -> None:
    calls.fail["engine"] = error
    code = export_main(["moe3d-tiny", "-o", str(tmp_path / "bundle")])
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line]
    assert lines[-2] == f"bundle       {exports.bundle().path} is complete, without this engine"
    if isinstance(error, KeyboardInterrupt):
        assert (code, lines[-1]) == (130, "moe3d-export: interrupted")
    else:
        assert (code, lines[-1]) == (1, "moe3d-export: the builder was killed")


def test_a_failed_export_is_one_line_and_code_1(calls: Calls, tmp_path: Path, capsys: Capture) -> None:
    calls.fail["export"] = ExportError("verification failed: depth is off")
    assert export_main(["moe3d-tiny", "-o", str(tmp_path / "bundle")]) == 1
    assert error_of(capsys) == "moe3d-export: verification failed: depth is off"
    assert calls.engines == []


# ---- what is refused before work begins


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["moe3d-tiny"], "-o is missing: name the bundle folder to write"),
        (["moe3d-tiny", "-o", "{out}", "--views", "8:4:1"], "--views 8:4:1: sizes must rise, min <= opt <= max"),
        (["moe3d-tiny", "-o", "{out}", "--views", "two"], "--views 'two': expected a number, min:max or min:opt:max, "),
        (["moe3d-tiny", "-o", "{out}", "--batch", "0"], "--batch 0: every size must be at least 1"),
        (["moe3d-tiny", "-o", "{out}", "--height", "100"], "--height 100: 100 is not a multiple of the patch size 7"),
        (["moe3d-tiny", "-o", "{out}", "--width", "140:150"], "--width 140:150:150: 150 is not a multiple of the"),
        (["moe3d-tiny", "-o", "{out}", "--static", "?x?x100x?"], "--static: height 100 is not a multiple of the patch "
         "size 7; nearest is 98"),
        (["moe3d-tiny", "-o", "{out}", "--static", "?x2x?x?", "--views", "1:2"], "--views 1:2: the file fixes views at "
         "2 (--static), leave --views out"),
        (["moe3d-tiny", "-o", "{out}", "--outputs", "normals"], "output 'normals' cannot be exported; choose from "),
        (["moe3d-tiny", "-o", "{out}", "--outputs", "expert_depths"], "output 'expert_depths' cannot be exported"),
        (["no-such-thing", "-o", "{out}"], "no-such-thing: no such bundle or checkpoint, nor a preset (vggt-1b, "),
        (["moe3d-tiny", "-o", "{out}", "--builder", "none", "--views", "2"], "--views is a shape of an engine and "),
        (["moe3d-tiny", "-o", "{out}", "--verify-quality", "--no-verify"], "--verify-quality is a part of the "
         "verification that --no-verify leaves out: drop one of them"),
        (["moe3d-tiny", "-o", "{out}", "--verify-quality", "4", "--static", "?x9x?x?"], "--verify-quality cannot "
         "render scenes for this file: "),
        ([".", "-o", "{out}", "--seed", "0"], "--seed is for the weights of a preset, . has its own: leave it out"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_code_2_before_any_work(
    arguments: list[str], message: str, calls: Calls, tmp_path: Path, capsys: Capture
) -> None:
    assert export_main([argument.format(out=tmp_path / "bundle") for argument in arguments]) == 2
    assert error_of(capsys).startswith(f"moe3d-export: {message}")
    assert (calls.exports, calls.engines) == ([], [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "{out}"], "{bundle} is a bundle: its engines are built in place; leave -o out"),
        (
            ["--builder", "none"],
            "{bundle} is a bundle already and --builder none builds no engine: nothing to do",
        ),
        *(
            (flags, "{bundle} is a bundle, its model is exported already; leave " + flags[0] + " out")
            for flags in (
                ["--precision", "fp32"],
                ["--precision", "fp16"],
                ["--outputs", "pose_enc"],
                ["--opset", "20"],
                ["--input", "uint8"],
                ["--static", "1x1x28x42"],
                ["--no-merge"],
                ["--no-verify"],
                ["--verify-quality"],
                ["--seed", "0"],
                ["--allow-pickle"],
                ["--overwrite"],
            )
        ),
        (["--height", "100"], "--height 100: 100 is not a multiple of the patch size 14; nearest is 98"),
    ],
)
def test_a_bundle_as_source_takes_engine_flags_alone(
    arguments: list[str], message: str, calls: Calls, tmp_path: Path, capsys: Capture
) -> None:
    """What cannot be done to a bundle is refused, not passed over."""
    bundle = str(exports.bundle().path)
    assert export_main([bundle, *(argument.format(out=tmp_path / "out") for argument in arguments)]) == 2
    assert error_of(capsys) == "moe3d-export: " + message.format(bundle=bundle)
    assert calls.engines == []


def test_a_bundle_as_source_builds_and_exports_nothing_again(calls: Calls, capsys: Capture) -> None:
    assert export_main([str(exports.bundle().path), "--views", "2", "--builder", "tensorrt-rtx"]) == 0
    assert calls.exports == []
    ((builder, profile),) = calls.engines
    assert builder == "tensorrt-rtx"
    assert (profile.min, profile.max) == ((1, 2, 42, 42), (1, 2, 42, 42))


def test_an_engine_that_went_is_told(calls: Calls, capsys: Capture) -> None:
    calls.dropped = ["engines/old.plan"]
    assert export_main([str(exports.bundle().path), "--views", "2", "--builder", "tensorrt-rtx"]) == 0
    assert "dropped      engines/old.plan was missing or damaged\n" in capsys.readouterr().err


def test_a_missing_engine_does_not_stop_the_build_that_replaces_it(calls: Calls, tmp_path: Path) -> None:
    path = shutil.copytree(exports.bundle().path, tmp_path / "small")
    profile = Profile((1, 1, 42, 42), (1, 1, 42, 42), (1, 1, 42, 42))
    record = EngineRecord("engines/e.plan", "tensorrt-rtx", "1.7.1", (89,), "fp16", (profile,))
    add_engine(path, record, lambda temp, _: temp.write_bytes(b"plan") and None)
    shutil.rmtree(path / "engines")
    assert export_main([str(path), "--views", "2", "--builder", "tensorrt-rtx"]) == 0
    assert len(calls.engines) == 1


def test_a_damaged_bundle_as_source_is_refused(calls: Calls, tmp_path: Path, capsys: Capture) -> None:
    path = shutil.copytree(exports.bundle().path, tmp_path / "small")
    (path / "model.onnx").write_bytes(b"")
    assert export_main([str(path)]) == 2
    assert "model.onnx has 0 bytes" in error_of(capsys)
    assert calls.engines == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["moe3d-tiny", "-o", "out", "--precision", "fp8"],
        ["moe3d-tiny", "-o", "out", "--builder", "onnx"],
        ["moe3d-tiny", "-o", "out", "--seed", "-1"],
        ["moe3d-tiny", "moe3d-1b", "-o", "out"],
    ],
)
@pytest.mark.parametrize("start", [export_main, lambda arguments: main(["export", *arguments])])
def test_a_wrong_call_is_a_usage_error(
    arguments: list[str], start: Callable[[list[str]], int], calls: Calls, capsys: Capture
) -> None:
    assert start(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith(("(see moe3d-export --help)\n", "(see moe3d --help)\n"))
    assert err.count("\n") == 1
    assert calls.exports == []

"""Ending a build early: cancelled, interrupted, killed; and the sign of life of a long step."""

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from engine_models import PROFILE, Build, Write, build_in_child, children, one_line

from moe3d_deploy.engines import build as engine_build
from moe3d_deploy.errors import EngineError

pytest_plugins = ["engine_fixtures"]
pytestmark = pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")


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

"""A library is loaded in a process of its own: whatever it does there, the answer is one line."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from moe3d_deploy import probe
from moe3d_deploy.probe import Answer


def plant(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str, module: str = "torch") -> None:
    """A module before all installed ones, for this process's children alone."""
    (folder / f"{module}.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))


def ask(name: str = "torch", timeout_seconds: float = 20) -> Answer:
    return probe.ask([name], timeout_seconds)[name]


def test_a_library_that_loads_tells_its_version() -> None:
    assert ask("numpy") == Answer({"version": np.__version__})


def test_onnxruntime_tells_its_providers_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "__version__ = '1.99'\ndef get_available_providers():\n    return ['CPUExecutionProvider']\n"
    plant(tmp_path, monkeypatch, code, "onnxruntime")
    assert ask("onnxruntime") == Answer({"version": "1.99", "providers": ["CPUExecutionProvider"]})


def test_what_a_library_prints_is_no_part_of_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import os\nprint('{}')\nos.write(1, b'noise')\n__version__ = '9'\n"
    plant(tmp_path, monkeypatch, code)
    assert ask() == Answer({"version": "9"})


def test_a_library_without_a_version_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, monkeypatch, "")
    assert ask() == Answer({"version": None})


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("raise OSError('libcudart.so.13: cannot\\n  open')", "does not load: OSError: libcudart.so.13: cannot open"),
        ("raise RuntimeError", "does not load: RuntimeError"),
        ("import os; os.kill(os.getpid(), 11)", "ends the process that loads it with SIGSEGV"),
        ("import os; os.abort()", "ends the process that loads it with SIGABRT"),
        ("raise SystemExit('wrong GPU')", "ends the process that loads it with code 1: wrong GPU"),
        ("import os; os._exit(0)", "ends the process that loads it with code 0"),
    ],
)
def test_a_library_that_fails_is_a_fault_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, fault: str
) -> None:
    plant(tmp_path, monkeypatch, code)
    assert ask() == Answer(None, fault)


def test_a_long_message_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, monkeypatch, "raise ImportError('x' * 10_000)")
    fault = ask().fault
    assert fault is not None
    assert len(fault) == 300
    assert fault.endswith("xxx...")


def test_a_library_that_hangs_is_ended_with_what_it_started_and_keeps_no_other_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = tmp_path / "pids"
    code = f"""
import os, subprocess, time
helper = subprocess.Popen(["sleep", "600"])
open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{helper.pid}}")
time.sleep(600)
"""
    plant(tmp_path, monkeypatch, code)
    started = time.monotonic()
    answers = probe.ask(["torch", "click"], 2)
    assert time.monotonic() - started < 10
    assert answers["torch"] == Answer(None, "does not load within 2 s")
    assert answers["click"].fault is None
    for pid in pids.read_text().split():
        assert not _runs(int(pid))


def _runs(pid: int) -> bool:
    """Whether the process is there and no zombie; given some time, as a kill takes a moment to reach a grandchild."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return False
        if state == "Z":
            return False
        time.sleep(0.02)
    return True


def test_a_process_whose_parent_is_gone_ends_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(tmp_path, monkeypatch, "import signal\nassert signal.getitimer(signal.ITIMER_REAL)[0] > 20\n")
    assert ask(timeout_seconds=20).fault is None


def test_the_cuda_driver_answers_like_a_library() -> None:
    answer = ask("cuda")
    assert answer.value is not None
    assert set(answer.value) == {"status", "api", "gpus", "version"}


def test_nothing_is_left_open() -> None:
    before = len(os.listdir("/proc/self/fd"))
    probe.ask(["click", "numpy"], 20)
    assert len(os.listdir("/proc/self/fd")) == before

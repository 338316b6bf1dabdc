"""Functions in a process of their own: what comes back, and how each way to end becomes an error."""

import ctypes
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moe3d_deploy import child
from moe3d_deploy.child import Emit, peak_bytes, run_in_child
from moe3d_deploy.errors import BundleError, EngineError, ExportError, InputError, MissingExtraError, Moe3dError

MIB = 1 << 20


# What the children run: the child finds this file through the parent's sys.path.


def answers(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    for step in range(3):
        emit({"step": step})
    return {"request": request, "pid": os.getpid()}


def raises(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    if request["kind"] == "MissingExtraError":
        raise MissingExtraError("onnxruntime", "cpu")
    raise {"BundleError": BundleError, "InputError": InputError, "ValueError": ValueError, "MemoryError": MemoryError}[
        request["kind"]
    ](request["message"])


def fills_the_disk(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    with open("/dev/full", "wb", buffering=0) as full:
        full.write(b"x")
    return {}


def ends(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    if request["how"] == "exit":
        sys.exit(request["code"])
    if request["how"] == "fault":
        ctypes.string_at(0)
    os.kill(os.getpid(), request["how"])
    return {}


def prints(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    sys.stdout.write('a line of Python\n{"result": "not ours", "peak_bytes": 0}\n')
    sys.stdout.flush()
    os.write(1, b"a line of a C library\n")
    subprocess.run(["echo", "a line of a grandchild"], check=True)
    emit({"step": 1})
    return {"fine": True}


def allocates(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    block = bytearray(request["bytes"])
    block[:: 1 << 12] = b"x" * len(block[:: 1 << 12])  # touch every page
    return {}


def waits(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    if request["deaf"]:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    emit({"pid": os.getpid()})
    time.sleep(60)
    return {}


def here(name: str) -> str:
    return f"{__name__}:{name}"


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits to be collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def ended_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_alive(pid)


def test_the_result_comes_back_from_another_process_and_events_in_order() -> None:
    events: list[dict[str, Any]] = []
    request = {"text": "ä\n\u2028", "numbers": [1, 0.1, None, True], "nested": {"a": []}}

    result = run_in_child(here("answers"), request, on_event=events.append)

    assert result.value["request"] == request
    assert result.value["pid"] != os.getpid()
    assert events == [{"step": 0}, {"step": 1}, {"step": 2}]
    assert 0 < result.seconds < 60


def test_events_need_no_listener() -> None:
    assert run_in_child(here("answers"), {}).value["request"] == {}


def test_a_request_larger_than_a_pipe_arrives_whole() -> None:
    request = {"text": "x" * (4 * MIB)}
    assert run_in_child(here("answers"), request).value["request"] == request


@pytest.mark.parametrize(("kind", "expected"), [("BundleError", BundleError), ("InputError", InputError)])
def test_a_project_error_keeps_its_class_and_message(kind: str, expected: type[Moe3dError]) -> None:
    with pytest.raises(Moe3dError) as caught:
        run_in_child(here("raises"), {"kind": kind, "message": "left.png: damaged"}, failure=ExportError)

    assert type(caught.value) is expected
    assert str(caught.value) == "left.png: damaged"


def test_an_error_that_words_its_own_message_travels_too() -> None:
    with pytest.raises(MissingExtraError) as caught:
        run_in_child(here("raises"), {"kind": "MissingExtraError"}, failure=ExportError)

    assert str(caught.value) == "onnxruntime is not installed: pip install 'moe3d-deploy[cpu]'"


def test_any_other_exception_is_the_callers_failure_in_one_line() -> None:
    with pytest.raises(ExportError) as caught:
        run_in_child(here("raises"), {"kind": "ValueError", "message": "no such axis"}, failure=ExportError)

    assert str(caught.value) == "test_child:raises failed: ValueError: no such axis"
    assert "in raises" in str(caught.value.__cause__)  # its traceback, for --debug


def test_an_error_speaks_of_the_title_it_is_given() -> None:
    with pytest.raises(ExportError, match="^the export failed: ValueError: no such axis$"):
        run_in_child(
            here("raises"), {"kind": "ValueError", "message": "no such axis"}, title="the export", failure=ExportError
        )


def test_an_error_of_the_system_stays_one_with_its_file() -> None:
    with pytest.raises(OSError, match="No space left on device") as caught:
        run_in_child(here("fills_the_disk"), {}, failure=ExportError)

    assert caught.value.errno == errno.ENOSPC


def test_nothing_in_the_working_folder_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A downloaded folder may hold a `torch.py`."""
    for module in ("ctypes", "json", "torch", "moe3d_deploy"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('imported from the working folder')")
    monkeypatch.chdir(tmp_path)

    assert run_in_child(here("answers"), {}).value["request"] == {}


def test_running_out_of_memory_is_the_callers_failure_and_says_what_to_do() -> None:
    with pytest.raises(EngineError) as caught:
        run_in_child(here("raises"), {"kind": "MemoryError", "message": ""}, failure=EngineError)

    assert str(caught.value) == "test_child:raises ran out of memory; free some, or use a machine with more"


@pytest.mark.parametrize(
    ("request_", "line"),
    [
        ({"how": "exit", "code": 0}, "test_child:ends ended with code 0: no message"),
        ({"how": "exit", "code": 3}, "test_child:ends ended with code 3: no message"),
        ({"how": "exit", "code": "disk is gone"}, "test_child:ends ended with code 1: disk is gone"),
        ({"how": "fault"}, "test_child:ends ended with code -11: no message"),
        ({"how": signal.SIGABRT}, "test_child:ends ended with code -6: no message"),
        (
            {"how": signal.SIGKILL},
            "test_child:ends was killed; the machine probably ran out of memory (see `dmesg`): free some and try again",
        ),
    ],
    ids=["exit 0", "exit 3", "exit with text", "segmentation fault", "abort", "kill -9"],
)
def test_a_child_that_dies_is_the_callers_failure_in_one_line(request_: dict[str, Any], line: str) -> None:
    with pytest.raises(ExportError) as caught:
        run_in_child(here("ends"), request_, failure=ExportError)

    assert str(caught.value) == line


def dies_in_a_message(request: dict[str, Any], emit: child.Emit) -> dict[str, Any]:
    """Half a line to the parent, as a child that is killed while it writes a long result leaves it."""
    pipes = [fd for fd in range(16) if os.path.realpath(f"/proc/self/fd/{fd}").rpartition("/")[2].startswith("pipe:")]
    os.write(max(pipes), b'{"result": {"headroom": [0.1, 0.')
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def test_half_a_message_is_the_death_it_was_cut_off_by() -> None:
    with pytest.raises(ExportError, match="dies_in_a_message was killed; the machine probably ran out of memory"):
        run_in_child(here("dies_in_a_message"), {}, failure=ExportError)


@pytest.mark.parametrize(
    ("function", "line"),
    [
        ("test_child:nothing", "AttributeError: module 'test_child' has no attribute 'nothing'"),
        ("no_such_module:f", "ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_a_function_that_does_not_exist_is_an_error_too(function: str, line: str) -> None:
    with pytest.raises(ExportError) as caught:
        run_in_child(function, {"text": "x" * MIB}, failure=ExportError)  # more than the child ever reads

    assert str(caught.value) == f"{function} failed: {line}"


def test_what_libraries_print_is_no_part_of_the_conversation(capfd: pytest.CaptureFixture[str]) -> None:
    events: list[dict[str, Any]] = []

    result = run_in_child(here("prints"), {}, on_event=events.append)

    assert result.value == {"fine": True}
    assert events == [{"step": 1}]
    assert capfd.readouterr() == ("", "")


def test_the_peak_is_the_childs_own() -> None:
    ballast = bytearray(300 * MIB)
    ballast[:: 1 << 12] = b"x" * len(ballast[:: 1 << 12])
    assert peak_bytes() > 300 * MIB

    small = run_in_child(here("allocates"), {"bytes": 0}).peak_bytes
    large = run_in_child(here("allocates"), {"bytes": 200 * MIB}).peak_bytes

    del ballast
    assert 5 * MIB < small < 200 * MIB  # an interpreter with this file's imports; not the parent's 300 MiB
    assert 195 * MIB < large - small < 215 * MIB


@pytest.fixture
def pids() -> Iterator[list[int]]:
    """Processes that a test lets run; what is left of them is ended."""
    started: list[int] = []
    yield started
    for pid in started:
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_error_while_listening_stops_the_child_at_once(error: type[BaseException], pids: list[int]) -> None:
    def listen(event: dict[str, Any]) -> None:
        pids.append(event["pid"])
        raise error

    started = time.monotonic()
    with pytest.raises(error):
        run_in_child(here("waits"), {"deaf": False}, on_event=listen)

    assert not is_alive(pids[0])
    assert time.monotonic() - started < child.GRACE_SECONDS / 2  # the interrupt did it, not the kill after it


def test_a_child_that_ignores_the_interrupt_is_killed(pids: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "GRACE_SECONDS", 0.3)

    def listen(event: dict[str, Any]) -> None:
        pids.append(event["pid"])
        raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_in_child(here("waits"), {"deaf": True}, on_event=listen)

    assert not is_alive(pids[0])
    assert time.monotonic() - started < 30  # on its own it would end after 60 s


# A parent that says which child it waits for. The handler is set anew: a shell's background jobs ignore SIGINT.
PARENT = """
import signal
from moe3d_deploy.child import run_in_child
signal.signal(signal.SIGINT, signal.default_int_handler)
run_in_child("test_child:waits", {"deaf": False}, on_event=lambda event: print(event["pid"], flush=True))
"""


@pytest.fixture
def parent(pids: list[int]) -> Iterator["subprocess.Popen[str]"]:
    """A process that waits for a child; both are in `pids`."""
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    with process:
        assert process.stdout is not None
        pids += [process.pid, int(process.stdout.readline())]
        yield process
        process.kill()


def test_ctrl_c_stops_the_child_and_then_the_parent(parent: "subprocess.Popen[str]", pids: list[int]) -> None:
    assert is_alive(pids[1])
    started = time.monotonic()

    parent.send_signal(signal.SIGINT)
    _, errors = parent.communicate(timeout=30)

    assert not is_alive(pids[1])
    assert time.monotonic() - started < child.GRACE_SECONDS / 2
    assert errors.splitlines()[-1] == "KeyboardInterrupt"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_parent_takes_the_child_with_it(
    number: signal.Signals, parent: "subprocess.Popen[str]", pids: list[int]
) -> None:
    assert is_alive(pids[1])

    parent.send_signal(number)

    assert parent.wait(30) == -number
    assert ended_within(pids[1], seconds=5)

"""Survival matrix: memory, clocks, threads, the end of the process, a machine without a GPU."""

import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from survival import (
    TESTS,
    Printed,
    assert_one_line,
    content,
    hidden,
    moe3d,
    most_memory,
    quick_export,
    run_program,
)

from moe3d_deploy.bundle import Bundle
from moe3d_deploy.child import Emit, run_in_child
from moe3d_deploy.cli.main import main
from moe3d_deploy.errors import ExportError
from moe3d_deploy.runtime.session import Session

pytest_plugins = ["survival_fixtures"]
ROOT = TESTS.parent
MIB = 1 << 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    path.mkdir()
    return path


# ---- memory

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # each thread maps memory of its own


@pytest.mark.survival(
    row="out of memory",
    how="`moe3d run` of 60 views with 150 to 800 MiB: too little for the libraries, or for the views",
)
@pytest.mark.parametrize("size", [150 * MIB, 300 * MIB, 800 * MIB])
def test_a_run_without_memory_is_one_line(
    size: int, finished: Path, folder: Path, photo: Path, printed: Printed
) -> None:
    arguments = ["run", finished, *[photo] * 60, "-o", "out", "--size", "518"]
    line = assert_one_line(moe3d(arguments, folder, setup=most_memory(size), **ONE_THREAD), 1)
    assert "internal error" not in line
    printed(line, 1)
    assert hidden(folder) == []
    assert not (folder / "out" / "cameras.json").exists()


@pytest.mark.survival(
    row="out of memory", how="an export that cannot load torch, and stages that cannot load the weights"
)
@pytest.mark.parametrize("where", ["command", "stage"])
def test_an_export_without_memory_is_one_line_and_nothing_is_left(
    where: str, checkpoint: Path, finished: Path, folder: Path, printed: Printed
) -> None:
    arguments = [checkpoint, "-o", "bundle", "--builder", "none"]
    if where == "command":
        ended = run_program(quick_export(finished), arguments, folder, setup=most_memory(250 * MIB), **ONE_THREAD)
    else:
        ended = run_program(quick_export(finished), arguments, folder, QUICK_EXPORT_SPARE_BYTES="0", **ONE_THREAD)
    line = assert_one_line(ended, 1, names="out of memory")
    printed(line, 1)
    assert list(folder.iterdir()) == []


@pytest.mark.survival(row="out of memory", how="an engine build whose processes may map 300 MiB")
def test_a_build_without_memory_is_one_line_and_the_bundle_stays(plain: Path, printed: Printed) -> None:
    pytest.importorskip("tensorrt_rtx", reason="builds an engine: pip install 'moe3d-deploy[rtx]'")
    before = content(plain)
    ended = moe3d(["export", plain, "--views", "1:2:4"], plain.parent, setup=most_memory(300 * MIB), **ONE_THREAD)
    printed(assert_one_line(ended, 1, names="memory"), 1)
    assert content(plain) == before
    assert hidden(plain.parent) == []


def ends_as_cpp_does(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """What a child does whose C++ library found no memory and caught nothing."""
    os.write(2, b"terminate called after throwing an instance of 'std::bad_alloc'\n  what():  std::bad_alloc\n")
    os.abort()


@pytest.mark.survival(row="out of memory", how="a library ends a stage by itself: C++'s bad_alloc")
def test_a_stage_that_a_library_ends_for_want_of_memory_says_so(printed: Printed) -> None:
    with pytest.raises(ExportError, match="^the stage ran out of memory; free some, or use a machine") as caught:
        run_in_child(f"{__name__}:ends_as_cpp_does", {}, title="the stage", failure=ExportError)
    printed(str(caught.value), ExportError.exit_code)


# ---- clocks


@pytest.mark.survival(
    row="a clock that jumps", how="time.time jumps back and forth by years at every call; files from 1970 and 2100"
)
def test_a_clock_that_jumps_changes_nothing(
    plain: Path, photo: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.random.default_rng(0).random((2, 3, 28, 42), np.float32)
    expected = Session.open(plain).run(images)
    clock = iter([4e9, 0.0] * 10_000)
    monkeypatch.setattr(time, "time", lambda: next(clock))
    monkeypatch.setattr(time, "time_ns", lambda: int(next(clock) * 1e9))
    for when in (0, 4_102_444_800):
        for path in [plain, *plain.rglob("*")]:
            os.utime(path, (when, when))
        for name, array in Session.open(plain).run(images).items():
            np.testing.assert_array_equal(array, expected[name])
        out = folder / str(when)
        assert main(["run", str(plain), str(photo), "-o", str(out), "--formats", "npz"]) == 0
        os.utime(out / "cameras.json", (when, when))
        assert main(["run", str(plain), str(photo), "-o", str(out), "--formats", "npz"]) == 0, "the earlier scene goes"


@pytest.mark.survival(row="a clock that jumps", how="an engine is built in a bundle whose files are from 2100")
def test_a_build_does_not_ask_how_old_files_are(good: Path) -> None:
    for path in [good, *good.rglob("*")]:
        os.utime(path, (4_102_444_800, 4_102_444_800))
    before = content(good)
    assert main(["export", str(good), "--views", "1:2:4"]) == 0
    assert content(good).keys() == before.keys()
    Bundle.open(good)


_OF_DAY = re.compile(
    r"\btime\.(time|time_ns|localtime|gmtime|strftime)\(|\bdatetime\b.*\bnow\(|\butcnow\(|st_[amc]time\b"
)
_WITH_REASON = dict.fromkeys(
    ("benchmarks/gpu_checks.py", "benchmarks/bench/run.py", "moe3d_deploy/cli/bench_parts.py"),
    "writes when it was started; nothing compares it",
)


@pytest.mark.survival(row="a clock that jumps", how="no module asks for the time of day or for the age of a file")
def test_durations_come_from_monotonic_clocks() -> None:
    found = {
        name: match[0]
        for top in ("moe3d_deploy", "export", "engines", "benchmarks")
        for path in sorted((ROOT / top).rglob("*.py"))
        for name in [path.resolve().relative_to(ROOT).as_posix()]
        for match in [_OF_DAY.search(path.read_text(encoding="utf-8"))]
        if match and name not in _WITH_REASON
    }
    assert found == {}


# ---- threads and the end of the process


@pytest.mark.survival(
    row="threads that share a session",
    how="4 threads, 25 runs each, of other shapes: bit by bit as one after the other",
)
def test_four_threads_give_what_one_gives(finished: Path) -> None:
    session = Session.open(finished)
    rng = np.random.default_rng(0)
    scenes = [rng.random((1 + index % 3, 3, 28 + 14 * (index % 2), 42), np.float32) for index in range(100)]
    expected = [session.run(scene) for scene in scenes]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(session.run, scenes))
    for result, other in zip(results, expected, strict=True):
        assert result.keys() == other.keys()
        for name, array in result.items():
            assert array.tobytes() == other[name].tobytes(), name


@pytest.mark.survival(
    row="threads that share a session", how="4 threads meet in the first run of a session that is not loaded yet"
)
def test_four_threads_may_load_a_session_at_once(finished: Path) -> None:
    images = np.random.default_rng(0).random((2, 3, 28, 42), np.float32)
    expected = Session.open(finished).run(images)["depth"].tobytes()
    session, gate = Session.open(finished, load=False), threading.Barrier(4)

    def run(_: int) -> bytes:
        gate.wait()
        return session.run(images)["depth"].tobytes()

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(run, range(4))) == {expected}


ENDINGS = {
    "an open session": "",
    "a thread at work": "threading.Thread(target=lambda: [session.run(images) for _ in range(5)]).start()",
    "sys.exit in the middle": "sys.exit(0)",
    "run at exit": "atexit.register(lambda: session.run(images))",
    "a cycle of references": "session.itself = session",
}


@pytest.mark.survival(
    row="interpreter shutdown", how="a process ends with an open session, a thread at work in it, a run at exit"
)
@pytest.mark.parametrize("kind", ENDINGS)
def test_a_process_may_end_with_an_open_session(kind: str, finished: Path) -> None:
    script = f"""
        import atexit, sys, threading, time
        import numpy as np
        from moe3d_deploy.runtime.session import Session
        session = Session.open({str(finished)!r})
        images = np.zeros((2, 3, 28, 42), np.float32)
        session.run(images)
        {ENDINGS[kind]}
    """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "", "")


# ---- no GPU

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.mark.survival(
    row="no GPU and no driver",
    how="no device is visible: an engine is built ahead, inspect and run work, the GPU checks say why not",
)
def test_everything_but_running_an_engine_works_without_a_gpu(
    good: Path, photo: Path, folder: Path, printed: Printed
) -> None:
    for arguments in (
        ["export", good, "--views", "3"],
        ["inspect", good],
        ["run", good, photo, "-o", folder / "out", "--formats", "npz"],
    ):
        ended = moe3d(arguments, folder, **NO_GPU)
        assert ended.code == 0, ended.errors
    program = [sys.executable, "-m", "moe3d_deploy.benchmarks.gpu_checks"]
    ended = run_program(program, ["--out", folder / "gpu.json"], folder, **NO_GPU)
    assert ended.code == 2
    assert len(ended.errors) == 1
    printed(ended.error, ended.code)
    assert not (folder / "gpu.json").exists()


@pytest.mark.survival(row="no GPU and no driver", how="TensorRT, which builds on the GPU it builds for, is asked for")
def test_a_builder_that_needs_a_gpu_says_so(plain: Path, folder: Path, printed: Printed) -> None:
    before = content(plain)
    ended = moe3d(["export", plain, "--builder", "tensorrt"], folder, **NO_GPU)
    printed(assert_one_line(ended, ended.code), ended.code)
    assert ended.code in (1, 2)
    assert content(plain) == before

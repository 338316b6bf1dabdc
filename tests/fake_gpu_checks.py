"""Checks that end in every way a GPU check can; child processes import them by name."""

import os
import time

from moe3d_deploy.benchmarks.checks import CheckRun
from moe3d_deploy.errors import EngineError, MissingExtraError


def passes(run: CheckRun) -> None:
    run.step("adding up")
    run.record(sum=2, where="/opt/data/file.bin", error=float("inf"))
    run.note("a note on /opt/data/file.bin")
    (run.work / "left").write_text(str(run.bundle))


def fails(run: CheckRun) -> None:
    run.record(error=0.5)
    run.fail("depth is off by 0.5")
    run.fail("so is confidence")
    run.record(later=True)


def skips(run: CheckRun) -> None:
    run.skip("no such library here")


def lacks_an_extra(run: CheckRun) -> None:
    raise MissingExtraError("tensorrt_rtx", "rtx")


def lacks_a_module(run: CheckRun) -> None:
    import no_such_library  # noqa: F401


def raises(run: CheckRun) -> None:
    run.step("second step")
    raise ValueError("what went wrong in /opt/data/file.py")


def raises_ours(run: CheckRun) -> None:
    raise EngineError("the engine did not run: nothing")


def crashes(run: CheckRun) -> None:
    run.record(before=1)
    run.step("calling the library")
    os.abort()


def hangs(run: CheckRun) -> None:
    run.record(before=1)
    run.step("waiting")
    time.sleep(600)


def fails_then_crashes(run: CheckRun) -> None:
    run.fail("depth is off by 0.5")
    os.abort()


def sees_what_was_left(run: CheckRun) -> None:
    run.record(left=(run.work / "left").read_text())

"""What all tests share: where the golden files lie, what this machine cannot run, the record of the survival tests."""

import ctypes
import itertools
import json
import os
import re
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest

_CACHES = itertools.count()

pytest.register_assert_rewrite("bundles", "models", "engine_models", "survival", "survival_fixtures")

# Before torch is imported. Its threads otherwise spin while they wait for each other; on a machine that is busy with
# something else, that makes small models 20 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(autouse=True)
def _own_engine_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds the engines of another, or leaves one in the user's cache."""
    folder = tmp_path_factory.getbasetemp() / f"engine-cache-{next(_CACHES)}"  # made when it is used
    monkeypatch.setenv("MOE3D_CACHE", str(folder))


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The golden files."""
    return Path(__file__).parent / "data"


_PRINTED = pytest.StashKey[list[dict[str, Any]]]()
_RECORDS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--survival-out", metavar="FILE", help="write what the survival tests saw to a JSON file")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RECORDS] = []


@pytest.fixture
def printed(request: pytest.FixtureRequest) -> Callable[[str, int], None]:
    """printed(text, exit_code): keep what a user saw, for the table of the survival matrix."""

    def keep(text: str, exit_code: int) -> None:
        text = re.sub(r"(partial|old|tmp)-[0-9a-f-]{8,}", r"\1-...", text)  # the same from run to run
        request.node.stash.setdefault(_PRINTED, []).append({"text": text, "exit_code": exit_code})

    return keep


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: "pytest.CallInfo[None]"
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Record a survival test once: after its call, or where it was skipped or failed before that."""
    report = yield
    marker = item.get_closest_marker("survival")
    if marker and (report.when == "call" or (report.when == "setup" and not report.passed)):
        skipped = report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else None
        item.config.stash[_RECORDS].append(
            {
                "row": marker.kwargs["row"],
                "how": marker.kwargs["how"],
                "test": item.nodeid,
                "printed": item.stash.get(_PRINTED, []),
                "outcome": report.outcome,
                "reason": skipped and skipped.removeprefix("Skipped: "),
            }
        )
    return report


def pytest_sessionfinish(session: pytest.Session) -> None:
    if out := session.config.getoption("--survival-out"):
        Path(out).write_text(json.dumps(session.config.stash[_RECORDS], indent=2) + "\n", encoding="utf-8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where the CUDA driver finds no device; `-ra` prints the reason."""
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and (reason := _why_no_gpu()):
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason=f"needs a CUDA device: {reason}"))


def _why_no_gpu() -> str | None:
    """Ask the driver itself: torch may be a CPU build beside a usable GPU, and its import takes seconds."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no CUDA driver (libcuda.so.1)"
    count = ctypes.c_int()
    status = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
    if status or count.value == 0:
        return f"the CUDA driver reports status {status} and {count.value} devices"
    return None

"""What a result file says of the machine: enough to judge a figure, nothing that names the machine or its folders."""

import json
import platform
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import moe3d_deploy
from moe3d_deploy import cuda_driver
from moe3d_deploy.benchmarks import environment as module
from moe3d_deploy.benchmarks.environment import environment, without_paths
from moe3d_deploy.cuda_driver import CudaDriver, Gpu

ROOT = Path(moe3d_deploy.__file__).resolve().parent.parent


def test_environment_says_what_a_figure_depends_on() -> None:
    found = environment()
    assert found["python"] == platform.python_version()
    assert found["packages"]["numpy"] == np.__version__
    assert found["moe3d_deploy"] == moe3d_deploy.__version__
    assert found["cpu"]["name"]
    assert 1 <= found["cpu"]["usable_cores"] <= found["cpu"]["logical_cores"]
    total_kb = int(re.findall(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())[0])
    assert found["memory_bytes"] == pytest.approx(1024 * total_kb, rel=0.01)  # the two differ by reserved pages
    assert {"gpus", "driver", "cuda_driver_api", "git", "command", "system"} <= set(found)
    json.dumps(found, allow_nan=False)


def test_environment_names_neither_the_machine_nor_a_folder_of_it() -> None:
    found = environment(command=["python", "-m", "x", "--out", "/mnt/disk/person/out.json", "--bundle=/data/bundle"])
    text = json.dumps(found)
    assert found["command"] == "python -m x --out out.json --bundle=bundle"
    assert socket.gethostname() not in text
    assert str(ROOT) not in text
    assert re.search(r'[" =]/\w', text) is None


def test_command_is_that_of_the_process_unless_given() -> None:
    assert environment()["command"].startswith(("python -m pytest", "pytest"))


@pytest.mark.parametrize(
    ("process", "command"),
    [
        (["/opt/bin/python3", "/opt/bin/moe3d", "bench", "--out", "/data/out"], "moe3d bench --out out"),
        (["/opt/bin/python3", "-m", "moe3d_deploy", "bench"], "python -m moe3d_deploy bench"),
        (["/opt/bin/python3", "/data/measure.py", "x"], "python measure.py x"),
        (["/opt/bin/python3"], "python"),
    ],
)
def test_command_is_what_a_user_types(process: list[str], command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", process)
    assert environment()["command"] == command


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("wrote /mnt/a/b.json", "wrote b.json"),
        ("'/opt/x/y.py' line 3", "'y.py' line 3"),
        ("In f at /_src/runtime/a.cpp:13", "In f at a.cpp:13"),
        ("fp16/fp32, 3 / 4, a/b, ../c/d", "fp16/fp32, 3 / 4, a/b, ../c/d"),
        ("see https://example.org/page", "see https://example.org/page"),
    ],
)
def test_absolute_paths_become_their_last_part(text: str, shown: str) -> None:
    assert without_paths(text) == shown


def test_cards_are_those_of_the_cuda_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = CudaDriver(0, "12.6", (Gpu("Test Card 9000", (8, 7), 141 << 30),))
    monkeypatch.setattr(cuda_driver, "query", lambda: driver)
    monkeypatch.setattr(cuda_driver, "driver_version", lambda: "580.10.01")
    found = environment()
    assert found["gpus"] == [{"name": "Test Card 9000", "compute_capability": "8.7", "memory_bytes": 141 << 30}]
    assert (found["cuda_driver_api"], found["driver"]) == ("12.6", "580.10.01")


def test_a_machine_without_a_driver_has_no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_driver, "query", lambda: CudaDriver(None, None, ()))
    monkeypatch.setattr(cuda_driver, "driver_version", lambda: None)
    found = environment()
    assert (found["gpus"], found["cuda_driver_api"], found["driver"]) == ([], None, None)


def git(folder: Path, *arguments: str) -> str:
    names = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *names, "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_git_revision_and_whether_files_differ_from_it(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet")
    (tmp_path / "code.py").write_text("a = 1\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "first")
    revision = git(tmp_path, "rev-parse", "HEAD")
    assert module._git(tmp_path, None) == {"revision": revision, "dirty": False}

    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results" / "new.json").write_text("{}")
    assert module._git(tmp_path, None)["dirty"] is False  # a result does not change the code that made it

    (tmp_path / "code.py").write_text("a = 2\n")
    assert module._git(tmp_path, "ignored") == {"revision": revision, "dirty": True}


def test_without_git_the_revision_is_the_given_one_and_dirt_is_unknown(tmp_path: Path) -> None:
    assert module._git(tmp_path, "abc123") == {"revision": "abc123", "dirty": None}
    assert module._git(tmp_path, None) == {"revision": None, "dirty": None}

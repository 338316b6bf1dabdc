"""What a result file says of the machine: enough to judge a figure, nothing that names the machine or its folders."""

import ctypes
import json
import platform
import re
import socket
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import moe3d_deploy
from moe3d_deploy.benchmarks import environment as module
from moe3d_deploy.benchmarks.environment import environment, read_cuda_driver, without_paths

ROOT = Path(moe3d_deploy.__file__).resolve().parent.parent


class FakeDriver:
    """libcuda of a machine with two cards, of which the second does not answer."""

    def cuInit(self, flags: int) -> int:
        return 0

    def cuDriverGetVersion(self, out: Any) -> int:
        return self._give(out, 12060)

    def cuDeviceGetCount(self, out: Any) -> int:
        return self._give(out, 2)

    def cuDeviceGet(self, out: Any, index: int) -> int:
        return 0 if index == 0 else 101

    def cuDeviceGetName(self, name: Any, size: int, device: ctypes.c_int) -> int:
        name.value = b"Test Card 9000"
        return 0

    def cuDeviceTotalMem_v2(self, out: Any, device: ctypes.c_int) -> int:
        assert isinstance(out._obj, ctypes.c_size_t)  # a C int would end at 2 GiB
        return self._give(out, 141 << 30)

    def cuDeviceGetAttribute(self, out: Any, attribute: int, device: ctypes.c_int) -> int:
        return self._give(out, {75: 8, 76: 7}[attribute])

    def _give(self, out: Any, value: int) -> int:
        out._obj.value = value
        return 0


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
    assert environment()["command"].startswith("python ")
    assert "pytest" in environment()["command"]


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


def test_cards_come_from_the_cuda_driver() -> None:
    assert read_cuda_driver(FakeDriver()) == {
        "gpus": [{"name": "Test Card 9000", "compute_capability": "8.7", "memory_bytes": 141 << 30}],
        "cuda_driver_api": "12.6",
    }


def test_a_driver_that_does_not_start_means_no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeDriver, "cuInit", lambda self, flags: 100)  # CUDA_ERROR_NO_DEVICE
    assert read_cuda_driver(FakeDriver()) == {"gpus": [], "cuda_driver_api": None}


def test_driver_version_is_what_nvidia_smi_prints(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$1" = --query-gpu=driver_version ] && printf "580.10.01\\n580.10.01\\n"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert environment()["driver"] == "580.10.01"


def test_driver_version_is_unknown_where_nvidia_smi_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho no devices were found\nexit 6\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert environment()["driver"] is None


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

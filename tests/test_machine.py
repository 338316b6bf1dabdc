"""What a machine and its container have, from copies of the kernel's files as cgroups(7) and proc(5) describe them."""

import os
import re
from pathlib import Path

import pytest

from moe3d_deploy import machine

GIB = 1 << 30
MEMINFO = "MemTotal:       16777216 kB\nMemFree:          100 kB\nMemAvailable:    8388608 kB\n"  # 16 GiB and 8 GiB


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for / with 16 GiB of memory, 8 of them available, and no control group."""
    (tmp_path / "proc" / "self").mkdir(parents=True)
    (tmp_path / "proc" / "meminfo").write_text(MEMINFO)
    monkeypatch.setattr(machine, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "_CGROUPS", tmp_path / "cgroup")
    return tmp_path


def put(root: Path, membership: str, files: dict[str, object]) -> None:
    (root / "proc" / "self" / "cgroup").write_text(membership)
    for name, content in files.items():
        path = root / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{content}\n")


@pytest.mark.parametrize(
    ("cpuinfo", "exact"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512_vnni\n", True),
        ("flags\t\t: fpu avx2 avx_vnni avx_ifma\n", True),
        ("flags\t\t: fpu avx2 avx512f avx512bw\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd asimddp\n", True),  # Arm
    ],
)
def test_which_processors_multiply_bytes_exactly(kernel: Path, cpuinfo: str, exact: bool) -> None:
    (kernel / "proc" / "cpuinfo").write_text(cpuinfo)
    assert machine.multiplies_bytes_exactly() is exact


def test_without_control_groups_nothing_is_limited(kernel: Path) -> None:
    assert machine.memory_bytes() == 16 * GIB
    assert machine.available_memory_bytes() == 8 * GIB
    assert machine.memory_limit_bytes() is None
    assert machine.core_limit() is None


def test_a_container_with_the_second_version_has_its_own_group_as_root(kernel: Path) -> None:
    files = {"memory.max": 2 * GIB, "memory.current": GIB, "cpu.max": "150000 100000"}
    put(kernel, "0::/\n", files)
    assert machine.memory_limit_bytes() == 2 * GIB
    assert machine.available_memory_bytes() == GIB
    assert machine.core_limit() == 1.5


def test_the_tightest_of_all_groups_above_counts(kernel: Path) -> None:
    files = {
        "user/memory.max": 3 * GIB,
        "user/memory.current": 1 * GIB,
        "user/job/memory.max": 4 * GIB,
        "user/job/memory.current": int(3.5 * GIB),
        "user/cpu.max": "50000 100000",
        "user/job/cpu.max": "max 100000",
    }
    put(kernel, "0::/user/job\n", files)
    assert machine.memory_limit_bytes() == 3 * GIB
    assert machine.available_memory_bytes() == GIB // 2
    assert machine.core_limit() == 0.5


def test_a_group_outside_the_containers_view_is_looked_up_at_the_root(kernel: Path) -> None:
    put(kernel, "0::/docker/0123\n", {"memory.max": 2 * GIB, "memory.current": 0})
    assert machine.memory_limit_bytes() == 2 * GIB


def test_the_first_version_has_folders_per_controller(kernel: Path) -> None:
    membership = "4:memory:/job\n2:cpu,cpuacct:/job\n1:name=systemd:/\n0::/\n"
    files = {
        "memory/job/memory.limit_in_bytes": 2 * GIB,
        "memory/job/memory.usage_in_bytes": GIB,
        "cpu/job/cpu.cfs_quota_us": 200000,
        "cpu/job/cpu.cfs_period_us": 100000,
    }
    put(kernel, membership, files)
    assert machine.memory_limit_bytes() == 2 * GIB
    assert machine.available_memory_bytes() == GIB
    assert machine.core_limit() == 2


def test_the_first_versions_numbers_for_no_limit_are_none(kernel: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": 9223372036854771712,
        "memory/memory.usage_in_bytes": GIB,
        "cpu/cpu.cfs_quota_us": -1,
        "cpu/cpu.cfs_period_us": 100000,
    }
    put(kernel, "4:memory:/\n2:cpu:/\n", files)
    assert machine.memory_limit_bytes() is None
    assert machine.available_memory_bytes() == 8 * GIB
    assert machine.core_limit() is None


@pytest.mark.parametrize(("folder", "key"), [("", "inactive_file"), ("memory/", "total_inactive_file")])
def test_cached_files_of_a_container_can_be_had_back(kernel: Path, folder: str, key: str) -> None:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if folder else ("memory.max", "memory.current")
    own = "inactive_file 3\n" if folder else ""  # version 1 counts the groups below only in the totals
    stat = f"anon 5\n{own}active_file 7\n{key} {GIB}\nunevictable 0\n"
    files = {folder + names[0]: 4 * GIB, folder + names[1]: 3 * GIB, folder + "memory.stat": stat}
    put(kernel, "4:memory:/\n" if folder else "0::/\n", files)
    assert machine.available_memory_bytes() == 2 * GIB


def test_a_limit_beyond_the_machine_makes_nothing_more_available(kernel: Path) -> None:
    put(kernel, "0::/\n", {"memory.max": 64 * GIB, "memory.current": GIB})
    assert machine.available_memory_bytes() == 8 * GIB


def test_a_container_over_its_limit_has_nothing_left(kernel: Path) -> None:
    put(kernel, "0::/\n", {"memory.max": GIB, "memory.current": 2 * GIB})
    assert machine.available_memory_bytes() == 0


def test_this_machine_is_read_too(tmp_path: Path) -> None:
    total = int(re.findall(r"MemTotal:\s+(\d+) kB", Path("/proc/meminfo").read_text())[0]) * 1024
    assert machine.memory_bytes() == total
    assert 0 < machine.available_memory_bytes() <= total
    assert 1 <= machine.usable_cores() <= (os.cpu_count() or 1)
    disk = os.statvfs(tmp_path)
    assert machine.free_disk_bytes(tmp_path) == pytest.approx(disk.f_bavail * disk.f_frsize, rel=0.05)


def test_a_processor_without_a_name_is_called_by_its_architecture(
    kernel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (kernel / "proc" / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Test CPU 3000 \n\nmodel name\t: other\n")
    assert machine.cpu_name() == "Test CPU 3000"
    (kernel / "proc" / "cpuinfo").write_text("processor\t: 0\nBogoMIPS\t: 50.00\n")
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    assert machine.cpu_name() == "aarch64"

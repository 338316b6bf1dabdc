"""The machine that a process runs on: processor, memory, disk, and what its container leaves of them."""

import os
import platform
import re
import shutil
from pathlib import Path

_PROC = Path("/proc")
_CGROUPS = Path("/sys/fs/cgroup")
NO_VNNI = "ONNX Runtime's products in 8 bits overflow on this processor, which has no VNNI"
_UNLIMITED_BYTES = 1 << 62  # cgroup v1 has no word for "no limit", but a number near 2^63


def cpu_name() -> str:
    """The model name; on machines whose kernel gives none (most 64-bit Arm ones), the architecture."""
    names = re.findall(r"^model name\s*: (.+)$", (_PROC / "cpuinfo").read_text(), re.MULTILINE)
    return names[0].strip() if names else platform.machine()


def multiplies_bytes_exactly() -> bool:
    """Whether ONNX Runtime's products in 8 bits are exact on this processor.

    Without VNNI an x86 processor adds two products in 16 bits, where 255 * 127 twice is too much and is cut off.
    """
    flags = re.findall(r"^flags\s*: (.+)$", (_PROC / "cpuinfo").read_text(), re.MULTILINE)  # none on Arm
    return not flags or not {"avx512_vnni", "avx_vnni"}.isdisjoint(flags[0].split())


def usable_cores() -> int:
    """How many logical cores this process may be scheduled on."""
    return len(os.sched_getaffinity(0))


def core_limit() -> float | None:
    """How many cores' worth of time the container gives, such as 1.5; None where it sets no limit."""
    limits = []
    for folder in _cgroup_folders("cpu"):
        quota, _, period = _content(folder / "cpu.max").partition(" ")  # v2: "150000 100000" or "max 100000"
        quota = quota or _content(folder / "cpu.cfs_quota_us")  # v1: -1 for none
        period = period or _content(folder / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period):
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def memory_bytes() -> int:
    """The machine's memory, whatever a container leaves of it."""
    return _meminfo("MemTotal")


def memory_limit_bytes() -> int | None:
    """What the container allows, as long as the machine has it; None where it sets no limit."""
    return min((limit for limit, _ in _memory_limits()), default=None)


def available_memory_bytes() -> int:
    """What can be had now without swapping: the kernel's estimate for the machine, or what a container has left."""
    return max(0, min([_meminfo("MemAvailable"), *(limit - used for limit, used in _memory_limits())]))


def free_disk_bytes(folder: Path) -> int:
    """What this user can still write below an existing folder. Raises OSError."""
    return shutil.disk_usage(folder).free


def _meminfo(key: str) -> int:
    return int(re.findall(rf"^{key}:\s+(\d+) kB$", (_PROC / "meminfo").read_text(), re.MULTILINE)[0]) * 1024


def _memory_limits() -> list[tuple[int, int]]:
    """Limit and use, in bytes, of each control group above this process that has a limit.

    Cached file pages that were not used lately are no use: the kernel drops them when memory is asked for.
    """
    found = []
    for folder in _cgroup_folders("memory"):
        limit = _content(folder / "memory.max") or _content(folder / "memory.limit_in_bytes")
        used = _content(folder / "memory.current") or _content(folder / "memory.usage_in_bytes")
        if limit.isdecimal() and used.isdecimal() and int(limit) < _UNLIMITED_BYTES:
            cached = re.findall(r"^(?:total_)?inactive_file (\d+)$", _content(folder / "memory.stat"), re.MULTILINE)
            found.append((int(limit), int(used) - int(cached[-1] if cached else 0)))
    return found


def _cgroup_folders(controller: str) -> list[Path]:
    """This process's control group for `controller` and those above it, in version 1 and in version 2.

    A container may see its own group as the root or, without a namespace of its own, under a path that is not there.
    """
    folders = []
    for line in _content(_PROC / "self" / "cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number != "0" and controller not in controllers.split(","):
            continue
        root = _CGROUPS if number == "0" else _CGROUPS / controller
        group = root / path.lstrip("/")
        folders += [folder for folder in (group, *group.parents) if folder.is_relative_to(root) and folder.is_dir()]
    return folders


def _content(file: Path) -> str:
    """A small file's text, stripped; empty where there is none to read."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""

"""The state that a machine is in while it is measured: what changes from minute to minute. What cannot be read is None.

The machine itself is `environment`'s subject.
"""

import os
import re
from pathlib import Path
from typing import Any

from moe3d_deploy.cuda_driver import nvidia_smi

_SMI_FIELDS = {
    "clocks.sm": "sm_mhz",
    "clocks.mem": "memory_mhz",
    "temperature.gpu": "celsius",
    "power.draw": "watts",
    "utilization.gpu": "busy_percent",
}


def machine_state(root: Path = Path("/")) -> dict[str, Any]:
    """JSON-able; of the CPU from the kernel's files below `root`, of the first GPU from nvidia-smi.

    load_average      processes that ran or wanted to, over 1, 5 and 15 minutes
    cpu_mhz           mean over the cores; a virtual machine may show a fixed number
    governor          of the cores' frequencies; several are joined by a comma
    cpu_celsius       the warmest sensor of a processor or board
    gpu               sm_mhz, memory_mhz, celsius, watts, busy_percent; None without a GPU or nvidia-smi
    """
    return {
        "load_average": _load_average(root),
        "cpu_mhz": _mean(re.findall(r"^cpu MHz\s*: ([\d.]+)$", _text(root / "proc/cpuinfo"), re.MULTILINE))
        or _mean(_texts(root, "sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq"), unit=1e-3),
        "governor": ",".join(sorted(set(_texts(root, "sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor"))))
        or None,
        "cpu_celsius": _warmest(root),
        "gpu": _gpu(),
    }


def _load_average(root: Path) -> list[float] | None:
    numbers = _text(root / "proc/loadavg").split()[:3]
    return [float(number) for number in numbers] if len(numbers) == 3 else None


def _warmest(root: Path) -> float | None:
    readings = [
        int(text) / 1000  # the kernel gives thousandths
        for pattern in ("sys/class/thermal/thermal_zone*/temp", "sys/class/hwmon/hwmon*/temp*_input")
        for text in _texts(root, pattern)
        if re.fullmatch(r"-?\d+", text)
    ]
    return max(readings, default=None)


def _gpu() -> dict[str, float | None] | None:
    line = nvidia_smi(*_SMI_FIELDS)
    return parse_smi(line) if line else None


def parse_smi(output: str) -> dict[str, float | None] | None:
    """nvidia-smi's line as numbers; it writes [N/A] for what a card does not tell."""
    values = [value.strip() for value in output.split(",")]
    if len(values) != len(_SMI_FIELDS):
        return None
    names = _SMI_FIELDS.values()
    return {
        name: float(value) if re.fullmatch(r"[\d.]+", value) else None
        for name, value in zip(names, values, strict=True)
    }


def _mean(numbers: list[str], unit: float = 1.0) -> float | None:
    return round(unit * sum(map(float, numbers)) / len(numbers), 1) if numbers else None


def _texts(root: Path, pattern: str) -> list[str]:
    return [text for path in sorted(root.glob(pattern)) if (text := _text(path))]


def _text(path: Path) -> str:
    """A small file's content, stripped; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def cpu_seconds() -> float:
    """Processor time of this process, all its threads."""
    times = os.times()
    return times.user + times.system

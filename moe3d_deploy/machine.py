"""Facts of the machine that records of builds and measurements carry."""

import platform
import re
from pathlib import Path


def cpu_name() -> str:
    """The model name; on machines whose kernel gives none (most 64-bit Arm ones), the architecture."""
    names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return names[0].strip() if names else platform.machine()

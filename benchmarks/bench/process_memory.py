"""Host memory of this process, as the kernel counts it: what loading and running a model adds to what was there."""

import re
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc/self")
_RESET_PEAK = "5"  # proc(5), clear_refs: the peak of the resident set starts again from what it is now


@dataclass(frozen=True)
class Resident:
    """Bytes in memory now, of them those mapped from files, and the most so far."""

    now: int
    files: int
    peak: int

    @classmethod
    def read(cls, process: Path = _PROC) -> "Resident":
        status = (process / "status").read_text()

        def value(key: str) -> int:
            return int(re.findall(rf"^{key}:\s+(\d+) kB$", status, re.MULTILINE)[0]) * 1024

        return cls(value("VmRSS"), value("RssFile"), value("VmHWM"))


class HostMemory:
    """Marks what is there before loading, after it, after the first run and after the last one."""

    def __init__(self, process: Path = _PROC) -> None:
        self._process = process
        self._reset()  # loading the libraries may have needed more than they keep
        self.before = self.loaded = self.ran = Resident.read(process)
        self._can_reset = False

    def after_load(self) -> None:
        self.loaded = Resident.read(self._process)
        self._can_reset = self._reset()

    def after_first_run(self) -> None:
        self.ran = Resident.read(self._process)

    def figures(self) -> dict[str, int | None]:
        """After the last run: the fields of `report.Memory` that are of the process.

        anonymous_bytes is what the first run added at its most, without the pages of files, which are weights that had
        not been read yet: tensors and workspaces.
        """
        end = Resident.read(self._process)
        load_peak = self.loaded.peak - self.before.now
        run_peak = end.peak - self.before.now if self._can_reset else None
        added = self.ran.peak - self.loaded.now - max(0, self.ran.files - self.loaded.files)
        return {
            "before_bytes": self.before.now,
            "load_peak_bytes": load_peak,
            "run_peak_bytes": run_peak,
            "peak_bytes": max(load_peak, end.peak - self.before.now),
            "anonymous_bytes": max(0, added) if self._can_reset else None,
        }

    def _reset(self) -> bool:
        try:
            (self._process / "clear_refs").write_text(_RESET_PEAK)
        except OSError:
            return False
        return True

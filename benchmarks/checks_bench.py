"""GPU checks that are runs of `moe3d bench` on the card: everything that runs the model side by side, and parity."""

import json
import subprocess
import sys
from typing import Any

from moe3d_deploy.benchmarks import torch_device
from moe3d_deploy.benchmarks.checks import CheckRun
from moe3d_deploy.errors import Moe3dError

PRESET = "moe3d-1b"
PEERS = ("--peers", "--shapes", "1x1x518x518,1x8x518x518", "--processes", "1")
PARITY = ("--parity",)
_UNSOUND = ("impossible", "failed")


def bench_peers(run: CheckRun) -> None:
    """moe3d-1b in every precision, compiled and eager, beside the user's bundle if there is one."""
    torch_device.start(run)
    bench(run, [PRESET, *([str(run.bundle)] if run.bundle else [])], PEERS)


def bench_parity(run: CheckRun) -> None:
    """moe3d-1b in every precision against itself in float32, at the shapes of `moe3d bench --parity`."""
    torch_device.start(run)
    bench(run, [PRESET], PARITY)


def bench(run: CheckRun, sources: list[str], options: tuple[str, ...]) -> None:
    """Record the whole `report` of `moe3d bench`; fail for what could not be measured, is impossible or leaves a limit.

    Raises Moe3dError with the command's last line if it ends without a report.
    """
    arguments = ["bench", *sources, *options, "--json"]
    run.step(f"moe3d {' '.join(arguments)}")
    ended = subprocess.run([sys.executable, "-m", "moe3d_deploy", *arguments], capture_output=True, text=True)
    try:
        report = json.loads(ended.stdout)
    except ValueError:
        lines = ended.stderr.strip().splitlines() or [f"ended with {ended.returncode} and said nothing"]
        raise Moe3dError(f"moe3d bench: {lines[-1]}") from None
    run.record(report=report)
    found = _faults(report["sections"])
    for line in found:
        run.fail(line)
    if ended.returncode and not found:
        run.fail(f"moe3d bench ended with {ended.returncode}: a value leaves the limits of its precision")


def _faults(sections: dict[str, Any]) -> list[str]:
    """A line for every case and variant that has no figures it should have."""
    rows = _rows(sections, "cases", "cases") + _rows(sections, "parity", "variants")
    return [f"{_name(row)}: {row['reason']}" for row in rows if row["status"] in _UNSOUND]


def _name(row: dict[str, Any]) -> str:
    shape = "x".join(map(str, row.get("shape", [])))
    return f"{row['backend']} {row['precision']} {shape}".rstrip()


def _rows(sections: dict[str, Any], name: str, key: str) -> list[dict[str, Any]]:
    return sections[name][key] if sections.get(name) else []

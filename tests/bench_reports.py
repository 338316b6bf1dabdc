"""Reports of `moe3d bench` made up for tests: every figure is given or has a default, nothing is measured."""

import dataclasses
import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from moe3d_deploy.benchmarks.bench.report import (
    Case,
    Cases,
    Ceilings,
    Memory,
    Predicted,
    Rates,
    Report,
    Round,
    Sections,
    Shape,
)
from moe3d_deploy.cli.main import main
from moe3d_deploy.config import PRESETS

ENVIRONMENT: dict[str, Any] = {
    "gpus": [],
    "cuda_driver_api": None,
    "driver": None,
    "cpu": {"name": "A Processor", "logical_cores": 4, "usable_cores": 2},
    "memory_bytes": 8 << 30,
    "system": {"name": "Linux", "machine": "x86_64"},
    "python": "3.11.2",
    "moe3d_deploy": "0.1.0",
    "packages": {"numpy": "2.3.0", "torch": "2.13.0"},
    "git": {"revision": "0123456789abcdef", "dirty": False},
    "command": "moe3d bench moe3d-tiny",
}
STATE = {"load_average": [0.5, 0.4, 0.3], "cpu_mhz": 2600.0, "governor": None, "cpu_celsius": None, "gpu": None}
CEILINGS = Ceilings(10e9, {"float32": Rates(matmul=100e9, convolution=80e9)})
MEMORY = Memory(
    before_bytes=300_000_000,
    load_peak_bytes=30_000_000,
    run_peak_bytes=120_000_000,
    peak_bytes=120_000_000,
    weights_bytes=22_000_000,
    activations_bytes=80_000_000,
    activations_by="allocator",
    device=None,
)


def die(request: dict[str, Any], emit: Any) -> dict[str, Any]:
    """Child: what the kernel does to a process that has taken all memory."""
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def a_round(times: Sequence[float] = (10.0, 11.0, 12.0), **changes: Any) -> Round:
    """A process whose runs took `times` milliseconds, all of them in the model."""
    plain = Round(
        seed=0,
        device="cpu",
        load_seconds=0.5,
        warmup_runs=6,
        stable=True,
        series={"model": tuple(times), "inference": tuple(times)},
        pipeline=None,
        photographs=None,
        cores_used=1.9,
        threads=2,
        cuda_graph=False,
        memory=MEMORY,
        ceilings=CEILINGS,
        before=STATE,
        after=STATE,
    )
    return dataclasses.replace(plain, **changes)


def a_case(rounds: Sequence[Round] = (), shape: Shape = (1, 1, 196, 252), **changes: Any) -> Case:
    """A measured case of 0.5 GFLOP, which takes 5 ms at CEILINGS."""
    plain = Case(
        model="moe3d-tiny",
        kind="preset",
        backend="pytorch",
        precision="fp32",
        shape=shape,
        work={"float32": 500_000_000},
        weight_bytes=22_000_000,
        traffic_bytes=50_000_000,
        predicted=Predicted("eager", 22_000_000, 78_000_000),
        status="measured",
        reason=None,
        findings=(),
        rounds=tuple(rounds) or (a_round(),),
    )
    return dataclasses.replace(plain, **changes)


def a_report(*cases: Case, environment: Mapping[str, Any] | None = None, complete: bool = True) -> Report:
    """A report of these cases, all of moe3d-tiny; `environment` replaces entries of ENVIRONMENT."""
    models = {"moe3d-tiny": PRESETS["moe3d-tiny"].to_dict()}
    about = {**ENVIRONMENT, **(environment or {})}
    return Report(complete, "2026-11-21T00:00:00+00:00", about, Sections(Cases(models, {"runs": 3}, tuple(cases))))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that `moe3d bench` writes before it ends with 2."""
    assert main(["bench", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err

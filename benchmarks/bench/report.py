"""The report of `moe3d bench`: what was measured, raw, as a tree of frozen dataclasses and as `report.json`.

Nothing that follows from other figures is stored; `figures` works it out. Field by field: docs/benchmarks.md.
"""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe3d_deploy import strict_json
from moe3d_deploy.benchmarks.bench.parity import Parity
from moe3d_deploy.benchmarks.bench.price import Price
from moe3d_deploy.config import ModelConfig
from moe3d_deploy.errors import BundleError, InputError
from moe3d_deploy.strict_fields import MAY_BE_ABSENT, read, require

FORMAT = "moe3d-bench"
FORMAT_VERSION = 1
REPORT_NAME = "report.json"
MEASURED, IMPOSSIBLE, FAILED = "measured", "impossible", "failed"
UNAVAILABLE = "unavailable"
WHOLE = "inference"  # of a run's series: images in host memory to outputs in host memory
PIPELINE_WHOLE = "whole"  # of a pipeline's: bytes of image files to the files of `moe3d run`

_MAX_BYTES = 64 << 20
_OF_ENVIRONMENT = {"cpu": dict, "memory_bytes": int, "gpus": list, "packages": dict, "git": dict, "command": str}

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Rates:
    """What arithmetic of one type reaches here, FLOP/s: the fastest run of large matmuls, and of large convolutions."""

    matmul: float
    convolution: float

    @property
    def best(self) -> float:
        return max(self.matmul, self.convolution)


@dataclass(frozen=True)
class Ceilings:
    """Measured in the process of the case, in the library that runs the model.

    copy_bytes_per_second   read and written, the fastest run of a large copy
    flops_per_second        by the type that computes
    """

    copy_bytes_per_second: float
    flops_per_second: dict[str, Rates]


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on a GPU. `driver_bytes`: the driver's figure, taken by everything since before loading, at its largest."""

    driver_bytes: int
    allocated_bytes: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one process, beside what it held before it loaded the model (`before_bytes`).

    load_peak_bytes     the most while the model was loaded
    run_peak_bytes      the most from the first run to the last; None where the kernel does not reset its peak
    peak_bytes          the larger one
    weights_bytes       of the model's parameters, or of the bundle's file
    activations_bytes   the most alive at once in a run; None where nothing tells
    activations_by      how that is known: "allocator", or "anonymous memory", which has workspaces in it
    """

    before_bytes: int
    load_peak_bytes: int
    run_peak_bytes: int | None
    peak_bytes: int
    weights_bytes: int
    activations_bytes: int | None
    activations_by: str | None
    device: DeviceMemory | None


@dataclass(frozen=True)
class Round:
    """One process: load, warm-up, runs.

    series       milliseconds by stage, an entry for every run: upload, model, download (as the backend has them) and
                 WHOLE, which is all of them
    pipeline     the same of a few runs of the whole way: decode, preprocess, WHOLE, post and PIPELINE_WHOLE; None where
                 no photograph becomes a view of this shape
    photographs  what is decoded, in words
    cores_used   seconds of processor time per second of the runs
    device          "cpu" or "cuda"
    before, after   the machine's state (docs/benchmarks.md)
    first_run_seconds   of the run after loading, in which what compiles while it runs does so
    """

    seed: int
    device: str
    load_seconds: float
    warmup_runs: int
    stable: bool
    series: dict[str, tuple[float, ...]]
    pipeline: dict[str, tuple[float, ...]] | None
    photographs: str | None
    cores_used: float
    threads: int
    cuda_graph: bool
    memory: Memory
    ceilings: Ceilings
    before: dict[str, Any]
    after: dict[str, Any]
    first_run_seconds: float | None = field(default=None, metadata=MAY_BE_ABSENT)

    def __post_init__(self) -> None:
        _check_series("series", self.series, WHOLE)
        if self.pipeline is not None:
            _check_series("pipeline", self.pipeline, PIPELINE_WHOLE)


@dataclass(frozen=True)
class Finding:
    """A figure above its ceiling: the `stage` whose time says so, "compute" (FLOP/s) or "memory" (bytes/s)."""

    stage: str
    kind: str
    reached: float
    ceiling: float


@dataclass(frozen=True)
class Predicted:
    """`moe3d plan`'s bytes, with attention in `form` (docs/costs.md)."""

    form: str
    weights_bytes: int
    activations_bytes: int


@dataclass(frozen=True)
class Case:
    """A model in a backend on images of one shape (B, S, H, W), in as many processes as `rounds` has entries.

    work           FLOP by the type that computes them; traffic_bytes is the least that has to move (docs/costs.md)
    weight_bytes   of the weights that a run reads, in their stored type
    status         MEASURED; IMPOSSIBLE, where a figure beats its ceiling (`findings`); FAILED, for `reason`;
                   UNAVAILABLE, where this machine cannot run it, for `reason`
    nodes          of the ONNX file
    """

    model: str
    kind: str
    backend: str
    precision: str
    shape: Shape
    work: dict[str, int]
    weight_bytes: int
    traffic_bytes: int
    predicted: Predicted
    status: str
    reason: str | None
    findings: tuple[Finding, ...]
    rounds: tuple[Round, ...]
    nodes: int | None = field(default=None, metadata=MAY_BE_ABSENT)

    def __post_init__(self) -> None:
        known = (MEASURED, IMPOSSIBLE, FAILED, UNAVAILABLE)
        require(self.status in known, "status", f"must not be {self.status!r}")
        require(min(self.shape) > 0, "shape", "must be positive")
        require((self.reason is None) == (self.status == MEASURED), "reason", "must be that of a case not measured")
        require(self.status in (FAILED, UNAVAILABLE) or bool(self.rounds), "rounds", "must not be empty")

    @property
    def label(self) -> str:
        return f"{self.model} {self.backend} {self.precision} {'x'.join(map(str, self.shape))}"

    def pooled(self, stage: str = WHOLE) -> list[float]:
        """The runs of all rounds, milliseconds."""
        return [value for item in self.rounds for value in item.series[stage]]


@dataclass(frozen=True)
class Cases:
    """The first section. `models` holds the config of every model by its name in the cases."""

    models: dict[str, dict[str, Any]]
    options: dict[str, Any]
    cases: tuple[Case, ...]

    def __post_init__(self) -> None:
        for i, case in enumerate(self.cases):
            require(case.model in self.models, f"cases[{i}].model", "is not among the models")
        for name, values in self.models.items():
            try:
                ModelConfig.from_dict(values)
            except InputError as error:
                raise BundleError(f"models.{name}: {error}") from None


@dataclass(frozen=True)
class Sections:
    """The parts of a report. A later one is a field more; what was not asked for is None and absent from the JSON."""

    cases: Cases | None = field(default=None, metadata=MAY_BE_ABSENT)
    price: Price | None = field(default=None, metadata=MAY_BE_ABSENT)
    parity: Parity | None = field(default=None, metadata=MAY_BE_ABSENT)


@dataclass(frozen=True)
class Report:
    """`complete` False: the run was interrupted, and the sections hold what was finished."""

    complete: bool
    started: str
    environment: dict[str, Any]
    sections: Sections = field()
    format: str = field(default=FORMAT)
    format_version: int = field(default=FORMAT_VERSION)

    def __post_init__(self) -> None:
        for key, kind in _OF_ENVIRONMENT.items():
            require(isinstance(self.environment.get(key), kind), f"environment.{key}", f"must be a {kind.__name__}")

    @property
    def cases(self) -> tuple[Case, ...]:
        return self.sections.cases.cases if self.sections.cases else ()

    def to_json(self) -> bytes:
        """The form of `report.json`, the same bytes for the same report."""
        values = dataclasses.asdict(self, dict_factory=_without_absent)
        ordered = {key: values.pop(key) for key in ("format", "format_version")} | values
        return (json.dumps(ordered, indent=1, allow_nan=False) + "\n").encode()

    @classmethod
    def from_json(cls, data: bytes, source: str) -> "Report":
        """Read and check the JSON form; whatever is wrong with it is an InputError that names `source`."""
        remedy = "give a report.json of moe3d bench, or measure again"
        try:
            values = strict_json.parse(data, max_bytes=_MAX_BYTES)
            if not isinstance(values, dict) or values.get("format") != FORMAT:
                raise InputError(f"{source} is no report of moe3d bench; {remedy}")
            version = values.get("format_version")
            if type(version) is int and version != FORMAT_VERSION:
                age = "update moe3d-deploy" if version > FORMAT_VERSION else "measure again"
                raise InputError(f"{source} has format_version {version}; this version reads {FORMAT_VERSION}: {age}")
            return read(cls, values, "")
        except strict_json.JsonError as error:
            raise InputError(f"{source} {error}; {remedy}") from None
        except BundleError as error:  # what strict_fields says of any file
            raise InputError(f"{source}: {error}; {remedy}") from None

    @classmethod
    def load(cls, path: Path) -> "Report":
        """Read a file, or the report in a folder. Raises InputError."""
        file = path / REPORT_NAME if path.is_dir() else path
        if not file.is_file():
            raise InputError(f"{path}: no such report; give a report.json or the folder that holds it")
        return cls.from_json(file.read_bytes(), str(path))


_MAY_LACK = {f.name for cls in (Sections, Case, Round) for f in dataclasses.fields(cls) if f.metadata == MAY_BE_ABSENT}


def _without_absent(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in pairs if value is not None or key not in _MAY_LACK}


def _check_series(where: str, series: dict[str, tuple[float, ...]], whole: str) -> None:
    require(bool(series.get(whole)), where, f"must have runs of {whole!r}")
    for name, times in series.items():
        require(len(times) == len(series[whole]), f"{where}.{name}", "must have an entry of every run")
        require(min(times) >= 0, f"{where}.{name}", "must not be negative")
    require(sum(series[whole]) > 0, f"{where}.{whole}", "must not be 0 throughout")

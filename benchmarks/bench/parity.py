"""The section `parity` of a report: how far every backend and precision is from the float32 or float64 model.

Raw figures per variant and shape, and what follows from them: the worst and the median over the shapes, and what leaves
the exporter's limits. Field by field: docs/benchmarks.md.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from moe3d_deploy.config import ModelConfig
from moe3d_deploy.errors import BundleError, InputError
from moe3d_deploy.export.compare import Limits, beyond
from moe3d_deploy.strict_fields import require

COMPARED, LEFT_OUT, FAILED, NOT_RUN = "compared", "left out", "failed", "not run"
DEPTH = "depth"

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class OutputError:
    """`export.compare.errors` of one output: max |a-b| / max |b|, mean |a-b| / mean |b|, and the 99th percentile of
    |a-b| / |b|. None is infinite: a value that is not finite in one of the two."""

    max: float | None
    mean: float | None
    p99: float | None

    def __post_init__(self) -> None:
        for name in ("max", "mean", "p99"):
            value = getattr(self, name)
            require(value is None or (math.isfinite(value) and value >= 0), name, "must be finite and not negative")


@dataclass(frozen=True)
class Difference:
    """One variant at one shape (B, S, H, W), beside the reference. None is what cannot be told (docs/benchmarks.md).

    abs_rel              of its depth, after one median scale per scene, with the reference's as truth: mean of scenes
    scale                that scale's largest distance from 1
    rotation_deg         the largest angle between a view's two rotations, camera from world
    translation_deg      the largest between the two directions in which one view of a pair lies from the other
    translation_share    the largest |t_a - t_b| of a scene of several views over its largest |t_b|
    boundary_f1          of its depth, with the reference's as truth: mean of the views where that has boundaries
    truth_f1             of its depth, with the scene's true one: mean of the views
    truth_f1_change      mean of the views' |truth_f1 - the reference's|
    experts_agree        share of the pixels in which the same expert has the largest weight
    """

    errors: dict[str, OutputError]
    abs_rel: float | None
    scale: float | None
    rotation_deg: float | None
    translation_deg: float | None
    translation_share: float | None
    boundary_f1: float | None
    truth_f1: float | None
    truth_f1_change: float | None
    experts_agree: float | None

    def __post_init__(self) -> None:
        require(DEPTH in self.errors, "errors", f"must have {DEPTH!r}")


@dataclass(frozen=True)
class Cell:
    """A variant at the shape of this place in `Parity.inputs`; COMPARED, LEFT_OUT or FAILED, both for `reason`."""

    status: str
    reason: str | None
    found: Difference | None

    def __post_init__(self) -> None:
        require(self.status in (COMPARED, LEFT_OUT, FAILED), "status", f"must not be {self.status!r}")
        require((self.reason is None) == (self.status == COMPARED), "reason", "must be that of what is not compared")
        require((self.found is None) == (self.status != COMPARED), "found", "must be that of what is compared")


@dataclass(frozen=True)
class Input:
    """What all variants saw at one shape.

    images     in words: which scenes, or which random images
    reference  None where the reference ran; else why not, and then nothing is compared
    truth_f1   boundary F1 of the reference's depth with the scene's true one; None without a truth
    """

    shape: Shape
    images: str
    reference: str | None
    truth_f1: float | None

    def __post_init__(self) -> None:
        require(min(self.shape) > 0, "shape", "must be positive")


@dataclass(frozen=True)
class Variant:
    """A backend in a precision.

    name        of the checkpoint, or of the bundle's folder, or of the engine's file
    device      "cpu" or "cuda"; None where it did not run
    arithmetic  how it computes, in words
    weights     how it is known that these are the checkpoint's weights, in words
    limits      of the exporter for its precision, `export.compare.Limits.errors`
    status      COMPARED; NOT_RUN, where it cannot run here, and FAILED, where it should have: both for `reason`
    cells       as many as inputs, in their order; fewer where the measurement was interrupted
    """

    backend: str
    name: str
    precision: str
    device: str | None
    arithmetic: str
    weights: str
    limits: dict[str, dict[str, float]]
    status: str
    reason: str | None
    cells: tuple[Cell, ...]

    def __post_init__(self) -> None:
        require(self.status in (COMPARED, NOT_RUN, FAILED), "status", f"must not be {self.status!r}")
        require((self.reason is None) == (self.status == COMPARED), "reason", "must be that of what did not run")
        for name, bounds in self.limits.items():
            good = all(kind in ("max", "mean") for kind in bounds)
            require(good, f"limits.{name}", "must have the keys max and mean alone")
        require("*" in self.limits, "limits", "must have '*', for every other output")

    @property
    def label(self) -> str:
        return f"{self.backend} {self.precision} {self.name}"


@dataclass(frozen=True)
class Parity:
    """`reference` is the precision of the PyTorch model that all is compared with, float64 or float32, on `device`."""

    model: str
    config: dict[str, Any]
    sha256: str | None
    parameters: int
    reference: str
    device: str | None
    inputs: tuple[Input, ...]
    variants: tuple[Variant, ...]

    def __post_init__(self) -> None:
        try:
            ModelConfig.from_dict(self.config)
        except InputError as error:
            raise BundleError(f"config: {error}") from None
        for i, variant in enumerate(self.variants):
            require(len(variant.cells) <= len(self.inputs), f"variants[{i}].cells", "must not be more than the inputs")

    @property
    def sound(self) -> bool:
        """Whether all that should have run did, and keeps its limits."""
        ran = all(item.reference is None for item in self.inputs)
        return ran and all(
            variant.status != FAILED
            and all(cell.status != FAILED for cell in variant.cells)
            and not faults(self, variant)
            for variant in self.variants
        )


class Spread(NamedTuple):
    """A figure of a variant over the shapes that have it; `worst` is at `shape`. Infinite where a value is not."""

    worst: float
    shape: Shape
    median: float


def compared(parity: Parity, variant: Variant) -> list[tuple[Shape, Difference]]:
    """What a variant was compared at, in the order of the shapes."""
    places = zip(parity.inputs, variant.cells, strict=False)
    return [(item.shape, cell.found) for item, cell in places if cell.found is not None]


def spread(
    parity: Parity, variant: Variant, figure: Callable[[Difference], float | None], *, lowest: bool = False
) -> Spread | None:
    """Of a figure over the shapes; None where none has it.

    lowest   the smallest is the worst, as of an F1
    """
    values = [(value, shape) for shape, found in compared(parity, variant) if (value := figure(found)) is not None]
    if not values:
        return None
    worst, shape = (min if lowest else max)(values, key=lambda pair: pair[0])
    return Spread(worst, shape, statistics.median(value for value, _ in values))


def error_of(output: str, kind: str) -> Callable[[Difference], float | None]:
    """The figure of an output's error for `spread`; None where the variant has no such output."""

    def figure(found: Difference) -> float | None:
        error = found.errors.get(output)
        return None if error is None else infinite(getattr(error, kind))

    return figure


def infinite(value: float | None) -> float:
    """An error as a number."""
    return math.inf if value is None else value


def faults(parity: Parity, variant: Variant) -> list[tuple[Shape, str]]:
    """Of every error that leaves the exporter's limits, the shape and a sentence that says by how much."""
    limits = Limits(variant.limits, None)
    found = []
    for shape, difference in compared(parity, variant):
        errors = {
            name: {kind: infinite(getattr(error, kind)) for kind in ("max", "mean", "p99")}
            for name, error in difference.errors.items()
        }
        found += [(shape, text) for text in beyond(errors, limits)]
    return found


def keeps_limits(parity: Parity, variant: Variant) -> bool | None:
    """Whether a variant keeps the limits at every shape it was compared at; None where that is none."""
    return not faults(parity, variant) if compared(parity, variant) else None

"""Errors between two runs of a model, and the limits they must keep. NumPy alone.

The limits are data, `limits.json`: float32 noise of this model is below 1e-5, a wrong operation shows at 1e-4 or
more; fp16 rounding gives at most a few 1e-3. bfloat16 rounds to 8 bits where half has 11, and every error of the trunk
grows with the rounding, so bf16's limits are 8 times fp16's. They are not loosened to pass.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe3d_deploy.errors import ExportError

Errors = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Limits:
    """What a precision has to keep.

    errors    output name, or "*" for every other, -> the largest "max" and "mean" error
    headroom  the largest share of the 16-bit range that any tensor may use; None in float32
    """

    errors: dict[str, dict[str, float]]
    headroom: float | None

    @classmethod
    def of(cls, precision: str) -> "Limits":
        table = json.loads(resources.files("moe3d_deploy.export").joinpath("limits.json").read_text(encoding="utf-8"))
        base = precision.partition("-")[0]
        return cls(table[base], table["headroom"].get(base))


def errors(found: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]) -> Errors:
    """Per output: max |a-b| / max |b|, mean |a-b| / mean |b|, and the 99th percentile of |a-b| / |b| per value.

    A shape that differs gives inf, and so does a non-finite value that is not the same in both (a field of view of 0
    has an infinite focal length in PyTorch too).
    """
    return {name: _error(found[name], reference) for name, reference in expected.items()}


def _error(found: NDArray[Any], expected: NDArray[Any]) -> dict[str, float]:
    if found.shape != expected.shape:
        return {"max": math.inf, "mean": math.inf, "p99": math.inf}
    finite = np.isfinite(expected)
    size = np.abs(np.where(finite, expected, 0).astype(np.float64))
    with np.errstate(invalid="ignore"):  # inf - inf
        difference = np.where(found == expected, 0.0, np.abs(found.astype(np.float64) - expected))
    difference[np.isnan(difference)] = math.inf
    tiny = float(np.finfo(np.float32).tiny)
    values = {
        "max": difference.max() / max(size.max(), tiny),
        "mean": difference.mean() / max(size.mean(), tiny),
        "p99": np.percentile(difference / np.maximum(size, tiny), 99, method="higher"),
    }
    return {kind: float(value) for kind, value in values.items()}


def beyond(found: Errors, limits: Limits) -> Iterator[str]:
    """Of every error of `found` that leaves the limits, a sentence that says by how much."""
    for name, error in found.items():
        for kind, bound in limits.errors.get(name, limits.errors["*"]).items():
            if not error[kind] <= bound:
                yield f"{name} is off by {error[kind]:.2g} ({kind} relative), the limit is {bound:g}"


def require_within(label: str, found: Errors, limits: Limits, remedy: str) -> None:
    """Raise ExportError, which ends with `remedy`, for the first output of `found` that leaves the limits."""
    if fault := next(beyond(found, limits), None):
        raise ExportError(f"verification failed: {label}: {fault}; nothing was written. {remedy}")


def require_headroom(shares: Mapping[str, float], bound: float, remedy: str) -> None:
    """Raise ExportError, which ends with `remedy`, if a tensor uses more than `bound` of its 16-bit type's range."""
    if not shares:
        return
    name, share = max(shares.items(), key=lambda item: item[1])
    if not share <= bound:
        raise ExportError(
            f"verification failed: tensor '{name}' reaches {share:.2g} of its 16-bit range, the limit is {bound:g}; "
            f"nothing was written. {remedy}"
        )

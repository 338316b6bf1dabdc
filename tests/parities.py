"""Sections `parity` made up for tests, and measuring without a process per model."""

import importlib
from collections.abc import Sequence
from typing import Any

from moe3d_deploy.benchmarks.bench.parity import (
    COMPARED,
    Cell,
    Difference,
    Input,
    OutputError,
    Parity,
    Shape,
    Variant,
)
from moe3d_deploy.child import Emit
from moe3d_deploy.config import PRESETS
from moe3d_deploy.export.compare import Limits

SHAPES: tuple[Shape, ...] = ((1, 1, 28, 42), (1, 3, 28, 28), (2, 1, 14, 14))


def in_process(function: str, request: dict[str, Any], on_event: Emit) -> None:
    """What a child would do, here."""
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)(request, on_event)


def a_difference(depth: float | None, mean: float | None = 0.0, **changes: Any) -> Difference:
    """Of a variant whose depth is off by `depth` at the most, and nothing else is."""
    none = OutputError(0.0, 0.0, 0.0)
    values: dict[str, Any] = {
        "errors": {"depth": OutputError(depth, mean, depth), "extrinsics": none},
        "abs_rel": 0.0,
        "scale": 0.0,
        "rotation_deg": 0.0,
        "translation_deg": None,
        "translation_share": 0.0,
        "boundary_f1": 1.0,
        "truth_f1": 0.5,
        "truth_f1_change": 0.0,
        "experts_agree": None,
    }
    return Difference(**{**values, **changes})


def a_cell(depth: float | None, **changes: Any) -> Cell:
    return Cell(COMPARED, None, a_difference(depth, **changes))


def a_variant(cells: Sequence[Cell], precision: str = "fp16", **changes: Any) -> Variant:
    values: dict[str, Any] = {
        "backend": "onnxruntime",
        "name": "bundle",
        "precision": precision,
        "device": "cpu",
        "arithmetic": "its own",
        "weights": "the same digest",
        "limits": Limits.of(precision).errors,
        "status": COMPARED,
        "reason": None,
        "cells": tuple(cells),
    }
    return Variant(**{**values, **changes})


def a_parity(*variants: Variant, reference: str | None = None) -> Parity:
    """At SHAPES; `reference` says why it did not run at the last of them."""
    inputs = [Input(shape, "scenes of test-seeds, seed 0", None, 0.5) for shape in SHAPES]
    inputs[-1] = Input(SHAPES[-1], "smooth random images, seed 200", reference, None)
    config = PRESETS["moe3d-tiny"]
    return Parity(
        "moe3d-tiny", config.to_dict(), "ab" * 32, 5_500_000, "fp64", "cpu", tuple(inputs), tuple(variants)
    )  # fmt: skip

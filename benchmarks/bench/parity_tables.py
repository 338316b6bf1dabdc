"""The section `parity` as tables: a line per variant, per output, per shape, and what was not compared."""

import math
from collections.abc import Callable

from moe3d_deploy.benchmarks.bench import text
from moe3d_deploy.benchmarks.bench.parity import (
    COMPARED,
    DEPTH,
    Difference,
    Parity,
    Shape,
    Variant,
    compared,
    error_of,
    faults,
    keeps_limits,
    spread,
)
from moe3d_deploy.benchmarks.bench.text import ABSENT, Table

_WHAT = ("backend", "precision", "of")
_WORDS = len(_WHAT)
_SHOWN = 3  # shapes of a reason


def tables(parity: Parity) -> list[Table]:
    """All of them, without those that would be empty."""
    found = [summary(parity), scenes(parity), outputs(parity), shapes(parity), troubles(parity), models(parity)]
    return [table for table in found if table.rows]


def summary(parity: Parity) -> Table:
    rows = []
    for variant in parity.variants:
        depth = spread(parity, variant, error_of(DEPTH, "max"))
        mean = spread(parity, variant, error_of(DEPTH, "mean"))
        left = {shape for shape, _ in faults(parity, variant)}
        verdict = {None: variant.status, True: "yes", False: f"no, at {len(left)} shapes"}[
            keeps_limits(parity, variant)
        ]
        rows.append(
            (
                *_what(variant),
                f"{len(compared(parity, variant))} of {len(parity.inputs)}",
                _error(depth and depth.worst),
                text.shape(depth.shape) if depth else ABSENT,
                _error(depth and depth.median),
                _error(mean and mean.worst),
                verdict,
            )
        )
    header = (*_WHAT, "shapes", "depth max, worst", "at", "median", "depth mean, worst", "keeps the limits")
    note = (
        f"Against {_reference(parity)} with the same weights and images: max |a - b| / max |b| and mean |a - b| / "
        f"mean |b| of depth, over the shapes. Limits: the exporter's for the precision, of every output. {ABSENT} or "
        "not run: it was not tested."
    )
    return Table("Parity", header, tuple(rows), _WORDS, note)


def scenes(parity: Parity) -> Table:
    figures: tuple[tuple[str, Callable[[Difference], float | None], bool, Callable[[float | None], str]], ...] = (
        ("AbsRel, scale aligned", lambda found: found.abs_rel, False, _error),
        ("rotation, deg", lambda found: found.rotation_deg, False, _error),
        ("translation, deg", lambda found: found.translation_deg, False, _error),
        ("translation, share", lambda found: found.translation_share, False, _error),
        ("boundary F1", lambda found: found.boundary_f1, True, _score),
        ("change of F1 with truth", lambda found: found.truth_f1_change, False, _error),
        ("experts agree", lambda found: found.experts_agree, True, _score),
    )
    rows = []
    for variant in _ran(parity):
        cells = []
        for _, figure, lowest, show in figures:
            found = spread(parity, variant, figure, lowest=lowest)
            cells.append(f"{show(found.worst)} ({show(found.median)})" if found else ABSENT)
        rows.append((*_what(variant), *cells))
    note = (
        "The worst of the shapes, and the median of them. AbsRel: of depth, after one median scale per scene. "
        "Rotation: of a view. Translation, of scenes of several views: directions between pairs, and distances over "
        "the scene's largest. Boundary F1: with the reference's depth as truth. Change of F1 with truth: of a view, in "
        "procedural scenes with the true depth. Experts agree: pixels with the same strongest expert."
    )
    return Table(
        "Parity of depth, cameras and experts", (*_WHAT, *(name for name, *_ in figures)), tuple(rows), _WORDS, note
    )


def outputs(parity: Parity) -> Table:
    rows = []
    for variant in _ran(parity):
        names = dict.fromkeys(name for _, found in compared(parity, variant) for name in found.errors)
        for name in names:
            cells = []
            for kind in ("max", "mean", "p99"):
                if found := spread(parity, variant, error_of(name, kind)):
                    cells += [_error(found.worst), _error(found.median)]
                    cells += [text.shape(found.shape)] if kind == "max" else []
            bounds = variant.limits.get(name, variant.limits["*"])
            limit = ", ".join(f"{kind} {bound:g}" for kind, bound in bounds.items())
            rows.append((*_what(variant), name, *cells, limit))
    header = (
        "max, worst", "median", "at", "mean, worst", "median", "p99, worst", "median", "limit",
    )  # fmt: skip
    note = (
        "Max and mean are shares of the output's largest and mean value; p99 is the 99th percentile of |a - b| / |b| "
        "per value, large where values are near 0."
    )
    return Table("Parity by output", (*_WHAT, "output", *header), tuple(rows), _WORDS + 1, note)


def shapes(parity: Parity) -> Table:
    ran = _ran(parity)
    rows = []
    for i, item in enumerate(parity.inputs):
        cells = []
        for variant in ran:
            cell = variant.cells[i] if i < len(variant.cells) else None
            cells.append(_error(error_of(DEPTH, "max")(cell.found)) if cell and cell.found else ABSENT)
        rows.append((text.shape(item.shape), item.images, _score(item.truth_f1), *cells))
    header = ("shape BxSxHxW", "images", "F1 of the reference", *(variant.label for variant in ran))
    note = (
        "The largest depth error, as in the first table. F1 of the reference: its depth's boundaries with the scene's "
        "true ones. Nothing was tuned or verified at these shapes, unless they were given."
    )
    return Table("Parity by shape", header, tuple(rows), 2, note)


def troubles(parity: Parity) -> Table:
    """What was not compared, and what leaves the limits; a line for each reason of a variant."""
    rows = [
        ("pytorch", parity.reference, parity.model, "failed", text.shape(item.shape), item.reference)
        for item in parity.inputs
        if item.reference
    ]
    for variant in parity.variants:
        if variant.reason:
            rows.append((*_what(variant), variant.status, "all", variant.reason))
            continue
        reasons: dict[tuple[str, str], list[Shape]] = {}
        for item, cell in zip(parity.inputs, variant.cells, strict=False):
            if cell.status != COMPARED and not item.reference:
                reasons.setdefault((cell.status, cell.reason or ""), []).append(item.shape)
        rows += [(*_what(variant), status, _places(places), why) for (status, why), places in reasons.items()]
        rows += [(*_what(variant), "beyond", text.shape(shape), why) for shape, why in faults(parity, variant)]
    header = (*_WHAT, "", "shapes", "reason")
    return Table("Parity: not compared, and beyond the limits", header, tuple(rows), len(header))


def models(parity: Parity) -> Table:
    rows = [
        (*_what(variant), variant.device or ABSENT, variant.arithmetic, variant.weights) for variant in parity.variants
    ]
    header = (*_WHAT, "on", "arithmetic", "the same weights")
    note = f"Reference: {_reference(parity)}, {parity.parameters / 1e6:.1f} M parameters"
    note += f", SHA-256 {parity.sha256}." if parity.sha256 else "."
    return Table("Parity: what was compared", header, tuple(rows), len(header), note)


def _ran(parity: Parity) -> list[Variant]:
    return [variant for variant in parity.variants if compared(parity, variant)]


def _what(variant: Variant) -> tuple[str, str, str]:
    return variant.backend, variant.precision, variant.name


def _reference(parity: Parity) -> str:
    kind = {"fp64": "float64", "fp32": "float32"}.get(parity.reference, parity.reference)
    return f"{parity.model} in {kind} PyTorch on {parity.device or 'no device'}"


def _places(shapes: list[Shape]) -> str:
    shown = ", ".join(map(text.shape, shapes[:_SHOWN]))
    return shown if len(shapes) <= _SHOWN else f"{shown} and {len(shapes) - _SHOWN} more"


def _error(value: float | None) -> str:
    if value is None:
        return ABSENT
    return "not finite" if math.isinf(value) else f"{value:.2g}"


def _score(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4f}"

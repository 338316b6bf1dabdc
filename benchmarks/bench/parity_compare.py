"""The figures of one variant at one shape: its outputs beside the reference's. NumPy alone."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe3d_deploy.benchmarks.bench.parity import Difference, OutputError
from moe3d_deploy.errors import InputError
from moe3d_deploy.export.compare import errors
from moe3d_deploy.metrics.boundary import boundary_f1
from moe3d_deploy.metrics.depth import align_median, depth_errors
from moe3d_deploy.metrics.pose import relative_pose_errors

EXPERTS = "strongest_expert"  # (B, S, H, W) uint8, in place of the weights

Arrays = Mapping[str, NDArray[Any]]


def difference(found: Arrays, expected: Arrays, names: Sequence[str], truth: NDArray[Any] | None) -> Difference:
    """Compare outputs by name.

    found, expected   of a variant and of the reference: depth (B, S, H, W), extrinsics (B, S, 3, 4) and the rest of
                      `names`; EXPERTS where it is known
    names             the outputs whose errors count
    truth             (B, S, H, W) true depth with 0 where none is known; None where the images are of no scene
    """
    measured = errors({name: found[name] for name in names}, {name: expected[name] for name in names})
    whole = {name: OutputError(**{kind: _finite(x) for kind, x in error.items()}) for name, error in measured.items()}
    depths, references = found["depth"], expected["depth"]
    aligned = _aligned(depths, references)
    rotation, direction, share = _cameras(found["extrinsics"], expected["extrinsics"])
    ours, theirs = boundary_scores(depths, truth), boundary_scores(references, truth)
    both = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    agree = EXPERTS in found and EXPERTS in expected
    return Difference(
        errors=whole,
        abs_rel=_mean([abs_rel for abs_rel, _ in aligned]),
        scale=max((abs(scale - 1) for _, scale in aligned), default=None),
        rotation_deg=rotation,
        translation_deg=direction,
        translation_share=share,
        boundary_f1=_mean(boundary_scores(depths, references)),
        truth_f1=_mean(ours),
        truth_f1_change=_mean([abs(a - b) for a, b in both]),
        experts_agree=float(np.mean(found[EXPERTS] == expected[EXPERTS])) if agree else None,
    )


def boundary_scores(depth: NDArray[Any], truth: NDArray[Any] | None) -> list[float | None]:
    """Boundary F1 of every view of depth (B, S, H, W) with `truth` as such; None for a view without boundaries in it,
    without a known pixel, or whose depth cannot be judged."""
    if truth is None:
        return []
    views = zip(_views(depth), _views(truth), strict=True)
    return [_boundary(view, true) for view, true in views]


def mean_boundary(depth: NDArray[Any], truth: NDArray[Any] | None) -> float | None:
    """The mean of `boundary_scores` over the views that have one."""
    return _mean(boundary_scores(depth, truth))


def strongest(weights: NDArray[Any]) -> NDArray[np.uint8]:
    """Which expert has the largest of weights (B, S, K, H, W): (B, S, H, W)."""
    return weights.argmax(axis=2).astype(np.uint8)


def _aligned(depths: NDArray[Any], references: NDArray[Any]) -> list[tuple[float, float]]:
    """AbsRel and scale of every scene; empty where a depth is not finite or not above 0."""
    try:
        found = []
        for depth, reference in zip(depths, references, strict=True):
            scale = align_median(depth, reference)
            found.append((depth_errors(depth.astype(np.float64) * scale, reference).abs_rel, scale))
    except InputError:
        return []
    return found


def _cameras(found: NDArray[Any], expected: NDArray[Any]) -> tuple[float | None, float | None, float | None]:
    """Rotation and direction of translation in degrees, and the relative distance of translations; the largest.

    Both models place their cameras in the same world, so a rotation is compared as it stands: as one of a pair with a
    camera at the origin. Translations are of scenes of several views: the first camera is the origin but for rounding,
    so that of a single one is rounding alone. None where there is no rotation, or no translation to compare.
    """
    rotations, directions, shares = [], [], []
    try:
        for ours, theirs in zip(found, expected, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                rotations += relative_pose_errors(_with_origin(a), _with_origin(b)).rotation_deg.tolist()
            directions += relative_pose_errors(ours, theirs).translation_deg.tolist()
            length = float(np.linalg.norm(theirs[:, :, 3].astype(np.float64), axis=1).max())
            distance = float(np.linalg.norm(ours[:, :, 3].astype(np.float64) - theirs[:, :, 3], axis=1).max())
            if len(theirs) > 1 and length > 0:
                shares.append(distance / length)
    except InputError:
        return None, None, None
    known = [value for value in directions if not math.isnan(value)]
    return max(rotations), max(known, default=None), max(shares, default=None)


def _with_origin(extrinsics: NDArray[Any]) -> NDArray[Any]:
    """(3, 4) -> (2, 3, 4), the first of them the world's own."""
    return np.stack([np.eye(3, 4, dtype=extrinsics.dtype), extrinsics])


def _boundary(depth: NDArray[Any], truth: NDArray[Any]) -> float | None:
    try:
        return _finite(boundary_f1(depth, truth).f1)
    except InputError:
        return None


def _views(maps: NDArray[Any]) -> NDArray[Any]:
    return maps.reshape(-1, *maps.shape[2:])


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None

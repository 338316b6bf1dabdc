"""Point clouds: similarity alignment (Umeyama, ICP), and accuracy, completeness and normal consistency."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from moe3d_deploy.errors import InputError
from moe3d_deploy.metrics.inputs import Array, cloud, floats
from moe3d_deploy.metrics.neighbours import NearestPoints
from moe3d_deploy.runtime.thinning import scattered

# Spread across a line over the spread along it, squared, below which points count as lying on the line.
_LINE = 1e-10
# ICP: a residual of this share of the target's size is rounding.
_EXACT = 1e-9


class Similarity(NamedTuple):
    """x -> scale * rotation x + translation."""

    scale: float
    rotation: Array  # (3, 3), det 1
    translation: Array  # (3,)

    def apply(self, points: Array) -> Array:
        """Points (..., 3) moved."""
        return self.scale * points @ self.rotation.T + self.translation

    def then(self, after: "Similarity") -> "Similarity":
        """This one first, `after` on its result."""
        return Similarity(
            after.scale * self.scale,
            after.rotation @ self.rotation,
            after.scale * after.rotation @ self.translation + after.translation,
        )


IDENTITY = Similarity(1.0, np.eye(3), np.zeros(3))


class IcpResult(NamedTuple):
    alignment: Similarity  # source to target
    error: float  # root mean square distance of the pairs kept, units of the target
    iterations: int
    converged: bool  # no further gain; False also where the pairs no longer determine a motion


class CloudErrors(NamedTuple):
    accuracy_mean: float  # distance prediction -> nearest true point
    accuracy_median: float
    completeness_mean: float  # distance true point -> nearest predicted point
    completeness_median: float
    normal_consistency_mean: float  # |cosine| between normals of nearest points, both ways; NaN without normals
    normal_consistency_median: float


def umeyama(source: ArrayLike, target: ArrayLike, *, with_scale: bool = True) -> Similarity:
    """The similarity of least sum |target_i - (s R source_i + t)|^2; a rigid motion where `with_scale` is False.

    source, target   (N, 3), point i belongs to point i

    R is a rotation even where a mirror image would fit better. Points in one plane do. Source: Umeyama 1991. Raises
    InputError for shapes that differ, and for points on one line or in one place, which leave a rotation open.
    """
    x, y = cloud(source, "source points"), cloud(target, "target points")
    if x.shape != y.shape:
        raise InputError(f"source points {x.shape} and target points {y.shape} differ; pass pairs, (N, 3) each")
    fitted = fit_similarity(x, y, with_scale)
    if fitted is None:
        raise InputError(
            f"{len(x)} pairs of points lie on a line or in one place, or do not vary together; pass points of a surface"
        )
    return fitted


def icp(
    source: ArrayLike,
    target: ArrayLike,
    *,
    initial: Similarity = IDENTITY,
    trim: float = 0.9,
    with_scale: bool = False,
    max_iterations: int = 30,
    tolerance: float = 1e-4,
    max_points: int = 5_000,
) -> IcpResult:
    """Refine `initial` by iterated closest points, point to point.

    source (N, 3), target (M, 3)   no pairs known; both in units of their own, `initial` takes source to target
    trim            share of the source points kept in each iteration, those nearest to the target: what the target
                    lacks does not pull
    with_scale      False: a rigid motion after `initial`; True: a similarity, which can shrink a source that fits badly
    tolerance       converged when an iteration gains less than this share of the error, or nothing
    max_points      at most this many source points are used, always the same, spread over it; the target is whole

    `converged` says that there was no further gain, also where the last iteration would have made the fit worse. It is
    False after `max_iterations`, and where the pairs no longer determine a rotation (all nearest to one point or line).
    The best alignment so far is returned in each case: a local optimum, never a worse fit than `initial`. Sources: Besl
    and McKay 1992; trimming: Chetverikov et al. 2002. Raises InputError for bad arrays or parameters out of range,
    MissingExtraError without SciPy.
    """
    x, y = cloud(source, "source points"), cloud(target, "target points")
    if not (0 < trim <= 1 and max_iterations >= 1 and tolerance >= 0 and max_points >= 3):
        raise InputError(
            f"ICP with trim {trim}, max_iterations {max_iterations}, tolerance {tolerance}, max_points {max_points}; "
            "pass a share in (0, 1], 1 or more, 0 or more, 3 or more"
        )
    start = initial.apply(x[scattered(np.arange(len(x)), max_points)])
    nearest = NearestPoints(y)
    exact = _EXACT * float(np.ptp(y, axis=0).max())
    count = max(int(np.ceil(trim * len(start))), 1)

    def pairs(step: Similarity) -> tuple[Array, Array, float]:
        """The pairs to fit next, from `start` to the target, and their error under `step`."""
        distance, index = nearest(step.apply(start))
        kept = np.argpartition(distance, count - 1)[:count]
        return start[kept], y[index[kept]], float(np.sqrt(np.mean(distance[kept] ** 2)))

    best = IDENTITY
    matched = pairs(best)
    error = matched[2]
    for iteration in range(1, max_iterations + 1):
        if error <= exact:
            return IcpResult(initial.then(best), error, iteration - 1, True)
        step = fit_similarity(matched[0], matched[1], with_scale)
        if step is None:
            return IcpResult(initial.then(best), error, iteration - 1, False)
        matched = pairs(step)
        gain = error - matched[2]
        if gain > 0:
            best, error = step, matched[2]
        if gain <= tolerance * (error + gain):
            return IcpResult(initial.then(best), error, iteration, True)
    return IcpResult(initial.then(best), error, max_iterations, False)


def cloud_errors(
    pred_points: ArrayLike,
    true_points: ArrayLike,
    pred_normals: ArrayLike | None = None,
    true_normals: ArrayLike | None = None,
) -> CloudErrors:
    """Accuracy, completeness and normal consistency of an aligned cloud, each mean and median.

    pred_points (N, 3), true_points (M, 3)     in the units of the result
    pred_normals (N, 3), true_normals (M, 3)   unit length; 0 where unknown (`normals.normals_from_points`)

    Normal consistency is the absolute cosine between a point's normal and that of its nearest point in the other cloud,
    taken from each point of either cloud: (a + b) / 2 of the two directions' means, and of their medians. A pair with
    an unknown normal is left out; both are NaN without normals or without any such pair. After the evaluations of
    Spann3R (Wang and Agapito 2024) and VGGT (Wang et al. 2025) on 7-Scenes and NRGBD; what differs is in
    docs/metrics.md. Raises InputError for arrays that do not fit, MissingExtraError without SciPy.
    """
    pred, true = cloud(pred_points, "predicted points"), cloud(true_points, "true points")
    if (pred_normals is None) != (true_normals is None):
        raise InputError("normals of one cloud only; pass those of the prediction and of the truth, or none")
    to_true, true_index = NearestPoints(true)(pred)
    to_pred, pred_index = NearestPoints(pred)(true)
    cosines: list[Array] = []
    if pred_normals is not None and true_normals is not None:
        ours, theirs = _normals(pred_normals, pred, "predicted"), _normals(true_normals, true, "true")
        cosines = [_cosines(ours, theirs[true_index]), _cosines(theirs, ours[pred_index])]
    known = bool(cosines) and all(len(values) for values in cosines)
    return CloudErrors(
        float(to_true.mean()),
        float(np.median(to_true)),
        float(to_pred.mean()),
        float(np.median(to_pred)),
        float(np.mean([np.mean(values) for values in cosines])) if known else np.nan,
        float(np.mean([np.median(values) for values in cosines])) if known else np.nan,
    )


def fit_similarity(x: Array, y: Array, with_scale: bool) -> Similarity | None:
    """`umeyama` of checked arrays; None where the pairs leave the rotation open."""
    x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
    x_spread, y_spread = x - x_mean, y - y_mean
    u, d, vt = np.linalg.svd(y_spread.T @ x_spread / len(x))
    if not d[1] > _LINE * d[0]:
        return None
    signs = np.array([1.0, 1.0, -1.0 if np.linalg.det(u) * np.linalg.det(vt) < 0 else 1.0])
    rotation = (u * signs) @ vt
    scale = float(d @ signs / np.mean(np.sum(x_spread * x_spread, axis=1))) if with_scale else 1.0
    return Similarity(scale, rotation, y_mean - scale * rotation @ x_mean)


def _normals(normals: ArrayLike, points: Array, name: str) -> Array:
    checked = floats(normals, f"{name} normals")
    length = np.linalg.norm(checked, axis=-1)
    if checked.shape != points.shape or not ((np.abs(length - 1) < 1e-3) | (length == 0)).all():
        raise InputError(
            f"{name} normals have shape {checked.shape} or lengths other than 1 and 0; pass {points.shape} unit normals"
        )
    return checked


def _cosines(normals: Array, others: Array) -> Array:
    """Absolute cosines (P,) of the pairs in which both normals are known; 1 at most."""
    known = normals.any(axis=1) & others.any(axis=1)
    return np.minimum(np.abs(np.sum(normals[known] * others[known], axis=1)), 1.0)

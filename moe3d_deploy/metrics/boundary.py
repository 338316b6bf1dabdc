"""How well depth maps agree on where one thing hides another: scale-invariant boundary F1, and mIoU of edge maps.

Both look at ratios of neighbouring depths, so the scale of a map is of no matter: aligned or not, the result is the
same. A pair of neighbours with an invalid end is left out of the prediction and of the truth. What is judged at all is
for the truth alone to say, so that no score jumps because a single wrong pixel adds something to judge.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe3d_deploy.errors import InputError
from moe3d_deploy.metrics.inputs import Array, Mask, depth_pair

THRESHOLDS = np.linspace(1.05, 1.25, 10)  # of the farther depth over the nearer one


class BoundaryScore(NamedTuple):
    """Each a mean over the thresholds, weighted by them; f1 is that of the F1s, not the F1 of the other two."""

    f1: float
    precision: float
    recall: float


def boundary_f1(pred: ArrayLike, true: ArrayLike, valid: ArrayLike | None = None) -> BoundaryScore:
    """Scale-invariant boundary F1 of one depth map.

    pred    (H, W)        depth, above 0 at valid pixels, any scale
    true    (H, W)        depth; 0 marks a pixel without truth where `valid` is None
    valid   (H, W) bool

    A pair of neighbours is an occlusion edge at threshold t when the farther depth is more than t times the nearer one;
    right, left, below and above are four kinds of edge by the side on which the nearer one lies. Precision (true edges
    among the predicted ones, 0 without any) and recall are means over the kinds; F1 is their harmonic mean, 0 where
    both are 0; the result is the mean over ten t in [1.05, 1.25] with t as weight. Source: Bochkovskii et al. 2024
    (Depth Pro) and its public evaluation: strict comparison, the same pixel pair in both maps (no tolerance in
    position), no thinning of the predicted edges.
    One difference: the means are over the t and kinds at which the truth has edges (over all in the public code, where
    one without counts as 0), so a perfect map scores 1. Predicted edges of the other kinds are all false; they are
    dealt out evenly to those that count. Where the truth has all four kinds at every t the two agree.

    All three are NaN where the truth has no edge at any t: nothing can be judged. Raises InputError for shapes that
    differ, no valid pixel, and depths at valid pixels that are not finite and above 0.
    """
    depth, truth, mask = depth_pair(pred, true, valid, positive=True, axes=2)
    counts = np.stack(
        [_edge_counts(*ratios) for ratios in zip(_ratios(depth, mask), _ratios(truth, mask), strict=True)]
    )
    found, predicted, existing = np.moveaxis(counts, 1, 0)  # (4, T) each
    judged = existing > 0
    used = judged.any(axis=0)
    if not used.any():
        return BoundaryScore(np.nan, np.nan, np.nan)
    kinds = np.maximum(judged.sum(axis=0), 1)
    stray = np.where(judged, 0, predicted).sum(axis=0)
    # A kind that is not judged has no edge in the truth, hence none found: its terms are 0.
    precision = ((found / np.maximum(predicted + stray / kinds, 1)).sum(axis=0) / kinds)[used]
    recall = ((found / np.maximum(existing, 1)).sum(axis=0) / kinds)[used]
    total = precision + recall
    f1 = 2 * precision * recall / np.where(total > 0, total, 1)
    weights = THRESHOLDS[used] / THRESHOLDS[used].sum()
    return BoundaryScore(float(f1 @ weights), float(precision @ weights), float(recall @ weights))


def edge_miou(pred: ArrayLike, true: ArrayLike, threshold: float = 1.1, valid: ArrayLike | None = None) -> float:
    """Mean of the intersection over union of edge pixels and of that of all other pixels, over the valid ones.

    A pixel is an edge when one of its four neighbours is more than `threshold` times as deep: the rim of what is in
    front. Shapes and errors as in `boundary_f1`. Where the truth has no edge (or each pixel is one) only the other
    class exists and its IoU is the result. The definition is this project's; the MoE3D paper gives none.
    """
    if not 1 <= threshold < np.inf:
        raise InputError(f"the threshold of edges is {threshold}; pass a ratio of 1 or more, such as 1.1")
    depth, truth, mask = depth_pair(pred, true, valid, positive=True, axes=2)
    ours, theirs = (edge_map(array, mask, threshold)[mask] for array in (depth, truth))
    scores = []
    for a, b in ((ours, theirs), (~ours, ~theirs)):
        if b.any():
            scores.append(np.count_nonzero(a & b) / np.count_nonzero(a | b))
    return float(np.mean(scores))


def edge_map(depth: Array, valid: Mask, threshold: float) -> Mask:
    """Valid pixels (..., H, W) with a valid neighbour, of four, more than `threshold` times as deep."""
    right, left, below, above = (ratio > threshold for ratio in _ratios(depth, valid))
    edges = np.zeros(depth.shape, bool)
    edges[..., :, 1:] |= right
    edges[..., :, :-1] |= left
    edges[..., 1:, :] |= below
    edges[..., :-1, :] |= above
    return edges


def _ratios(depth: Array, valid: Mask) -> tuple[Array, Array, Array, Array]:
    """Depth ratios of neighbours, above 1 where the right, left, lower, upper one is nearer; NaN at invalid ends."""
    d = np.where(valid, depth, np.nan)
    with np.errstate(over="ignore"):
        return (
            d[..., :, :-1] / d[..., :, 1:],
            d[..., :, 1:] / d[..., :, :-1],
            d[..., :-1, :] / d[..., 1:, :],
            d[..., 1:, :] / d[..., :-1, :],
        )


def _edge_counts(pred: Array, true: Array) -> NDArray[np.intp]:
    """Edges found by both, predicted, and existing (3, T) among the pairs of one kind, by their ratios."""
    near = (pred > THRESHOLDS[0]) | (true > THRESHOLDS[0])
    ours, theirs = (ratio[near] > THRESHOLDS[:, None] for ratio in (pred, true))
    return np.stack([np.count_nonzero(edges, axis=1) for edges in (ours & theirs, ours, theirs)])

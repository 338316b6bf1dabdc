"""Errors of depth maps: AbsRel, RMSE and delta, and the alignment that comes before them.

All take maps of any leading axes (..., H, W) and treat them as one set of pixels: pass one view to align and judge that
view, a scene (S, H, W) to use one scale for all its views. `valid` is bool of the same shape; None means where the true
depth is not 0. At a valid pixel the truth has to be finite and above 0 and the prediction finite, or InputError says
how many are not: no pixel is dropped silently.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from moe3d_deploy.errors import InputError
from moe3d_deploy.metrics.inputs import depth_pair

DELTA = 1.25


class DepthErrors(NamedTuple):
    abs_rel: float  # mean of |pred - true| / true
    rmse: float  # in the units of the true depth
    delta1: float  # share of pixels with max(pred / true, true / pred) < DELTA


def align_median(pred: ArrayLike, true: ArrayLike, valid: ArrayLike | None = None) -> float:
    """The scale s = median(true) / median(pred) that brings `pred` to the scale of `true`.

    The ratio of the medians, not the median of the ratios. Up to half of the pixels may be wrong in either map without
    moving it arbitrarily far. Source: the median scaling of Zhou et al. 2017 (SfM-Learner), kept by Monodepth2
    (Godard et al. 2019). Raises InputError where the median of `pred` is not above 0.
    """
    depth, truth, mask = depth_pair(pred, true, valid)
    middle = float(np.median(depth[mask]))
    if middle <= 0:
        raise InputError(f"the median of the predicted depth is {middle:g}; a scale needs one above 0")
    return float(np.median(truth[mask])) / middle


def depth_errors(pred: ArrayLike, true: ArrayLike, valid: ArrayLike | None = None) -> DepthErrors:
    """AbsRel, RMSE and delta over the valid pixels of depth maps that are already aligned.

    A prediction of 0 or less is a miss for delta and counts in AbsRel and RMSE by its distance, as any other.
    Source: Eigen et al. 2014. Raises InputError as told at the top of this module.
    """
    depth, truth, mask = depth_pair(pred, true, valid)
    x, y = depth[mask], truth[mask]
    error = x - y
    with np.errstate(divide="ignore", over="ignore"):
        ratio = np.where(x > 0, np.maximum(x / y, y / x), np.inf)
    return DepthErrors(
        float(np.mean(np.abs(error) / y)), float(np.sqrt(np.mean(error * error))), float(np.mean(ratio < DELTA))
    )

"""How a gate spreads its pixels over the experts."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from moe3d_deploy.errors import InputError
from moe3d_deploy.metrics.inputs import floats

# Softmax in float32 sums to one within 1e-6; weights that went through a 16-bit file are up to 4e-3 off for bfloat16.
_SUM_TOLERANCE = 1e-2


class GateStatistics(NamedTuple):
    entropy: float  # mean over pixels of -sum_k w_k log w_k, nats
    argmax_share: tuple[float, ...]  # per expert, share of pixels in which it has the largest weight
    effective_experts: float  # exp of the entropy of the experts' mean weights, in [1, K]


def gate_statistics(weights: ArrayLike) -> GateStatistics:
    """Statistics over all pixels of gate weights (..., K, H, W), softmaxed: not negative, of sum 1 over K.

    Experts that are equally large in a pixel share it, so a uniform gate gives each 1 / K. `effective_experts` tells a
    collapse (near 1) from use of all of them (near K), whether or not single pixels are decided. Sources: the entropy
    is the regulariser of MoE3D (Wang et al. 2026); exp of an entropy as an effective number is Hill's (1973) of
    order 1. Raises InputError for another shape and for what is no set of weights.
    """
    w = floats(weights, "expert weights")
    if w.ndim < 3 or w.size == 0:
        raise InputError(f"expert weights have shape {w.shape}; pass (..., K, H, W) with one pixel or more")
    w = np.moveaxis(w, -3, 0).reshape(w.shape[-3], -1)  # (K, pixels)
    off = ~((w >= 0).all(axis=0) & (np.abs(w.sum(axis=0) - 1) <= _SUM_TOLERANCE))
    if off.any():
        raise InputError(
            f"expert weights are negative, NaN or not of sum 1 at {np.count_nonzero(off)} of {off.size} pixels; "
            "pass the gate's softmax, K on the third axis from the end"
        )
    largest = w == w.max(axis=0)
    share = (largest / largest.sum(axis=0)).mean(axis=1)
    mean = w.mean(axis=1)
    return GateStatistics(
        float(entropy(w).mean()),
        tuple(share.tolist()),
        float(np.exp(entropy(mean / mean.sum()))),
    )


def entropy(weights: np.ndarray) -> np.ndarray:
    """-sum w log w over the first axis, with 0 log 0 = 0; never below 0, which rounding of a sum above 1 would give."""
    logs = np.log(np.where(weights > 0, weights, 1.0))
    return np.maximum(-(weights * logs).sum(axis=0), 0.0)

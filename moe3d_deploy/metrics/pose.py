"""Errors of cameras: angles between the relative poses of all pairs of views, and the area under their curve."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from moe3d_deploy.errors import InputError
from moe3d_deploy.metrics.inputs import Array, extrinsics_of, floats


class PoseErrors(NamedTuple):
    """Of the S (S - 1) / 2 pairs (i, j), i < j, in the order (0, 1), (0, 2), ..., (1, 2), ...; degrees."""

    rotation_deg: Array
    translation_deg: Array  # NaN for a pair whose true cameras stand in one place

    @property
    def worst_deg(self) -> Array:
        """The larger of the two per pair, what `auc` takes; the rotation alone where there is no true direction."""
        return np.fmax(self.rotation_deg, self.translation_deg)


def relative_pose_errors(pred_extrinsics: ArrayLike, true_extrinsics: ArrayLike) -> PoseErrors:
    """Rotation and translation-direction errors of the relative poses T_i T_j^-1 of all pairs of views.

    pred_extrinsics, true_extrinsics   (S, 3, 4), camera from world, each in a world frame and a scale of its own

    Rotation: the angle of R_true^T R_pred. Translation: the angle between the two relative translations, where a
    direction and its opposite are the same, as in the field's evaluations: at most 90 degrees. Two cameras in one place
    have no direction: where they are so in the truth the translation error is NaN, where only the prediction says so
    it is 90 degrees. "In one place" is within 8 units of rounding of the array's own type, relative to the largest
    translation in it. Source: PoseDiffusion (Wang et al. 2023) and VGGT (Wang et al. 2025), evaluation on CO3D. One
    view has no pair and gives empty arrays. Raises InputError for other shapes or what holds no rotation.
    """
    pred, true = (
        extrinsics_of(pred_extrinsics, "predicted extrinsics"),
        extrinsics_of(true_extrinsics, "true extrinsics"),
    )
    if pred.shape != true.shape:
        raise InputError(
            f"predicted extrinsics {pred.shape} and true extrinsics {true.shape} differ; pass the same views"
        )
    first, second = np.triu_indices(len(true), k=1)
    pred_rotation, pred_translation = _relative(pred, first, second)
    true_rotation, true_translation = _relative(true, first, second)
    rotation = _rotation_angle(np.swapaxes(true_rotation, 1, 2) @ pred_rotation)
    across = np.linalg.norm(np.cross(pred_translation, true_translation), axis=1)
    along = np.abs(np.sum(pred_translation * true_translation, axis=1))
    translation = np.degrees(np.arctan2(across, along))
    translation[_in_one_place(pred_translation, pred, pred_extrinsics)] = 90
    translation[_in_one_place(true_translation, true, true_extrinsics)] = np.nan
    return PoseErrors(rotation, translation)


def auc(errors: ArrayLike, threshold: int = 30) -> float:
    """Area under the curve "share of pairs with an error below x degrees", x up to `threshold`; 1 is perfect.

    errors   (N,) degrees, `PoseErrors.worst_deg` for AUC@30

    As the field computes it: a histogram of one-degree bins, cumulated, and the mean of the `threshold` values; so an
    error of 0.9 degrees counts as one of 0, and the last bin holds its upper end. Source: PoseDiffusion
    (Wang et al. 2023), VGGT (Wang et al. 2025). Raises InputError for no error at all, for NaN and negative ones.
    """
    degrees = floats(errors, "errors")
    if degrees.ndim != 1 or degrees.size == 0 or not (degrees >= 0).all():
        raise InputError(
            f"pose errors of shape {degrees.shape} cannot be averaged; pass (N,) degrees of one pair of views or more, "
            "none negative or NaN"
        )
    if not isinstance(threshold, int | np.integer) or threshold < 1:
        raise InputError(f"the threshold of the AUC is {threshold}; pass whole degrees, 1 or more")
    histogram, _ = np.histogram(degrees, bins=np.arange(threshold + 1))
    return float(np.mean(np.cumsum(histogram)) / degrees.size)


def _relative(extrinsics: Array, first: np.ndarray, second: np.ndarray) -> tuple[Array, Array]:
    """Rotation (P, 3, 3) and translation (P, 3) of T_first T_second^-1."""
    rotation = extrinsics[first, :, :3] @ np.swapaxes(extrinsics[second, :, :3], 1, 2)
    moved = rotation @ extrinsics[second, :, 3:]
    return rotation, extrinsics[first, :, 3] - moved[..., 0]


def _rotation_angle(rotation: Array) -> Array:
    """Angle of rotations (P, 3, 3) in degrees; by sine and cosine, as the arc cosine loses half of the digits at 0."""
    skew = rotation - np.swapaxes(rotation, 1, 2)
    sine = np.sqrt(skew[:, 2, 1] ** 2 + skew[:, 0, 2] ** 2 + skew[:, 1, 0] ** 2) / 2
    cosine = (np.trace(rotation, axis1=1, axis2=2) - 1) / 2
    return np.degrees(np.arctan2(sine, cosine))


def _in_one_place(translation: Array, extrinsics: Array, given: ArrayLike) -> np.ndarray:
    dtype = np.asarray(given).dtype
    eps = np.finfo(dtype if dtype.kind == "f" else np.float64).eps
    return np.linalg.norm(translation, axis=1) <= 8 * eps * np.abs(extrinsics[:, :, 3]).max()

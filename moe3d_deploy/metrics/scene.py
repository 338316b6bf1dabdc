"""All figures of one scene: what a model predicts for S views against the truth, as a flat dictionary."""

from collections.abc import Mapping

import numpy as np

from moe3d_deploy.errors import InputError
from moe3d_deploy.geometry import unproject
from moe3d_deploy.metrics.boundary import boundary_f1, edge_miou
from moe3d_deploy.metrics.depth import align_median, depth_errors
from moe3d_deploy.metrics.flying import flying_point_ratio
from moe3d_deploy.metrics.gate import gate_statistics
from moe3d_deploy.metrics.inputs import (
    Array,
    Mask,
    depth_pair,
    extrinsics_of,
    from_first_camera,
    intrinsics_of,
)
from moe3d_deploy.metrics.normals import normals_from_points
from moe3d_deploy.metrics.points import cloud_errors, fit_similarity, icp
from moe3d_deploy.metrics.pose import auc, relative_pose_errors

EXPERT_SHARE = "expert_share_"  # and the number of the expert: a key of `scene_quality`


def scene_quality(
    prediction: Mapping[str, np.ndarray], truth: Mapping[str, np.ndarray], *, points: bool = True
) -> dict[str, float]:
    """Every metric of one scene of S views.

    prediction   depth (S, H, W) above 0, extrinsics (S, 3, 4), intrinsics (S, 3, 3), in any scale and world frame;
                 expert_weights (S, K, H, W) if there are any; other entries are ignored
    truth        depth (S, H, W) with 0 where there is none, extrinsics, intrinsics
    points       False: without the point clouds (accuracy, completeness, normal consistency)

    returns, lengths relative to the mean distance of the valid true points from the first true camera:
    abs_rel, rmse, delta1     the depth, aligned by one median scale for the whole scene
    boundary_f1, boundary_precision, boundary_recall, edge_miou    means over the views
    flying                    of all valid pixels, with the aligned depth and the true cameras
    accuracy_mean, accuracy_median, completeness_mean, completeness_median, normal_consistency_mean,
    normal_consistency_median the cloud of the predicted depth and cameras, aligned by Umeyama over equal pixels and
                              then ICP (rigid); normals from the depth maps
    rotation_deg, translation_deg    means over all pairs of views; auc30 of the larger of the two
    gate_entropy (nats), expert_share_0 ... expert_share_<K-1> (share of pixels with this expert's weight the largest)

    A key is missing where there is nothing to judge: the cameras of a single view, translation_deg where no two true
    cameras stand apart, boundary_* where no view has a true edge, normal_consistency_* where no normal is
    known, all of the cloud where its points lie on a line or in one place (a field of view of 0: no similarity can be
    told), the gate's without expert_weights. Views without a valid pixel do not enter the means over views.
    Raises InputError for an entry that is missing or unusable, MissingExtraError without SciPy.
    """
    depth, true, valid = depth_pair(
        _entry(prediction, "depth", "prediction"), _entry(truth, "depth", "truth"), None, axes=3
    )
    cameras = _cameras(prediction, "prediction", "predicted", len(depth))
    true_cameras = _cameras(truth, "truth", "true", len(depth))
    true_points = unproject(np.where(valid, true, 0), *true_cameras).astype(np.float64)
    unit = float(np.linalg.norm(true_points[valid], axis=1).mean())

    aligned = depth * align_median(depth, true, valid)
    errors = depth_errors(aligned, true, valid)
    result = {"abs_rel": errors.abs_rel, "rmse": errors.rmse / unit, "delta1": errors.delta1}
    result |= _boundaries(aligned, true, valid)
    result["flying"] = flying_point_ratio(aligned, true, true_cameras[1], true_cameras[0], valid)
    if points:
        result |= _points(unproject(np.where(valid, depth, 0), *cameras).astype(np.float64), true_points, valid, unit)
    if len(depth) > 1:
        pose = relative_pose_errors(prediction["extrinsics"], truth["extrinsics"])
        apart = ~np.isnan(pose.translation_deg)
        result["rotation_deg"] = float(pose.rotation_deg.mean())
        result["translation_deg"] = float(pose.translation_deg[apart].mean()) if apart.any() else np.nan
        result["auc30"] = auc(pose.worst_deg)
    if "expert_weights" in prediction:
        gate = gate_statistics(prediction["expert_weights"])
        result["gate_entropy"] = gate.entropy
        result |= {f"{EXPERT_SHARE}{k}": share for k, share in enumerate(gate.argmax_share)}
    return {name: value for name, value in result.items() if not np.isnan(value)}


def _boundaries(depth: Array, true: Array, valid: Mask) -> dict[str, float]:
    views = [view for view in zip(depth, true, valid, strict=True) if view[2].any()]
    scores = np.array([boundary_f1(*view) for view in views])
    judged = scores[~np.isnan(scores[:, 0])]
    f1, precision, recall = judged.mean(axis=0).tolist() if len(judged) else (np.nan, np.nan, np.nan)
    miou = float(np.mean([edge_miou(pred, view, valid=mask) for pred, view, mask in views]))
    return {"boundary_f1": f1, "boundary_precision": precision, "boundary_recall": recall, "edge_miou": miou}


def _points(pred: Array, true: Array, valid: Mask, unit: float) -> dict[str, float]:
    ours, theirs = pred[valid], true[valid]
    initial = fit_similarity(ours, theirs, with_scale=True)
    if initial is None:
        return {}
    alignment = icp(ours, theirs, initial=initial).alignment
    errors = cloud_errors(
        alignment.apply(ours),
        theirs,
        normals_from_points(pred, valid)[valid] @ alignment.rotation.T,
        normals_from_points(true, valid)[valid],
    )
    lengths = {name: getattr(errors, name) / unit for name in errors._fields[:4]}
    return lengths | {name: getattr(errors, name) for name in errors._fields[4:]}


def _entry(mapping: Mapping[str, np.ndarray], name: str, where: str) -> np.ndarray:
    if name not in mapping:
        raise InputError(f"the {where} has no {name}; it holds {', '.join(sorted(mapping)) or 'nothing'}")
    return mapping[name]


def _cameras(mapping: Mapping[str, np.ndarray], where: str, name: str, views: int) -> tuple[Array, Array]:
    """Extrinsics (S, 3, 4) with the first camera's frame as the world, and intrinsics (S, 3, 3)."""
    extrinsics = extrinsics_of(_entry(mapping, "extrinsics", where), f"{name} extrinsics")
    if len(extrinsics) != views:
        raise InputError(f"the {where} has {views} views of depth and {len(extrinsics)} of extrinsics; pass as many")
    return from_first_camera(extrinsics), intrinsics_of(
        _entry(mapping, "intrinsics", where), f"{name} intrinsics", views
    )

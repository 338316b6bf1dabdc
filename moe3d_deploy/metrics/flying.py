"""Flying points: pixels whose point hangs in the air between a foreground and its background."""

import numpy as np
from numpy.typing import ArrayLike

from moe3d_deploy.errors import InputError
from moe3d_deploy.geometry import unproject
from moe3d_deploy.metrics.boundary import edge_map
from moe3d_deploy.metrics.inputs import Array, Mask, depth_pair, extrinsics_of, from_first_camera, intrinsics_of
from moe3d_deploy.metrics.neighbours import NearestPoints, depth_range, grown

# Of the point's own depth. Above the error that a whole surface may have (an AbsRel of 0.08 is good for a small model),
# or a sharp map that is off everywhere would count as flying along its edges.
TOLERANCE = 0.1
RADIUS = 3  # pixels
EDGE_RATIO = 1.1  # farther over nearer depth of a pair of neighbours


def flying_point_ratio(
    pred_depth: ArrayLike,
    true_depth: ArrayLike,
    intrinsics: ArrayLike,
    extrinsics: ArrayLike | None = None,
    valid: ArrayLike | None = None,
    *,
    tolerance: float = TOLERANCE,
    radius: int = RADIUS,
    edge_ratio: float = EDGE_RATIO,
) -> float:
    """Share of the valid pixels that are flying points.

    pred_depth   (S, H, W) or (H, W)   above 0 at valid pixels, already aligned to the scale of the truth
    true_depth   the same shape        0 marks a pixel without truth where `valid` is None
    intrinsics   (S, 3, 3) or (3, 3)   the true ones, pixels
    extrinsics   (S, 3, 4) or (3, 4)   the true ones, camera from world; may be left out for one view
    valid        the same shape, bool

    A pixel's point is its predicted depth lifted by the true camera, so errors of predicted cameras do not count. It
    flies where all three hold:
    1. a true occlusion edge (a pixel with a neighbour more than `edge_ratio` times as deep) lies in the square window
       of `radius` pixels around it;
    2. its depth lies strictly between the least and the greatest true depth of that window;
    3. it is farther than `tolerance` times its own depth from every true surface point of all views.
    The tolerance is relative to the point's own depth, since the spacing of the surface points and the errors of depth
    both grow with it. The definition is this project's (docs/metrics.md gives its limits). Raises InputError for arrays
    that do not fit, depths as in `boundary_f1`, or parameters out of range; MissingExtraError without SciPy.
    """
    if not (0 < tolerance < np.inf and radius >= 1 and 1 <= edge_ratio < np.inf):
        raise InputError(
            f"tolerance {tolerance}, radius {radius} and edge ratio {edge_ratio} define no flying point; "
            "pass a tolerance above 0, a radius of 1 pixel or more and a ratio of 1 or more"
        )
    depth, truth, mask = depth_pair(pred_depth, true_depth, valid, positive=True)
    single = depth.ndim == 2
    if single:
        depth, truth, mask, intrinsics = depth[None], truth[None], mask[None], np.asarray(intrinsics)[None]
    if depth.ndim != 3:
        raise InputError(f"depth has shape {depth.shape}; pass the views of one scene, (S, H, W)")
    if extrinsics is None and len(depth) > 1:
        raise InputError(f"{len(depth)} views need extrinsics ({len(depth)}, 3, 4); only one view can do without")
    if extrinsics is None:
        cameras = np.eye(3, 4)[None]
    else:
        cameras = extrinsics_of(np.asarray(extrinsics)[None] if single else extrinsics, "true extrinsics")
    if len(cameras) != len(depth):
        raise InputError(f"there are {len(depth)} views and extrinsics of {len(cameras)}; pass one for each view")
    cameras = from_first_camera(cameras)
    k = intrinsics_of(intrinsics, "true intrinsics", len(depth))
    candidates = _between(depth, truth, mask, int(radius), edge_ratio)
    if not candidates.any():
        return 0.0
    surface = unproject(np.where(mask, truth, 0), cameras, k)[mask]
    points = unproject(np.where(candidates, depth, 0), cameras, k)[candidates]
    reach = tolerance * depth[candidates]
    distance, _ = NearestPoints(surface.astype(np.float64))(points.astype(np.float64), within=1.01 * reach.max())
    return float(np.count_nonzero(distance > reach) / np.count_nonzero(mask))


def _between(depth: Array, truth: Array, valid: Mask, radius: int, edge_ratio: float) -> Mask:
    """Conditions 1 and 2, which leave few points to search the neighbours of."""
    edges = edge_map(truth, valid, edge_ratio)
    if not edges.any():
        return edges
    least, greatest = depth_range(truth, valid, radius)
    return valid & grown(edges, radius) & (least < depth) & (depth < greatest)

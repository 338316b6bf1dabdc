"""Coloured point clouds from depth and cameras. `point_files` writes them.

Points are in the world frame of the extrinsics, OpenCV axes (x right, y down, z forward), up to the scene's scale.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from moe3d_deploy.errors import InputError
from moe3d_deploy.geometry import unproject
from moe3d_deploy.runtime.thinning import VoxelSize, one_per_voxel, scattered, scene_extent

_EXTENT_SAMPLE = 1 << 20  # points that a scene's extent is taken from, about


@dataclass(frozen=True)
class PointCloud:
    """N points of one scene.

    points       (N, 3)  float32, world frame, OpenCV axes
    colors       (N, 3)  uint8 RGB (sRGB, as in the images)
    confidence   (N,)    float32, >= 1
    pixels       (N,)    int64, where each point comes from: (view * H + row) * W + column
    """

    points: np.ndarray
    colors: np.ndarray
    confidence: np.ndarray
    pixels: np.ndarray

    def __post_init__(self) -> None:
        count = len(self.confidence)
        shapes = {"points": (count, 3), "colors": (count, 3), "confidence": (count,), "pixels": (count,)}
        for name, shape in shapes.items():
            if getattr(self, name).shape != shape:
                raise InputError(f"point cloud: {name} has shape {getattr(self, name).shape}, expected {shape}")
        if not (np.isfinite(self.points).all() and np.isfinite(self.confidence).all()):
            raise InputError("point cloud: points or confidence are not finite; leave such points out")

    def __len__(self) -> int:
        return len(self.confidence)

    def limited(self, count: int) -> "PointCloud":
        """At most `count` of the points, spread over all of them (`thinning.scattered`)."""
        if len(self) <= count:
            return self
        kept = scattered(self.pixels, count)
        return PointCloud(self.points[kept], self.colors[kept], self.confidence[kept], self.pixels[kept])


def point_cloud(
    result: Mapping[str, np.ndarray],
    images: np.ndarray,
    masks: Sequence[np.ndarray] | np.ndarray,
    *,
    drop_lowest: float = 0.25,
    voxel: VoxelSize | None = None,
    max_points: int | None = None,
) -> PointCloud:
    """Lift one scene's depth to coloured points, in view, row, column order.

    result        depth, depth_conf (S, H, W), extrinsics (S, 3, 4), intrinsics (S, 3, 3)
    images        (S, 3, H, W) float RGB in [0, 1]
    masks         S times (H, W) bool, False on padding
    drop_lowest   fraction in [0, 1) of the scene's valid pixels to leave out, those of lowest confidence
    voxel         then the most confident point of each voxel stays (`thinning.one_per_voxel`)
    max_points    then so many stay, spread over the scene (`thinning.scattered`)

    Valid are pixels that are no padding and have a finite, positive depth, a finite confidence and a finite point. The
    threshold is the confidence of rank floor(drop_lowest * valid pixels); what is below it goes, and pixels that equal
    it all stay. So never more than the fraction goes, and nothing does where the confidence is constant.

    It works view by view: beside the result and the cloud it holds one mask, and one view's points.
    Raises InputError for a missing array, a wrong shape, a fraction or limit out of range, or a voxel that is too small
    for the scene.
    """
    check_thinning(drop_lowest, max_points)
    views, height, width = images.shape[0], images.shape[2], images.shape[3]
    check_scene(result, views, height, width)
    kept = valid_pixels(result["depth"], masks) & np.isfinite(result["depth_conf"])
    for view in range(views):
        kept[view] &= np.isfinite(_lifted(result, view, kept[view])).all(axis=-1)

    confidence = result["depth_conf"][kept]
    if dropped := math.floor(drop_lowest * confidence.size):
        kept &= result["depth_conf"] >= np.partition(confidence, dropped)[dropped]
    if voxel is not None:
        extent = _extent(result, kept) if voxel.relative else None
        size = voxel.value * (1 if extent is None else extent)
        if size > 0:  # of no extent are a scene without points and one that is a single point
            ids = one_per_voxel(_parts(result, kept), size, extent)
            kept = np.zeros_like(kept)
            kept.flat[ids] = True
    pixels = np.flatnonzero(kept)
    if max_points is not None and len(pixels) > max_points:
        pixels = pixels[scattered(pixels, max_points)]
        kept = np.zeros_like(kept)
        kept.flat[pixels] = True

    points = np.empty((len(pixels), 3), np.float32)
    colors = np.empty((len(pixels), 3), np.uint8)
    start = 0
    for view in range(views):
        end = start + np.count_nonzero(kept[view])
        points[start:end] = _lifted(result, view, kept[view])[kept[view]]
        pixel_colors = np.moveaxis(images[view], 0, -1)[kept[view]]
        colors[start:end] = np.rint(np.clip(pixel_colors, 0, 1) * 255).astype(np.uint8)
        start = end
    return PointCloud(points, colors, result["depth_conf"][kept].astype(np.float32), pixels)


def check_thinning(drop_lowest: float, max_points: int | None) -> None:
    """Raise InputError for a fraction or a limit that `point_cloud` does not take."""
    if not 0 <= drop_lowest < 1:
        raise InputError(f"the fraction of points to drop is {drop_lowest:g}; give a number from 0 to below 1")
    if max_points is not None and max_points < 1:
        raise InputError(f"the largest number of points is {max_points}; give 1 or more")


def valid_pixels(depth: np.ndarray, masks: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """(S, H, W) bool: depth is finite and positive, and the pixel is no padding (`masks`, S times (H, W) bool)."""
    mask = np.asarray(masks)
    if mask.shape != depth.shape or mask.dtype != bool:
        raise InputError(f"padding masks are {mask.dtype} {mask.shape}, expected bool {depth.shape} as the depth")
    return mask & np.isfinite(depth) & (depth > 0)


def check_scene(result: Mapping[str, np.ndarray], views: int, height: int, width: int) -> None:
    """Raise InputError unless depth, confidence and cameras of one scene are there with the shapes they must have."""
    maps = (views, height, width)
    for name, shape in (
        ("depth", maps),
        ("depth_conf", maps),
        ("extrinsics", (views, 3, 4)),
        ("intrinsics", (views, 3, 3)),
    ):
        if name not in result:
            raise InputError(f"the result has no {name!r}; it holds {', '.join(sorted(result)) or 'nothing'}")
        if result[name].shape != shape:
            raise InputError(f"{name} has shape {result[name].shape}, expected {shape}: one scene, no batch axis")


def _lifted(result: Mapping[str, np.ndarray], view: int, mask: np.ndarray) -> np.ndarray:
    """(H, W, 3) float32 world points of one view; without meaning where `mask` (H, W) is false."""
    depth = np.where(mask, result["depth"][view], 1)
    with np.errstate(over="ignore", invalid="ignore"):  # a broken camera gives non-finite points, which are left out
        return unproject(depth, result["extrinsics"][view], result["intrinsics"][view])


def _parts(result: Mapping[str, np.ndarray], kept: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per view points (n, 3), confidence (n,) and pixels (n,) where `kept` holds."""
    for view, mask in enumerate(kept):
        pixels = np.flatnonzero(mask) + view * mask.size
        yield _lifted(result, view, mask)[mask], result["depth_conf"][view][mask], pixels


def _extent(result: Mapping[str, np.ndarray], kept: np.ndarray) -> float:
    """`scene_extent` of every n-th point, n such that about _EXTENT_SAMPLE are taken."""
    step = max(1, np.count_nonzero(kept) // _EXTENT_SAMPLE)
    return scene_extent(np.concatenate([points[::step] for points, _, _ in _parts(result, kept)]))

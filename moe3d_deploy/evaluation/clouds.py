"""A scene's points drawn from above and from the side, truth beside prediction. It writes no files."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe3d_deploy.evaluation.scenes import EvaluationScene
from moe3d_deploy.geometry import invert_extrinsics, unproject
from moe3d_deploy.metrics import align_median
from moe3d_deploy.runtime.scene_maps import photograph

SIDE = 480  # pixels of a drawing
_BACKGROUND, _CAMERA = (18, 18, 22), (255, 60, 60)
_MARGIN = 0.06  # of the drawing, around the true points
_OUTLIERS = (1, 99)  # percentiles of the true points that are drawn; what lies farther out is cut off
_HEADROOM = 0.15  # above the highest camera, in heights of the scene: a ceiling would hide what is below

Array = NDArray[Any]


class Cloud(NamedTuple):
    """Points (N, 3) in the truth's world, their colours (N, 3) uint8, and where the cameras stand (S, 3)."""

    points: Array
    colors: Array
    cameras: Array


class _Frame(NamedTuple):
    """Axes (3, 3) whose rows are right, forward and up, and the box (2, 3) of what is drawn in them."""

    axes: Array
    box: Array


def cloud_pictures(scene: EvaluationScene, prediction: Mapping[str, Array], side: int = SIDE) -> dict[str, Array]:
    """Orthographic drawings (side, side, 3) uint8 RGB by their title, truth and prediction at the same scale and place.

    From above, the first view looks up the drawing, and what is above the cameras is left out, as in a floor plan; from
    the side, it looks to the right. Nearer points hide farther ones; cameras are red. The prediction is brought to the
    truth by the scale of depth, the ratio of medians, and by the first camera, which both share: errors of depth and of
    the other cameras stay as they are. Both are drawn where the truth is known. Raises InputError as `align_median`.
    """
    true, predicted = true_cloud(scene), predicted_cloud(scene, prediction)
    frame = _frame(scene, true)
    pictures = {}
    for view, draw in (("above", _above), ("side", _side)):
        for name, cloud in (("truth", true), ("prediction", predicted)):
            pictures[f"{name}, {'from above' if view == 'above' else 'from the side'}"] = draw(cloud, frame, side)
    return pictures


def true_cloud(scene: EvaluationScene) -> Cloud:
    """The points of the true depth and cameras."""
    truth = scene.truth
    valid = truth["depth"] > 0
    points = unproject(truth["depth"], truth["extrinsics"], truth["intrinsics"])
    return Cloud(points[valid].astype(np.float64), _colors(scene, valid), _centres(truth["extrinsics"]))


def predicted_cloud(scene: EvaluationScene, prediction: Mapping[str, Array]) -> Cloud:
    """The points of the predicted depth and cameras where the truth is known, as `cloud_pictures` brings them to it."""
    truth = scene.truth
    valid = truth["depth"] > 0
    scale = align_median(prediction["depth"], truth["depth"], valid)
    cameras = np.array(prediction["extrinsics"], np.float64)
    cameras[..., 3] *= scale
    points = unproject(prediction["depth"] * scale, cameras, prediction["intrinsics"])[valid].astype(np.float64)
    to_truth = _after(invert_extrinsics(truth["extrinsics"][0]).astype(np.float64), cameras[0])
    return Cloud(_moved(points, to_truth), _colors(scene, valid), _moved(_centres(cameras), to_truth))


def splat(u: Array, v: Array, near: Array, colors: Array, height: int, width: int) -> NDArray[np.uint8]:
    """Points as squares of 2 x 2 pixels (height, width, 3); of several in a pixel the one of least `near` is seen.

    u, v     (N,) pixels, u to the right and v down, centres at integers; what lies outside is left out
    near     (N,) distance from the viewer
    colors   (N, 3) uint8
    """
    corner = np.floor(np.stack([v, u], axis=1)).astype(np.int64)
    rows, columns = np.concatenate([corner + step for step in ((0, 0), (0, 1), (1, 0), (1, 1))]).T
    point = np.tile(np.arange(len(near)), 4)
    inside = np.flatnonzero((rows >= 0) & (rows < height) & (columns >= 0) & (columns < width))
    order = inside[np.argsort(-near[point[inside]], kind="stable")]
    drawing = np.full((height, width, 3), _BACKGROUND, np.uint8)
    drawing[rows[order], columns[order]] = colors[point[order]]  # of equal places the last one written stays
    return drawing


def _above(cloud: Cloud, frame: _Frame, side: int) -> Array:
    points = cloud.points @ frame.axes.T
    ceiling = (cloud.cameras @ frame.axes.T)[:, 2].max() + _HEADROOM * (frame.box[1, 2] - frame.box[0, 2])
    below = points[:, 2] <= ceiling
    return _draw(points[below], cloud.colors[below], cloud.cameras @ frame.axes.T, frame.box, (0, 1, 2), side)


def _side(cloud: Cloud, frame: _Frame, side: int) -> Array:
    """The viewer stands to the right of the first camera and looks to the left."""
    return _draw(cloud.points @ frame.axes.T, cloud.colors, cloud.cameras @ frame.axes.T, frame.box, (1, 2, 0), side)


def _draw(points: Array, colors: Array, cameras: Array, box: Array, order: tuple[int, int, int], side: int) -> Array:
    """`order`: which axis goes to the right, which up, and which towards the viewer."""
    across, upwards, towards = order
    middle = box.mean(axis=0)
    scale = side * (1 - 2 * _MARGIN) / max((box[1] - box[0])[[across, upwards]].max(), np.finfo(np.float64).tiny)

    def place(positions: Array) -> tuple[Array, Array]:
        u = (positions[:, across] - middle[across]) * scale + side / 2
        return u, side / 2 - (positions[:, upwards] - middle[upwards]) * scale

    drawing = splat(*place(points), -points[:, towards], colors, side, side)
    for u, v in zip(*place(cameras), strict=True):
        row, column = int(np.clip(v, 3, side - 4)), int(np.clip(u, 3, side - 4))
        drawing[row - 2 : row + 3, column - 2 : column + 3] = _CAMERA
    return drawing


def _frame(scene: EvaluationScene, true: Cloud) -> _Frame:
    """Axes from the true cameras: up as the scene knows it, else against the mean of the images' downward axes."""
    rotation = np.asarray(scene.truth["extrinsics"], np.float64)[:, :, :3]
    up = -rotation[:, 1].mean(axis=0) if scene.up is None else np.asarray(scene.up, np.float64)
    up = up / np.linalg.norm(up)
    forward = rotation[0, 2] - (rotation[0, 2] @ up) * up
    if np.linalg.norm(forward) < 1e-3:  # it looks straight up or down: the image's own upward axis leads on
        forward = -rotation[0, 1] + (rotation[0, 1] @ up) * up
    forward = forward / np.linalg.norm(forward)
    axes = np.stack([np.cross(forward, up), forward, up])
    box = np.percentile(true.points @ axes.T, _OUTLIERS, axis=0)
    cameras = true.cameras @ axes.T
    return _Frame(axes, np.stack([np.minimum(box[0], cameras.min(axis=0)), np.maximum(box[1], cameras.max(axis=0))]))


def _colors(scene: EvaluationScene, valid: Array) -> Array:
    return np.stack([photograph(image) for image in scene.images])[valid]


def _centres(extrinsics: Array) -> Array:
    centres: Array = invert_extrinsics(extrinsics)[..., 3].astype(np.float64)
    return centres


def _after(second: Array, first: Array) -> Array:
    """The motion (3, 4) that does `first`, then `second`."""
    return np.concatenate([second[:, :3] @ first[:, :3], second[:, :3] @ first[:, 3:] + second[:, 3:]], axis=1)


def _moved(points: Array, motion: Array) -> Array:
    return points @ motion[:, :3].T + motion[:, 3]

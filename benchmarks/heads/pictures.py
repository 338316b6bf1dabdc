"""The heads of a comparison side by side, where a held-out scene has most edges: maps of a crop, and its points."""

import io
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from moe3d_deploy.evaluation import EvaluationScene
from moe3d_deploy.evaluation.clouds import predicted_cloud, splat, true_cloud
from moe3d_deploy.evaluation.pictures import ERROR_TOP, map_pictures
from moe3d_deploy.runtime.overview import overview

FAR = 3.0  # times as deep as the foreground: no step beyond counts for the crop, no point is drawn
EDGE_RATIO = 1.25  # of neighbouring depths, from which a step counts
_CROP = 3 / 8  # of height and width
_CELL = 220  # pixels that a cell is at least wide
_CLOUD_CELL = (200, 300)  # height and width of a drawing of points
_OUTLIERS = (1, 99)  # percentiles of the true points that are in the drawing for sure
_MARGIN = 0.15
# Of camera axes (right, down, forward): what goes to the right, what goes down, and what leads away from the viewer.
_DIRECTIONS = (
    (np.array([0, 0, 1]), np.array([0, 1, 0]), np.array([-1, 0, 0])),  # from the side: standing to the right
    (np.array([1, 0, 0]), np.array([0, 0, -1]), np.array([0, 1, 0])),  # from above: forward is up
)
_NEAR_PERCENTILE = 5  # of the depths of a crop: its foreground
_ROWS = ("predicted 1 / depth", f"error, to {100 * ERROR_TOP:.0f} %", "strongest expert")

Array = NDArray[Any]
Predictions = Mapping[str, Mapping[str, Array]]
"""By head, of one scene."""


class Crop(NamedTuple):
    """A view of a scene, and rows and columns of it."""

    view: int
    rows: slice
    columns: slice


def most_edges(depth: Array) -> Crop:
    """Where most steps of depth lie in (S, H, W), 0 where unknown: the first such place in a fixed order."""
    _, height, width = depth.shape
    size = max(1, round(height * _CROP)), max(1, round(width * _CROP))
    sums = np.stack([_sums(_steps(view), *size) for view in depth])
    view, row, column = (int(i) for i in np.unravel_index(sums.argmax(), sums.shape))
    return Crop(view, slice(row, row + size[0]), slice(column, column + size[1]))


def edge_sheet(scene: EvaluationScene, predictions: Predictions, crop: Crop) -> Array:
    """(height, width, 3) uint8 RGB. Columns: photograph, truth, a head each. Rows: inverse depth, error, and the
    strongest expert of heads that have any.

    Colours and scales are those of `evaluation.pictures`: one scale for a whole scene.
    """
    drawn = {name: map_pictures(scene, prediction)[crop.view] for name, prediction in predictions.items()}
    some = next(iter(drawn.values()))
    height, width = crop.rows.stop - crop.rows.start, crop.columns.stop - crop.columns.start
    blank = np.full((height, width, 3), 255, np.uint8)

    def cut(pictures: Mapping[str, Array], title: str) -> Array:
        picture = pictures[title][crop.rows, crop.columns] if title in pictures else blank
        factor = -(-_CELL // width)
        return cv2.resize(picture, None, fx=factor, fy=factor, interpolation=cv2.INTER_NEAREST)

    rows = []
    for title in _ROWS:
        first = title == _ROWS[0]
        row = {"photograph": cut(some, "image" if first else ""), "truth": cut(some, "true 1 / depth" if first else "")}
        rows.append(row | {name: cut(pictures, title) for name, pictures in drawn.items()})
    return overview(rows)


def point_sheet(scene: EvaluationScene, predictions: Predictions, crop: Crop) -> Array:
    """(height, width, 3) uint8 RGB: the points of the crop from the side, below from above; truth and a head each.

    Only one view is drawn, by its own predicted camera, at the scale of depth that fits the crop best, and without what
    is more than FAR times as deep as its foreground. Sides are the camera's own; all drawings of a row show the same
    part of space.
    """
    alone = _alone(scene, crop)
    clouds = {"truth": true_cloud(alone)}
    for name, prediction in predictions.items():
        view = {key: values[crop.view : crop.view + 1] for key, values in prediction.items()}
        clouds[name] = predicted_cloud(alone, view)
    camera = np.asarray(alone.truth["extrinsics"][0], np.float64)
    seen = {name: cloud.points @ camera[:, :3].T + camera[:, 3] for name, cloud in clouds.items()}
    rows = []
    for across, down, near in _DIRECTIONS:
        frame = _frame(seen["truth"] @ across, seen["truth"] @ down)
        rows.append(
            {
                name: splat(*frame(xyz @ across, xyz @ down), xyz @ near, clouds[name].colors, *_CLOUD_CELL)
                for name, xyz in seen.items()
            }
        )
    return overview(rows)


def encoded(picture: Array) -> bytes:
    """A PNG as small as it gets: pictures of documents lie in the repository."""
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG", optimize=True)
    return file.getvalue()


def _alone(scene: EvaluationScene, crop: Crop) -> EvaluationScene:
    """One view as a scene, whose truth is known in the crop alone: only what is known is drawn."""
    truth = {name: values[crop.view : crop.view + 1] for name, values in scene.truth.items()}
    inside = truth["depth"][:, crop.rows, crop.columns]
    near = np.percentile(inside[inside > 0], _NEAR_PERCENTILE) if (inside > 0).any() else 0.0
    known = np.zeros_like(truth["depth"])
    known[:, crop.rows, crop.columns] = np.where(inside <= FAR * near, inside, 0)
    images = scene.images[crop.view : crop.view + 1]
    return EvaluationScene(scene.name, images, {**truth, "depth": known}, scene.up)


def _frame(across: Array, down: Array) -> Callable[[Array, Array], tuple[Array, Array]]:
    """From lengths to pixels of a cell, such that nearly all of these points (N,) are inside."""
    low, high = np.percentile(np.stack([across, down]), _OUTLIERS, axis=1)
    height, width = _CLOUD_CELL
    span = np.maximum(high - low, np.finfo(np.float64).tiny) * (1 + 2 * _MARGIN)
    scale = min(width / span[0], height / span[1])
    middle = (low + high) / 2
    return lambda x, y: ((x - middle[0]) * scale + width / 2, (y - middle[1]) * scale + height / 2)


def _steps(depth: Array) -> Array:
    """(H, W) bool: pixels whose right or lower neighbour is EDGE_RATIO to FAR times as deep, or the other way round."""
    found = np.zeros(depth.shape, bool)
    for axis in (0, 1):
        one, other = (np.delete(depth, end, axis=axis) for end in (-1, 0))
        near, far = np.minimum(one, other), np.maximum(one, other)
        edge = (near > 0) & (far > EDGE_RATIO * near) & (far <= FAR * near)
        found[: edge.shape[0], : edge.shape[1]] |= edge
    return found


def _sums(mask: Array, height: int, width: int) -> Array:
    """Of every window of that size, by its upper left corner."""
    total = np.pad(mask.astype(np.int64).cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    return total[height:, width:] - total[:-height, width:] - total[height:, :-width] + total[:-height, :-width]

"""A scene as a COLMAP model: cameras, images and points of a sparse reconstruction, binary or text.

Format: COLMAP's documentation, "Output Format"; without rigs and frames, which its readers take as one of each per
image. In COLMAP the centre of the top left pixel is (0.5, 0.5); everywhere else in this project it is (0, 0).
"""

import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe3d_deploy.errors import InputError
from moe3d_deploy.files import atomic_path
from moe3d_deploy.geometry import cameras_to_pose_encoding
from moe3d_deploy.images import ViewMapping
from moe3d_deploy.runtime.pointcloud import PointCloud

DEFAULT_POINTS = 100_000
MODEL_FOLDER = "sparse/0"
PARTS = ("cameras", "images", "points3D")
_PIXEL_SHIFT = 0.5
_PINHOLE = 1  # the number of the camera model fx, fy, cx, cy
_NO_ERROR = -1.0  # COLMAP's mark for a reprojection error that was never computed
_POINT2D = np.dtype([("x", "<f8"), ("y", "<f8"), ("point", "<u8")])
_POINT3D = np.dtype(
    [("id", "<u8"), ("xyz", "<f8", 3), ("rgb", "u1", 3), ("error", "<f8"), ("length", "<u8"), ("track", "<u4", 2)]
)


@dataclass(frozen=True, eq=False)
class ColmapModel:
    """What the three files hold; view i has camera and image number i + 1, point j number j + 1.

    views         one mapping per view: its name, the photograph's size
    intrinsics    (S, 3, 3) of the photographs, pixel centres at integers
    quaternions   (S, 4) w, x, y, z of camera from world
    translations  (S, 3)
    cloud         the points, in order of their views
    starts        (S + 1,) the points of view i are starts[i] to starts[i + 1]: each is seen in the view it came from
    pixels        (N, 2) x, y of each point in its photograph, pixel centres at integers
    """

    views: Sequence[ViewMapping]
    intrinsics: np.ndarray
    quaternions: np.ndarray
    translations: np.ndarray
    cloud: PointCloud
    starts: np.ndarray
    pixels: np.ndarray


def check_names(views: Sequence[ViewMapping], *, text: bool) -> None:
    """Raise InputError for views whose names a COLMAP model cannot hold: equal ones, or in text form ones with blanks.

    A name leads to a photograph, so none is changed to make it fit.
    """
    repeated = [name for name, count in Counter(view.name for view in views).items() if count > 1]
    if repeated:
        raise InputError(
            f"two views are named {repeated[0]!r}, and a COLMAP model needs different names; rename a photograph, "
            "or leave colmap and colmap-txt out of the formats"
        )
    blank = [view.name for view in views if view.name.split() != [view.name]]
    if text and blank:
        raise InputError(
            f"the name {blank[0]!r} does not fit COLMAP's text form, where it ends at the first blank; "
            "choose colmap, the binary form, or rename the photograph"
        )


def colmap_model(
    cloud: PointCloud,
    views: Sequence[ViewMapping],
    extrinsics: np.ndarray,
    intrinsics: np.ndarray,
    shape: tuple[int, int],
) -> ColmapModel:
    """The model of one scene.

    cloud        its points, `pixels` ascending
    extrinsics   (S, 3, 4) camera from world
    intrinsics   (S, 3, 3) of the network input; skew has no place in the model, and the networks give none
    shape        (H, W) of the network input

    Raises InputError for a camera that is not finite or has no positive focal length.
    """  # fmt: skip
    height, width = shape
    with np.errstate(invalid="ignore"):
        of_photographs = np.stack([view.intrinsics_to_original(k) for view, k in zip(views, intrinsics, strict=True)])
    for index, view in enumerate(views):
        focal = of_photographs[index, (0, 1), (0, 1)]
        if not (
            np.isfinite(of_photographs[index]).all() and np.isfinite(extrinsics[index]).all() and (focal > 0).all()
        ):
            raise InputError(
                f"view {index} ({view.name}) has a camera that is not finite or without focal length; leave the view "
                "out, or colmap and colmap-txt out of the formats"
            )
    encoding = cameras_to_pose_encoding(
        extrinsics.astype(np.float64), of_photographs, 1, 1
    )  # its fields of view: unused
    view_of, pixel = np.divmod(cloud.pixels, height * width)
    starts = np.searchsorted(view_of, np.arange(len(views) + 1))
    uv = np.stack([pixel % width, pixel // width], axis=-1).astype(np.float64)
    for index, view in enumerate(views):
        part = slice(starts[index], starts[index + 1])
        uv[part] = view.to_original(uv[part])
    return ColmapModel(views, of_photographs, encoding[:, (6, 3, 4, 5)], encoding[:, :3], cloud, starts, uv)


def write_colmap(model: ColmapModel, folder: Path, *, text: bool) -> list[Path]:
    """Write cameras, images and points3D as .bin, or as .txt, into `folder`, which exists."""
    suffix = "txt" if text else "bin"
    writers = (_cameras_text, _images_text, _points_text) if text else (_cameras, _images, _points)
    paths = [folder / f"{part}.{suffix}" for part in PARTS]
    for path, write in zip(paths, writers, strict=True):
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            for piece in write(model):
                file.write(piece)
    return paths


def _parameters(model: ColmapModel) -> np.ndarray:
    """(S, 4) fx, fy, cx, cy in COLMAP's pixels."""
    k = model.intrinsics
    return np.stack([k[:, 0, 0], k[:, 1, 1], k[:, 0, 2] + _PIXEL_SHIFT, k[:, 1, 2] + _PIXEL_SHIFT], axis=-1)


def _cameras(model: ColmapModel) -> Iterator[bytes]:
    yield struct.pack("<Q", len(model.views))
    for number, (view, parameters) in enumerate(zip(model.views, _parameters(model), strict=True), 1):
        yield struct.pack("<IiQQ4d", number, _PINHOLE, view.original_width, view.original_height, *parameters)


def _images(model: ColmapModel) -> Iterator[bytes]:
    yield struct.pack("<Q", len(model.views))
    for index, view in enumerate(model.views):
        number, first, end = index + 1, int(model.starts[index]), int(model.starts[index + 1])
        yield struct.pack("<I7dI", number, *model.quaternions[index], *model.translations[index], number)
        yield view.name.encode("utf-8", "surrogateescape") + b"\0" + struct.pack("<Q", end - first)
        points = np.empty(end - first, _POINT2D)
        points["x"], points["y"] = (model.pixels[first:end] + _PIXEL_SHIFT).T
        points["point"] = np.arange(first, end) + 1
        yield points.tobytes()


def _points(model: ColmapModel) -> Iterator[bytes]:
    count = len(model.cloud)
    view, index = _tracks(model)
    points = np.empty(count, _POINT3D)
    points["id"] = np.arange(count) + 1
    points["xyz"], points["rgb"], points["error"] = model.cloud.points, model.cloud.colors, _NO_ERROR
    points["length"], points["track"] = 1, np.stack([view + 1, index], axis=-1)
    yield struct.pack("<Q", count)
    yield points.tobytes()


def _tracks(model: ColmapModel) -> tuple[np.ndarray, np.ndarray]:
    """Per point the view it is seen in and its place among that view's points."""
    counts = np.diff(model.starts)
    view = np.repeat(np.arange(len(counts)), counts)
    return view, np.arange(len(view)) - model.starts[view]


def _cameras_text(model: ColmapModel) -> Iterator[bytes]:
    yield b"# CAMERA_ID MODEL WIDTH HEIGHT PARAMS[]\n"
    for number, (view, parameters) in enumerate(zip(model.views, _parameters(model), strict=True), 1):
        yield _line(number, "PINHOLE", view.original_width, view.original_height, *parameters.tolist())


def _images_text(model: ColmapModel) -> Iterator[bytes]:
    yield b"# IMAGE_ID QW QX QY QZ TX TY TZ CAMERA_ID NAME, then a line of X Y POINT3D_ID\n"
    for index, view in enumerate(model.views):
        number, first, end = index + 1, int(model.starts[index]), int(model.starts[index + 1])
        pose = (*model.quaternions[index].tolist(), *model.translations[index].tolist())
        yield _line(number, *pose, number, view.name)
        pixels = (model.pixels[first:end] + _PIXEL_SHIFT).tolist()
        yield _line(*(f"{x!r} {y!r} {number}" for number, (x, y) in enumerate(pixels, first + 1)))


def _points_text(model: ColmapModel) -> Iterator[bytes]:
    yield b"# POINT3D_ID X Y Z R G B ERROR TRACK[] as IMAGE_ID POINT2D_IDX\n"
    view, index = _tracks(model)
    rows = zip(model.cloud.points.tolist(), model.cloud.colors.tolist(), view.tolist(), index.tolist(), strict=True)
    for number, (xyz, rgb, seen_in, place) in enumerate(rows, 1):
        yield _line(number, *xyz, *rgb, _NO_ERROR, seen_in + 1, place)


def _line(*fields: object) -> bytes:
    return (" ".join(map(str, fields)) + "\n").encode("utf-8", "surrogateescape")

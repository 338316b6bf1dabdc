"""Coloured point clouds from depth and cameras, and their PLY and GLB files.

Points are in the world frame of the extrinsics, OpenCV axes (x right, y down, z forward), up to the scene's scale.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moe3d_deploy.errors import InputError
from moe3d_deploy.files import atomic_path
from moe3d_deploy.geometry import unproject

_PLY_VERTEX = np.dtype(
    [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("red", "u1"), ("green", "u1"), ("blue", "u1"), ("confidence", "<f4")]
)  # fmt: skip
_PLY_TYPES = {"f4": "float", "u1": "uchar"}

# The numbers the glTF 2.0 specification gives these names (sections 3.6, 3.7 and 4.4).
_GLTF_FLOAT, _GLTF_UNSIGNED_BYTE, _GLTF_POINTS, _GLTF_ARRAY_BUFFER = 5126, 5121, 0, 34962


@dataclass(frozen=True)
class PointCloud:
    """N points of one scene.

    points       (N, 3)  float32, world frame, OpenCV axes
    colors       (N, 3)  uint8 RGB (sRGB, as in the images)
    confidence   (N,)    float32, >= 1
    """

    points: np.ndarray
    colors: np.ndarray
    confidence: np.ndarray

    def __post_init__(self) -> None:
        count = len(self.confidence)
        for name, shape in (("points", (count, 3)), ("colors", (count, 3)), ("confidence", (count,))):
            if getattr(self, name).shape != shape:
                raise InputError(f"point cloud: {name} has shape {getattr(self, name).shape}, expected {shape}")
        if not (np.isfinite(self.points).all() and np.isfinite(self.confidence).all()):
            raise InputError("point cloud: points or confidence are not finite; leave such points out")

    def __len__(self) -> int:
        return len(self.confidence)


def point_cloud(
    result: Mapping[str, np.ndarray],
    images: np.ndarray,
    masks: Sequence[np.ndarray] | np.ndarray,
    *,
    drop_lowest: float = 0.25,
) -> PointCloud:
    """Lift one scene's depth to coloured points, in view, row, column order.

    result        depth, depth_conf (S, H, W), extrinsics (S, 3, 4), intrinsics (S, 3, 3)
    images        (S, 3, H, W) float RGB in [0, 1]
    masks         S times (H, W) bool, False on padding
    drop_lowest   fraction in [0, 1) of the scene's valid pixels to leave out, those of lowest confidence

    Valid are pixels that are no padding and have a finite, positive depth, a finite confidence and a finite point. The
    threshold is the confidence of rank floor(drop_lowest * valid pixels); what is below it goes, and pixels that equal
    it all stay. So never more than the fraction goes, and nothing does where the confidence is constant.
    Raises InputError for a missing array, a wrong shape or a fraction out of range.
    """
    if not 0 <= drop_lowest < 1:
        raise InputError(f"the fraction of points to drop is {drop_lowest:g}; give a number from 0 to below 1")
    views, height, width = images.shape[0], images.shape[2], images.shape[3]
    check_scene(result, views, height, width)
    valid = valid_pixels(result["depth"], masks) & np.isfinite(result["depth_conf"])
    depth = np.where(valid, result["depth"], 1)
    with np.errstate(over="ignore", invalid="ignore"):  # a broken camera gives non-finite points, dropped below
        points = unproject(depth, result["extrinsics"], result["intrinsics"]).astype(np.float32)
    valid &= np.isfinite(points).all(axis=-1)

    confidence = result["depth_conf"][valid]
    if dropped := math.floor(drop_lowest * confidence.size):
        valid &= result["depth_conf"] >= np.partition(confidence, dropped)[dropped]
    colors = np.moveaxis(images, 1, -1)[valid]
    return PointCloud(
        points=points[valid],
        colors=np.rint(np.clip(colors, 0, 1) * 255).astype(np.uint8),
        confidence=result["depth_conf"][valid].astype(np.float32),
    )


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


def write_ply(cloud: PointCloud, path: Path) -> None:
    """Write a binary little-endian PLY: x y z float, red green blue uchar, confidence float; it may be empty."""
    vertices = np.empty(len(cloud), _PLY_VERTEX)
    for axis, (coordinate, color) in enumerate((("x", "red"), ("y", "green"), ("z", "blue"))):
        vertices[coordinate] = cloud.points[:, axis]
        vertices[color] = cloud.colors[:, axis]
    vertices["confidence"] = cloud.confidence
    header = [
        "ply",
        "format binary_little_endian 1.0",
        "comment OpenCV axes: x right, y down, z forward; up to the scene's scale, not metres",
        f"element vertex {len(cloud)}",
        *(f"property {_PLY_TYPES[_PLY_VERTEX[name].str[1:]]} {name}" for name in _PLY_VERTEX.names or ()),
        "end_header",
    ]
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(("\n".join(header) + "\n").encode("ascii"))
        file.write(vertices.tobytes())


def require_points(cloud: PointCloud, path: Path) -> None:
    """Raise InputError if the cloud is empty and so no GLB at `path` can hold it."""
    if len(cloud) == 0:
        raise InputError(
            f"{path}: there are no points and glTF cannot hold an empty cloud; lower drop_lowest, "
            "check that the depth is finite and positive, or leave glb out of the formats"
        )


def write_glb(cloud: PointCloud, path: Path) -> None:
    """Write a binary glTF 2.0 file with one POINTS primitive.

    The vertices are those of the cloud; the node turns them by 180 degrees about x, from OpenCV's axes to glTF's
    (y up, z backward). Colours are the image's bytes, with an alpha of 255 that keeps every vertex 4-byte aligned.
    Raises InputError for an empty cloud: glTF has no accessor without elements.
    """
    require_points(cloud, path)
    positions = np.ascontiguousarray(cloud.points, "<f4")
    colors = np.full((len(cloud), 4), 255, np.uint8)
    colors[:, :3] = cloud.colors
    document = {
        "asset": {"version": "2.0", "generator": "moe3d-deploy"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"name": "points", "mesh": 0, "rotation": [1, 0, 0, 0]}],  # quaternion x, y, z, w
        "meshes": [{"primitives": [{"mode": _GLTF_POINTS, "attributes": {"POSITION": 0, "COLOR_0": 1}}]}],
        "accessors": [
            {
                "bufferView": 0,
                "componentType": _GLTF_FLOAT,
                "type": "VEC3",
                "count": len(cloud),
                "min": positions.min(axis=0).tolist(),
                "max": positions.max(axis=0).tolist(),
            },
            {
                "bufferView": 1,
                "componentType": _GLTF_UNSIGNED_BYTE,
                "normalized": True,
                "type": "VEC4",
                "count": len(cloud),
            },
        ],
        "bufferViews": [
            {"buffer": 0, "byteOffset": 0, "byteLength": positions.nbytes, "target": _GLTF_ARRAY_BUFFER},
            {
                "buffer": 0,
                "byteOffset": positions.nbytes,
                "byteLength": colors.nbytes,
                "target": _GLTF_ARRAY_BUFFER,
            },
        ],
        "buffers": [{"byteLength": positions.nbytes + colors.nbytes}],
    }
    text = json.dumps(document, separators=(",", ":"), allow_nan=False).encode("ascii")
    text += b" " * (-len(text) % 4)
    data_length = positions.nbytes + colors.nbytes  # 16 bytes a point: aligned without padding
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<4sII", b"glTF", 2, 12 + 8 + len(text) + 8 + data_length))
        file.write(struct.pack("<I4s", len(text), b"JSON") + text)
        file.write(struct.pack("<I4s", data_length, b"BIN\0"))
        file.write(positions.tobytes())
        file.write(colors.tobytes())

"""PLY and GLB files of a point cloud."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from moe3d_deploy.errors import InputError
from moe3d_deploy.files import atomic_path
from moe3d_deploy.runtime.pointcloud import PointCloud

_CHUNK = 1 << 20  # points formatted at a time: a large cloud is not held twice
_PLY_VERTEX = np.dtype(
    [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("red", "u1"), ("green", "u1"), ("blue", "u1"), ("confidence", "<f4")]
)  # fmt: skip
_PLY_TYPES = {"f4": "float", "u1": "uchar"}

# The numbers the glTF 2.0 specification gives these names (sections 3.6, 3.7 and 4.4).
_GLTF_FLOAT, _GLTF_UNSIGNED_BYTE, _GLTF_POINTS, _GLTF_ARRAY_BUFFER = 5126, 5121, 0, 34962
_GLB_MAX_BYTES = 2**32 - 2**16  # the format counts bytes in 32 bits; the rest is for header and JSON


def write_ply(cloud: PointCloud, path: Path) -> None:
    """Write a binary little-endian PLY: x y z float, red green blue uchar, confidence float; it may be empty."""
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
        for part in _chunks(len(cloud)):
            vertices = np.empty(len(cloud.confidence[part]), _PLY_VERTEX)
            for axis, (coordinate, color) in enumerate((("x", "red"), ("y", "green"), ("z", "blue"))):
                vertices[coordinate] = cloud.points[part, axis]
                vertices[color] = cloud.colors[part, axis]
            vertices["confidence"] = cloud.confidence[part]
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
    position_bytes, color_bytes = 12 * len(cloud), 4 * len(cloud)
    if position_bytes + color_bytes > _GLB_MAX_BYTES:
        raise InputError(f"{path}: {len(cloud)} points are more than a GLB file can hold (4 GiB); limit them")
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
                "min": cloud.points.min(axis=0).tolist(),
                "max": cloud.points.max(axis=0).tolist(),
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
            {"buffer": 0, "byteOffset": 0, "byteLength": position_bytes, "target": _GLTF_ARRAY_BUFFER},
            {
                "buffer": 0,
                "byteOffset": position_bytes,
                "byteLength": color_bytes,
                "target": _GLTF_ARRAY_BUFFER,
            },
        ],
        "buffers": [{"byteLength": position_bytes + color_bytes}],
    }
    text = json.dumps(document, separators=(",", ":"), allow_nan=False).encode("ascii")
    text += b" " * (-len(text) % 4)
    data_length = position_bytes + color_bytes  # 16 bytes a point: aligned without padding
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<4sII", b"glTF", 2, 12 + 8 + len(text) + 8 + data_length))
        file.write(struct.pack("<I4s", len(text), b"JSON") + text)
        file.write(struct.pack("<I4s", data_length, b"BIN\0"))
        for part in _chunks(len(cloud)):
            file.write(np.ascontiguousarray(cloud.points[part], "<f4").tobytes())
        for part in _chunks(len(cloud)):
            colors = np.full((len(cloud.confidence[part]), 4), 255, np.uint8)
            colors[:, :3] = cloud.colors[part]
            file.write(colors.tobytes())


def _chunks(count: int) -> Iterator[slice]:
    for start in range(0, count, _CHUNK):
        yield slice(start, start + _CHUNK)

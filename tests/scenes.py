"""A small scene of two photographs with random results, and readers of the files that are made of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from PIL import Image

from moe3d_deploy.images import ImageBatch, load_images

EXPERTS = 4
Arrays = dict[str, np.ndarray]


def two_photographs(tmp_path: Path) -> ImageBatch:
    """Two photographs of one stem: 112x84 with a red square, and 112x56, padded with 7 rows above and below.

    Network size 56x42: one network pixel is two pixels of the photographs.
    """
    files = []
    for folder, name, height in (("a", "left.png", 84), ("b", "left.jpg", 56)):
        pixels = np.full((height, 112, 3), (40, 90, 200), np.uint8)
        if folder == "a":
            pixels[20:40, 60:80] = (255, 0, 0)
        files.append(tmp_path / folder / name)
        files[-1].parent.mkdir()
        Image.fromarray(pixels).save(files[-1])
    return load_images(files, size=56)


def random_result(batch: ImageBatch) -> Arrays:
    views, _, height, width = batch.images.shape
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.full(EXPERTS, 0.3), (views, height, width)).transpose(0, 3, 1, 2).astype(np.float32)
    return {
        "depth": rng.uniform(0.5, 4, (views, height, width)).astype(np.float32),
        "depth_conf": (1 + rng.gamma(2, 2, (views, height, width))).astype(np.float32),
        "extrinsics": np.tile(np.eye(4, dtype=np.float32)[:3], (views, 1, 1)),
        "intrinsics": np.tile(np.array([[50, 0, 28], [0, 50, 21], [0, 0, 1]], np.float32), (views, 1, 1)),
        "expert_weights": weights,
        "expert_entropy": -(weights * np.log(weights + 1e-12)).sum(axis=1),
        "pose_enc": rng.normal(size=(views, 9)).astype(np.float32),
    }


def read_cameras(folder: Path) -> dict[str, Any]:
    def refuse(token: str) -> None:
        raise ValueError(f"{token} is not JSON")

    return json.loads((folder / "cameras.json").read_text(), parse_constant=refuse)


def read_points(path: Path) -> Any:
    """The one geometry of a PLY or GLB file, before its node's rotation."""
    (points,) = trimesh.load_scene(path).geometry.values()
    return points


def read_png(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def turned_second_camera(batch: ImageBatch) -> Arrays:
    """`random_result` with the second camera turned by 90 degrees about y and shifted."""
    arrays = random_result(batch)
    arrays["extrinsics"][1] = [[0, 0, 1, 0.5], [0, 1, 0, -0.25], [-1, 0, 0, 2]]
    return arrays

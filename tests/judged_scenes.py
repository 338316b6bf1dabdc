"""Scenes with truth that need no renderer: a plane with a box in front of it, seen by cameras side by side."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moe3d_deploy.evaluation import EvaluationScene

Arrays = dict[str, Any]


def box_scene(name: str = "box", views: int = 2, height: int = 28, width: int = 42) -> EvaluationScene:
    """A wall at depth 4 with a box at depth 2, a corner without truth; cameras 0.2 apart along x."""
    depth = np.full((views, height, width), 4, np.float32)
    for view in range(views):
        depth[view, height // 4 : height // 2, 10 + view : 20 + view] = 2
    depth[:, :3, :3] = 0
    extrinsics = np.tile(np.eye(3, 4, dtype=np.float32), (views, 1, 1))
    extrinsics[:, 0, 3] = -0.2 * np.arange(views)
    focal = float(width)
    camera = np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]], np.float32)
    levels = np.random.default_rng(views).integers(0, 256, (views, 3, height, width))
    truth = {"depth": depth, "extrinsics": extrinsics, "intrinsics": np.tile(camera, (views, 1, 1))}
    return EvaluationScene(name, levels.astype(np.float32) / np.float32(255), truth)


def itself(scene: EvaluationScene, scale: float = 1.0) -> Arrays:
    """The truth as a prediction, in another scale; a depth of 1 where there is no truth."""
    depth, extrinsics = scene.truth["depth"], scene.truth["extrinsics"].copy()
    extrinsics[:, :, 3] *= scale
    return {**scene.truth, "depth": scale * np.where(depth > 0, depth, 1), "extrinsics": extrinsics}


def write_scene(folder: Path, height: int = 84, width: int = 112, views: int = 2) -> Arrays:
    """A scene of a user's: photographs of that size, and a truth.npz as large; returns what is in that."""
    folder.mkdir(parents=True)
    scene = box_scene(views=views, height=height, width=width)
    for view, image in enumerate(scene.images):
        pixels = np.rint(image.transpose(1, 2, 0) * 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"view_{view}.png")
    np.savez(folder / "truth.npz", **scene.truth)
    return dict(scene.truth)

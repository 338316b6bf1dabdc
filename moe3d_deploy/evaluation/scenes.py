"""Scenes with truth: what the evaluation runs on, and how procedural ones become that."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe3d_deploy.manifest import ShapeRanges
from moe3d_deploy.runtime.pixels import to_floats

HELD_OUT = ("test-seeds", "test-kinds")  # of `training.scenes`, which needs torch
SPLITS = (*HELD_OUT, "train")
_PORTION = 3 / 4  # height over width, as photographs have it


@dataclass(frozen=True, eq=False)
class EvaluationScene:
    """The views of a scene and what is true of them, at the network's resolution.

    name     of the scene: its seed, or its folder
    images   (S, 3, H, W) float32 RGB in [0, 1], every value a level of 8-bit pixels
    truth    depth (S, H, W) along the optical axis with 0 where none is known, extrinsics (S, 3, 4) camera from world,
             intrinsics (S, 3, 3) in pixels of `images`
    up       (3,) of the truth's world, where it is known
    """

    name: str
    images: NDArray[np.float32]
    truth: Mapping[str, NDArray[Any]]
    up: tuple[float, float, float] | None = None


def native_size(width: int, patch_size: int, shapes: ShapeRanges | None = None) -> tuple[int, int]:
    """Height and width of the views that a model is judged on: `width` and three quarters of it, in whole patches.

    What `shapes` fixes counts instead: with a fixed width alone, the height is three quarters of that.
    """
    if shapes and shapes.width.min == shapes.width.max:
        width = shapes.width.min
    if shapes and shapes.height.min == shapes.height.max:
        return shapes.height.min, width
    return max(1, round(width * _PORTION / patch_size)) * patch_size, width


def rendered_scene(
    seed: int, *, split: str, views: int, height: int, width: int, photographs: bool = False
) -> EvaluationScene:
    """The procedural scene of `seed` in a split. Needs torch. Raises InputError as `SceneOptions` does."""
    from moe3d_deploy.training.scenes import SceneOptions, render_scene

    options = SceneOptions(height=height, width=width, views=views, split=split, photographs=photographs)
    scene = render_scene(seed, options)
    pixels = np.moveaxis(scene.images.numpy(), 1, -1)  # (S, H, W, 3), as 8-bit pixels lie everywhere here
    truth = {name: getattr(scene, name).numpy() for name in ("depth", "extrinsics", "intrinsics")}
    return EvaluationScene(str(seed), to_floats(pixels), truth, up=(0, 0, 1))


def rendered_scenes(seeds: Iterable[int], **options: Any) -> Iterator[EvaluationScene]:
    """`rendered_scene` of each seed, one after another; options as there."""
    return (rendered_scene(seed, **options) for seed in seeds)

"""What a parity measurement shows its models: procedural scenes where one fits the shape, else smooth random images.

Noise has no boundaries; a scene has, and a true depth.
"""

from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from moe3d_deploy.benchmarks.bench.parity_shapes import Shape
from moe3d_deploy.child import Emit
from moe3d_deploy.errors import InputError
from moe3d_deploy.runtime.pixels import to_pixels

SPLIT = "test-seeds"  # scenes that training never showed
_SEEDS = 100  # from one shape to the next: none has so many scenes
_COARSE_PIXELS = 12  # of an image to one random value: smooth, as pictures are
_SHIFT = 5  # pixels from one view to the next


class Images(NamedTuple):
    """pixels (B, S, H, W, 3) uint8; truth, the depth (B, S, H, W), 0 where none is known, or None; what, in words."""

    pixels: NDArray[np.uint8]
    truth: NDArray[np.float32] | None
    what: str


def make_inputs(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Child: write the images of every place of `indices` in `shapes` into `folder`, and tell `what` they are."""
    for index in request["indices"]:
        emit({"step": index})
        batch, views, height, width = request["shapes"][index]
        images = images_of((batch, views, height, width), seed=_SEEDS * index)
        folder = Path(request["folder"])
        np.save(folder / f"images_{index}.npy", images.pixels)
        if images.truth is not None:
            np.save(folder / f"truth_{index}.npy", images.truth)
        emit({"done": index, "images": images.what})
    return {}


def read_inputs(folder: Path, index: int) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None]:
    """Pixels and truth of a place."""
    truth = folder / f"truth_{index}.npy"
    return np.load(folder / f"images_{index}.npy"), np.load(truth) if truth.exists() else None


def images_of(shape: Shape, seed: int) -> Images:
    """The images of a shape (B, S, H, W), the same for the same seed. Needs torch."""
    from moe3d_deploy.evaluation.scenes import rendered_scene
    from moe3d_deploy.training.scenes import SceneOptions

    batch, views, height, width = shape
    try:
        SceneOptions(height=height, width=width, views=views, split=SPLIT)
    except InputError:  # fewer pixels or more views than scenes have
        return Images(random_pixels(shape, seed), None, f"smooth random images, seed {seed}")
    scenes = [
        rendered_scene(seed + i, split=SPLIT, views=views, height=height, width=width, photographs=False)
        for i in range(batch)
    ]
    pixels = to_pixels(np.stack([scene.images for scene in scenes]))
    truth = np.stack([scene.truth["depth"] for scene in scenes])
    seeds = f"{seed}..{seed + batch - 1}" if batch > 1 else f"{seed}"
    return Images(pixels, truth, f"scenes of {SPLIT}, seed {seeds}")


def random_pixels(shape: Shape, seed: int) -> NDArray[np.uint8]:
    """Pixels (B, S, H, W, 3): every view a window of its scene's picture, a little farther to the right."""
    batch, views, height, width = shape
    random, wide = np.random.default_rng(seed), width + _SHIFT * (views - 1)
    coarse = (max(2, height // _COARSE_PIXELS), max(2, wide // _COARSE_PIXELS), 3)
    pictures = [
        cv2.resize(random.random(coarse, np.float32), (wide, height), interpolation=cv2.INTER_CUBIC)
        for _ in range(batch)
    ]
    starts = [_SHIFT * view for view in range(views)]
    windows = np.stack([[picture[:, start : start + width] for start in starts] for picture in pictures])
    return np.rint(255 * windows.clip(0, 1)).astype(np.uint8)

"""The stereo photographs "motorcycle" as a scene with truth: the only real pictures with depth that pip brings.

Middlebury 2014 (Scharstein et al.), as scikit-image's wheel carries it: a quarter of the resolution, with the left
view's disparity. What is known of the cameras is in the docstring of `skimage.data.stereo_motorcycle`.
"""

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from moe3d_deploy.errors import InputError
from moe3d_deploy.evaluation.folder import TRUTH_FILE

PHOTOGRAPHS = ("motorcycle_left.png", "motorcycle_right.png")
DISPARITY = "motorcycle_disp.npz"

FOCAL = 994.978  # pixels, of both views
CENTRE = (311.193, 254.877)  # principal point of the left view, pixels
OFFSET = 31.086  # how much farther right the principal point of the right view lies, pixels
BASELINE = 0.193001  # metres


class Truth(NamedTuple):
    """depth (2, H, W) in metres, 0 where it is not known; extrinsics (2, 3, 4), intrinsics (2, 3, 3) in pixels."""

    depth: NDArray[np.float64]
    extrinsics: NDArray[np.float64]
    intrinsics: NDArray[np.float64]


def write_scene(folder: Path) -> None:
    """Write photographs and truth as `moe3d eval --data` takes them. Raises InputError without scikit-image."""
    source = _data_folder()
    with np.load(source / DISPARITY) as file:
        (disparity,) = file.values()
    folder.mkdir(parents=True)
    for name in PHOTOGRAPHS:
        shutil.copyfile(source / name, folder / name)
    depth, extrinsics, intrinsics = truth(disparity)
    np.savez(folder / TRUTH_FILE, depth=depth, extrinsics=extrinsics, intrinsics=intrinsics)


def truth(disparity: NDArray[np.float32]) -> Truth:
    """The truth of both views from the left one's disparity (H, W).

    A point at depth Z has disparity x_left - x_right = focal baseline / Z - offset. NaN is a disparity that is not
    known; of the right view none is.
    """
    left = FOCAL * BASELINE / (disparity.astype(np.float64) + OFFSET)
    left = np.where(np.isfinite(disparity), left, 0)
    extrinsics = np.tile(np.eye(3, 4), (2, 1, 1))
    extrinsics[1, 0, 3] = -BASELINE
    intrinsics = np.tile(np.array([[FOCAL, 0, CENTRE[0]], [0, FOCAL, CENTRE[1]], [0, 0, 1]]), (2, 1, 1))
    intrinsics[1, 0, 2] += OFFSET
    return Truth(np.stack([left, np.zeros_like(left)]), extrinsics, intrinsics)


def _data_folder() -> Path:
    package = find_spec("skimage")
    if package is None or package.origin is None:
        raise InputError("scikit-image, whose photographs the demo uses, is not installed: make setup")
    return Path(package.origin).parent / "data"

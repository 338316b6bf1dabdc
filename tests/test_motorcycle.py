"""The stereo photographs as a scene with truth: their disparity says where each left pixel lies in the right view."""

from pathlib import Path

import numpy as np
import pytest

from moe3d_deploy.benchmarks import motorcycle
from moe3d_deploy.config import IMAGE_MEAN, IMAGE_STD
from moe3d_deploy.evaluation.folder import TRUTH_FILE, find_scenes, folder_scenes
from moe3d_deploy.geometry import unproject
from moe3d_deploy.manifest import Preprocessing

FIT = Preprocessing("crop", 504, 14, IMAGE_MEAN, IMAGE_STD, "BS3HW")

pytest.importorskip("skimage", reason="scikit-image, whose wheel holds the photographs, is not installed")


def test_true_points_fall_where_the_disparity_says() -> None:
    disparity = np.full((4, 6), 3.0, np.float32)
    disparity[2, 5] = 2.0
    disparity[0, 0] = np.nan

    truth = motorcycle.truth(disparity)

    assert truth.depth[0, 0, 0] == 0
    assert not truth.depth[1].any()
    points = unproject(truth.depth, truth.extrinsics, truth.intrinsics)[0]
    in_right = points @ truth.extrinsics[1, :, :3].T + truth.extrinsics[1, :, 3]
    u = in_right @ truth.intrinsics[1].T
    assert u[2, 5, 0] / u[2, 5, 2] == pytest.approx(5 - 2.0, abs=1e-3)
    assert u[1, 4, 0] / u[1, 4, 2] == pytest.approx(4 - 3.0, abs=1e-3)
    assert u[1, 4, 1] / u[1, 4, 2] == pytest.approx(1, abs=1e-3)


def test_depth_is_that_of_the_published_calibration() -> None:
    """994.978 px times 193.001 mm over 50 + 31.086 px."""
    assert motorcycle.truth(np.full((1, 1), 50, np.float32)).depth[0, 0, 0] == pytest.approx(2.36825, abs=1e-5)


def test_the_photographs_agree_with_their_truth(tmp_path: Path) -> None:
    """Colours of the left view are found in the right one at the truth's place, and not a few pixels beside it."""
    motorcycle.write_scene(tmp_path / "pair")
    (scene,) = folder_scenes(find_scenes(tmp_path / "pair"), FIT, FIT.size)
    depth, (left, right) = scene.truth["depth"][0], np.moveaxis(scene.images, 1, -1)
    valid = depth > 0
    assert valid.mean() > 0.9
    assert 2 < np.median(depth[valid]) < 5
    height, width = depth.shape
    points = unproject(scene.truth["depth"][:1], scene.truth["extrinsics"][:1], scene.truth["intrinsics"][:1])[0][valid]
    seen = (points + scene.truth["extrinsics"][1, :, 3]) @ scene.truth["intrinsics"][1].T
    u, v = (np.rint(seen[:, i] / seen[:, 2]).astype(int) for i in (0, 1))
    inside = (u >= 6) & (u < width - 6) & (v >= 0) & (v < height)

    def difference(beside: int) -> float:
        return float(np.abs(left[valid][inside] - right[v[inside], u[inside] + beside]).mean())

    assert difference(0) < 0.6 * min(difference(-6), difference(6))
    assert (tmp_path / "pair" / TRUTH_FILE).is_file()

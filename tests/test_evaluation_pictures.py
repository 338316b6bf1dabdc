"""Pictures of a scene: which point is seen, that equal clouds are drawn equal, and that colours mean what they say."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from judged_scenes import box_scene, itself
from PIL import Image

from moe3d_deploy.evaluation import EvaluationScene
from moe3d_deploy.evaluation.clouds import cloud_pictures, predicted_cloud, splat, true_cloud
from moe3d_deploy.evaluation.pictures import ERROR_TOP, cloud_sheet, map_pictures, map_sheet, write_pictures
from moe3d_deploy.runtime.colormaps import palette

RED, GREEN = (255, 0, 0), (0, 255, 0)
TITLES = ("truth, from above", "prediction, from above", "truth, from the side", "prediction, from the side")


def colored(picture: np.ndarray, color: tuple[int, ...]) -> np.ndarray:
    return (picture == np.array(color)).all(axis=-1)


# ---- points


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_nearer_point_hides_the_farther_one_in_any_order(order: tuple[int, int]) -> None:
    near = np.array([2.0, 1.0])[list(order)]
    colors = np.array([RED, GREEN], np.uint8)[list(order)]
    u = np.array([3.0, 4.0])[list(order)]  # squares of 2 x 2 that share a column
    drawing = splat(u, np.array([1.0, 1.0]), near, colors, 4, 8)
    assert np.argwhere(colored(drawing, RED)).tolist() == [[1, 3], [2, 3]]
    assert np.argwhere(colored(drawing, GREEN)).tolist() == [[1, 4], [1, 5], [2, 4], [2, 5]]


def test_points_outside_are_left_out_and_those_at_the_rim_cut() -> None:
    u, v = np.array([-1.5, 7.2, 100.0, -5.0]), np.array([0.0, 3.9, 0.0, -9.0])
    drawing = splat(u, v, np.zeros(4), np.full((4, 3), 255, np.uint8), 4, 8)
    assert np.argwhere(colored(drawing, (255, 255, 255))).tolist() == [[3, 7]]


def test_an_equal_cloud_is_drawn_equal_in_any_scale_and_world() -> None:
    scene = box_scene(views=3)
    turn = np.array([[0, -1, 0], [1, 0, 0], [0, 0, 1]], np.float32)
    prediction = itself(scene, 0.25)
    rotation, translation = prediction["extrinsics"][:, :, :3], prediction["extrinsics"][:, :, 3:]
    # the same cameras in a world that is turned and shifted: X_old = turn X_new + 5
    moved = rotation @ np.full((3, 1), 5, np.float32) + translation
    prediction["extrinsics"] = np.concatenate([rotation @ turn, moved], axis=2)

    pictures = cloud_pictures(scene, prediction, side=96)

    assert tuple(pictures) == TITLES
    np.testing.assert_allclose(predicted_cloud(scene, prediction).points, true_cloud(scene).points, atol=1e-4)
    np.testing.assert_allclose(predicted_cloud(scene, prediction).cameras, true_cloud(scene).cameras, atol=1e-5)
    for true, predicted in (TITLES[:2], TITLES[2:]):
        equal = (pictures[true] == pictures[predicted]).all(axis=-1)
        assert equal.mean() > 0.98  # a point at the rim of a pixel may fall into the next one


def test_an_error_of_depth_is_seen_from_above() -> None:
    scene = box_scene()
    prediction = itself(scene)
    prediction["depth"] = prediction["depth"] * np.linspace(0.8, 1.2, 42)
    pictures = cloud_pictures(scene, prediction, side=96)
    above = [pictures[title] for title in TITLES[:2]]
    assert (above[0] != above[1]).any(axis=-1).mean() > 0.02


def test_from_above_the_first_view_looks_up_the_drawing_and_the_ceiling_is_gone() -> None:
    """A room of one view: a green floor 1 below the camera, a red ceiling 1 above it."""
    height, width, focal = 40, 60, 40.0
    v = np.arange(height)[:, None] - height / 2 + 0.5
    depth = np.broadcast_to(focal * 1.0 / np.abs(v), (height, width)).astype(np.float32)  # planes at y = +1 and -1
    image = np.zeros((3, height, width), np.float32)
    image[0, : height // 2], image[1, height // 2 :] = 1, 1
    k = np.array([[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]], np.float32)
    truth = {"depth": depth[None], "extrinsics": np.eye(3, 4)[None], "intrinsics": k[None]}
    scene = EvaluationScene("room", image[None], truth)

    pictures = cloud_pictures(scene, itself(scene), side=120)

    above, side = pictures[TITLES[0]], pictures[TITLES[2]]
    assert not colored(above, RED).any()
    rows = np.flatnonzero(colored(above, GREEN).any(axis=1))
    camera = np.argwhere((above == (255, 60, 60)).all(axis=-1)).mean(axis=0)
    assert camera[0] > rows.max()  # it stands below what it sees
    near, far = (np.ptp(np.flatnonzero(colored(above, GREEN)[row])) for row in (rows[-1], rows[0]))
    assert far > 3 * near  # its view widens with the distance
    assert colored(side, RED).any()
    assert np.argwhere(colored(side, RED))[:, 0].max() < np.argwhere(colored(side, GREEN))[:, 0].min()


# ---- maps


def test_the_maps_of_a_perfect_prediction() -> None:
    scene = box_scene()
    weights = np.zeros((2, 3, 28, 42), np.float32)
    weights[:, 1] = 1
    rows = map_pictures(scene, {**itself(scene, 7.0), "expert_weights": weights})
    assert len(rows) == 2
    assert list(rows[0]) == [
        "image", "true 1 / depth", "predicted 1 / depth", "error, to 25 %", "strongest expert", "gate entropy",
    ]  # fmt: skip
    for view, row in enumerate(rows):
        known = scene.truth["depth"][view] > 0
        np.testing.assert_array_equal(row["true 1 / depth"][known], row["predicted 1 / depth"][known])
        assert not row["true 1 / depth"][~known].any()
        assert row["error, to 25 %"].max() < 10  # the darkest colour of the map is not quite black
        assert (row["strongest expert"] == palette(3)[1]).all()
        assert len(np.unique(row["gate entropy"].reshape(-1, 3), axis=0)) == 1


def test_the_error_is_relative_and_brightest_at_its_top() -> None:
    scene = box_scene(views=1)
    prediction = itself(scene)
    prediction["depth"][0, 20:, :10] *= 1 + ERROR_TOP / 2
    prediction["depth"][0, 20:, 30:] *= 1 + 2 * ERROR_TOP
    error = map_pictures(scene, prediction)[0]["error, to 25 %"]
    ramp = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_INFERNO)[:, 0, ::-1]
    np.testing.assert_array_equal(error[25, 5], ramp[128])
    np.testing.assert_array_equal(error[25, 35], ramp[255])


def test_a_uniform_gate_has_the_brightest_entropy() -> None:
    scene = box_scene(views=1)
    weights = np.full((1, 4, 28, 42), 0.25, np.float32)
    picture = map_pictures(scene, {**itself(scene), "expert_weights": weights})[0]["gate entropy"]
    ramp = cv2.applyColorMap(np.full((1, 1), 255, np.uint8), cv2.COLORMAP_VIRIDIS)[0, 0, ::-1]
    np.testing.assert_array_equal(picture[0, 0], ramp)


def test_a_model_without_experts_has_no_pictures_of_them() -> None:
    scene = box_scene()
    assert len(map_pictures(scene, itself(scene))[0]) == 4


def test_the_sheets_are_written_as_png(tmp_path: Path) -> None:
    scene = box_scene("7")
    files = write_pictures(scene, itself(scene), tmp_path / "new" / "drawn")
    assert [file.name for file in files] == ["7_maps.png", "7_points.png"]
    for file, draw in zip(files, (map_sheet, cloud_sheet), strict=True):
        with Image.open(file) as image:
            np.testing.assert_array_equal(np.asarray(image), draw(scene, itself(scene)))

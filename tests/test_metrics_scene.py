"""All figures of one scene: perfect, moved, scaled, blurred and turned predictions of a small room."""

from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from moe3d_deploy import metrics
from moe3d_deploy.errors import InputError
from moe3d_deploy.geometry import unproject
from moe3d_deploy.metrics import cloud_errors, flying, scene_quality, umeyama

DEPTH = ["abs_rel", "rmse", "delta1"]
BOUNDARY = ["boundary_f1", "boundary_precision", "boundary_recall", "edge_miou"]
LENGTHS = ["accuracy_mean", "accuracy_median", "completeness_mean", "completeness_median"]
NORMALS = ["normal_consistency_mean", "normal_consistency_median"]
CAMERAS = ["rotation_deg", "translation_deg", "auc30"]

Arrays = dict[str, np.ndarray]


def room(views: int = 3, height: int = 24, width: int = 32) -> Arrays:
    """A wall at z = 6, a floor at y = 1.5 and a ball before them, seen from cameras that move and turn; exact depth."""
    v, u = np.mgrid[:height, :width]
    intrinsics = np.array([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1.0]])
    pixels = np.stack([u, v, np.ones_like(u)], axis=-1) @ np.linalg.inv(intrinsics).T
    centre, radius = np.array([0.1, 0.3, 3.0]), 0.7
    depths, extrinsics = [], []
    for view in range(views):
        # Looking slightly down: on a level floor depths of neighbouring rows have ratios such as 11 / 10, a tie.
        rotation = Rotation.from_euler("yx", [6 * (1 - view), 4], degrees=True).as_matrix()
        position = np.array([0.5 * (1 - view), -0.2 * view, 0.1 * view])
        rays = pixels @ rotation  # in world axes
        with np.errstate(divide="ignore"):
            floor = (1.5 - position[1]) / rays[..., 1]
        depth = np.minimum((6 - position[2]) / rays[..., 2], np.where(floor > 0, floor, np.inf))
        along, square = rays @ (centre - position), np.sum(rays * rays, axis=-1)
        under = along**2 - square * (np.sum((centre - position) ** 2) - radius**2)
        ball = np.where(under > 0, (along - np.sqrt(np.maximum(under, 0))) / square, np.inf)
        depths.append(np.minimum(depth, ball))
        extrinsics.append(np.c_[rotation, -rotation @ position])
    return {
        "depth": np.array(depths, np.float32),
        "extrinsics": np.array(extrinsics, np.float32),
        "intrinsics": np.tile(intrinsics, (views, 1, 1)).astype(np.float32),
    }


def in_another_frame(scene: Arrays, scale: float) -> Arrays:
    """The same scene in another scale, seen from another world."""
    world = np.vstack([np.c_[Rotation.from_euler("xyz", [0.3, -0.5, 1]).as_matrix(), [3, -7, 2]], [0, 0, 0, 1]])
    extrinsics = scene["extrinsics"].astype(float) @ world
    extrinsics[:, :, 3] *= scale
    return scene | {"depth": scale * scene["depth"], "extrinsics": extrinsics}


def smoothed(scene: Arrays, times: int) -> Arrays:
    depth = scene["depth"].astype(float)
    for _ in range(times):
        for axis in (1, 2):
            pad = [(1, 1) if a == axis else (0, 0) for a in range(3)]
            padded = np.pad(depth, pad, mode="edge")
            depth = sum(w * np.take(padded, range(i, i + depth.shape[axis]), axis) for i, w in enumerate((1, 2, 1))) / 4
    return scene | {"depth": depth}


def test_a_perfect_prediction_in_another_scale_and_world_is_perfect() -> None:
    quality = scene_quality(in_another_frame(room(), 0.31), room())
    assert set(quality) == {*DEPTH, *BOUNDARY, "flying", *LENGTHS, *NORMALS, *CAMERAS}
    for name in ("abs_rel", "rmse", "flying", *LENGTHS):
        assert quality[name] == pytest.approx(0, abs=1e-5), name
    for name in ("delta1", *BOUNDARY, *NORMALS, "auc30"):
        assert quality[name] == pytest.approx(1, abs=1e-4), name
    assert quality["rotation_deg"] == pytest.approx(0, abs=1e-3)
    assert quality["translation_deg"] == pytest.approx(0, abs=1e-3)
    assert all(type(value) is float for value in quality.values())


def test_nothing_depends_on_the_scale_of_the_truth() -> None:
    """Lengths are relative to the mean distance of the true points from the first camera."""
    pred = smoothed(room(), 1)
    one, other = scene_quality(pred, room()), scene_quality(pred, in_another_frame(room(), 40.0))
    assert one["accuracy_mean"] > 0.001
    for name, value in one.items():
        assert other[name] == pytest.approx(value, rel=2e-3, abs=1e-3), name


def test_the_unit_of_lengths_is_the_mean_distance_from_the_first_camera() -> None:
    """One view of a wall at depth 4, half of it predicted at 4.4 and half at 3.6: the error is 0.4 everywhere."""
    true = room(1)
    true["depth"] = np.full((1, 24, 32), 4.0)
    u, v = (np.arange(32) - 16) / 32, (np.arange(24) - 12) / 32
    mean = 4 * np.sqrt(1 + u[None] ** 2 + v[:, None] ** 2).mean()
    pred = true | {"depth": np.where(np.arange(24)[None, :, None] % 2, 4.4, 3.6) * np.ones((1, 24, 32))}
    quality = scene_quality(pred, true, points=False)
    assert quality["rmse"] == pytest.approx(0.4 / mean)
    assert quality["abs_rel"] == pytest.approx(0.1)


def test_one_scale_serves_the_whole_scene() -> None:
    """A prediction with another scale in each view is wrong, though each view alone would be perfect."""
    pred = room()
    pred["depth"] = pred["depth"] * np.array([1.0, 1.0, 2.0])[:, None, None]
    quality = scene_quality(pred, room(), points=False)
    assert quality["abs_rel"] > 0.2
    assert quality["boundary_f1"] == pytest.approx(1)


def test_blur_costs_edges_and_leaves_flying_points() -> None:
    scores = [scene_quality(smoothed(room(), times), room()) for times in (0, 1, 3)]
    for worse, better in (("boundary_f1", -1), ("flying", 1), ("abs_rel", 1), ("accuracy_mean", 1)):
        values = [better * score[worse] for score in scores]
        assert values == sorted(values), worse
        assert values[0] < values[2] - 1e-3, worse


def test_a_wrong_camera_shows_in_the_cameras_and_the_cloud_alone() -> None:
    """Camera 2 turned by 20 degrees in its place: 2 of 3 pairs are off by 20 degrees, the third by none.

    AUC: 20 degrees (a touch more or less by rounding) are below 10 or 11 of 30 thresholds, for two of three pairs.
    """
    pred = room()
    turn = Rotation.from_euler("y", 20, degrees=True).as_matrix().astype(np.float32)
    pred["extrinsics"][2] = turn @ pred["extrinsics"][2]
    quality = scene_quality(pred, room())
    assert quality["rotation_deg"] == pytest.approx(40 / 3, abs=1e-3)
    assert (1 + 2 * 10 / 30) / 3 - 1e-9 <= quality["auc30"] <= (1 + 2 * 11 / 30) / 3
    assert quality["accuracy_mean"] > 0.01
    for name, value in scene_quality(room(), room(), points=False).items():
        if name not in CAMERAS:
            assert quality[name] == value, name


def test_the_cloud_is_turned_with_its_normals() -> None:
    """Camera 0 is turned by 40 degrees and sees nothing, so the others' points and normals are turned as a whole."""
    pred, true = room(), room()
    true["depth"][0] = 0
    turn = Rotation.from_euler("x", 40, degrees=True).as_matrix().astype(np.float32)
    pred["extrinsics"][0] = turn @ pred["extrinsics"][0]
    quality = scene_quality(pred, true)
    assert quality["accuracy_mean"] == pytest.approx(0, abs=1e-5)
    assert quality["normal_consistency_mean"] == pytest.approx(1, abs=1e-4)


def test_the_cloud_is_refined_beyond_what_outliers_pull_it_to() -> None:
    """A block of pixels is far off: least squares over all pairs is pulled, trimmed closest points are less so."""
    pred = room()
    pred["depth"][:, :6, :8] *= 1.6
    points, true = (
        unproject(scene["depth"], scene["extrinsics"], scene["intrinsics"]).reshape(-1, 3) for scene in (pred, room())
    )
    unit = np.linalg.norm(true - np.array([0.5, 0, 0]), axis=1).mean()  # camera 0 stands there
    coarse = cloud_errors(umeyama(points, true).apply(points), true)
    assert scene_quality(pred, room())["accuracy_median"] < 0.9 * coarse.accuracy_median / unit


def test_the_gate_is_reported_where_there_are_weights() -> None:
    weights = np.zeros((3, 2, 24, 32), np.float32)
    weights[:, 0] = 0.75
    weights[:, 1] = 0.25
    quality = scene_quality(room() | {"expert_weights": weights}, room(), points=False)
    assert quality["gate_entropy"] == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))
    assert (quality["expert_share_0"], quality["expert_share_1"]) == (1, 0)
    assert "expert_share_2" not in quality


def test_without_points_only_the_clouds_are_missing() -> None:
    whole, part = scene_quality(room(), room()), scene_quality(room(), room(), points=False)
    assert set(whole) - set(part) == {*LENGTHS, *NORMALS}
    assert {name: whole[name] for name in part} == part


def test_what_cannot_be_judged_is_left_out() -> None:
    """One view has no pair of cameras; a plane has no edge; points apart have no normals."""
    one = room(1)
    assert set(CAMERAS).isdisjoint(scene_quality(one, one))
    flat = room() | {"depth": np.full((3, 24, 32), 2.0)}
    quality = scene_quality(flat, flat, points=False)
    assert {"boundary_f1", "boundary_precision", "boundary_recall"}.isdisjoint(quality)
    assert quality["edge_miou"] == 1
    wall = room()
    wall["depth"][1] = 2
    assert scene_quality(wall, wall, points=False)["boundary_f1"] == pytest.approx(1), "the mean of the two others"
    sparse = room()
    keep = np.zeros((24, 32), bool)
    keep[::2, ::2] = True
    sparse["depth"] = sparse["depth"] * keep
    quality = scene_quality(room(), sparse)
    assert set(NORMALS).isdisjoint(quality)
    assert quality["accuracy_mean"] == pytest.approx(0, abs=1e-6)
    still = room()
    still["extrinsics"][:, :, 3] = 0
    still["extrinsics"][:, :, :3] = np.eye(3)
    quality = scene_quality(room(), still, points=False)
    assert "translation_deg" not in quality
    assert quality["rotation_deg"] == pytest.approx((6 + 12 + 6) / 3, abs=1e-3)


def test_pixels_and_views_without_truth_are_left_out() -> None:
    true, pred = room(), room()
    true["depth"][2] = 0
    true["depth"][0, :, :4] = 0
    pred["depth"][2] = np.nan
    pred["depth"][0, :, :4] = np.inf
    quality = scene_quality(pred, true)
    assert quality["abs_rel"] == 0
    assert quality["boundary_f1"] == pytest.approx(1)
    assert quality["accuracy_mean"] == pytest.approx(0, abs=1e-6)


def test_a_model_that_has_learnt_nothing_gets_figures_too() -> None:
    """Constant depth and cameras in one place; then fields of view of 0, which put all points on one line."""
    pred = room()
    pred["depth"] = np.ones_like(pred["depth"])
    pred["extrinsics"] = np.tile(np.eye(3, 4), (3, 1, 1))
    quality = scene_quality(pred, room())
    assert quality["boundary_f1"] == 0
    assert quality["translation_deg"] == 90
    assert quality["completeness_mean"] > 0.05
    pred["depth"] = room()["depth"]
    pred["intrinsics"][:, [0, 1], [0, 1]] = np.inf
    without = scene_quality(pred, room())
    assert set(quality) - set(without) == {*LENGTHS, *NORMALS}


@pytest.mark.parametrize(
    ("pred", "true", "message"),
    [
        ({}, {}, "the prediction has no depth; it holds nothing"),
        (room(), {"depth": room()["depth"], "edges": np.ones(1)}, "the truth has no extrinsics; it holds depth, edges"),
        (
            room() | {"depth": np.ones((24, 32))},
            room() | {"depth": np.ones((24, 32))},
            "predicted depth (24, 32) and true depth (24, 32) do not fit; pass (S, H, W) for both",
        ),
        (
            room() | {"extrinsics": room(2)["extrinsics"]},
            room(),
            "the prediction has 3 views of depth and 2 of extrinsics; pass as many",
        ),
        (
            room() | {"intrinsics": room(2)["intrinsics"]},
            room(),
            "predicted intrinsics have shape (2, 3, 3); pass (3, 3, 3), in pixels",
        ),
        (
            room() | {"depth": np.full((3, 24, 32), np.nan)},
            room(),
            "predicted depth is nan at the first of 2304 unusable pixels (2304 are valid); "
            "check the prediction, or leave these pixels out of `valid`",
        ),
        (
            room(),
            room() | {"depth": np.zeros((3, 24, 32))},
            "none of 2304 pixels is valid; pass a map with true depth at one pixel or more",
        ),
        (
            room() | {"depth": room()["depth"] * np.where(np.arange(32) == 5, -1, 1)},
            room(),
            "predicted depth is -",
        ),
    ],
)
def test_a_scene_that_cannot_be_judged_is_told_in_one_line(pred: Arrays, true: Arrays, message: str) -> None:
    with pytest.raises(InputError) as error:
        scene_quality(pred, true)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_the_python_of_the_metrics_page_runs() -> None:
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    blocks = [part.split("```")[0] for part in page.split("```python\n")[1:]]
    assert blocks
    scope: dict[str, object] = {"prediction": in_another_frame(smoothed(room(), 1), 3.0), "truth": room()}
    for block in blocks:
        exec(compile(block, "docs/metrics.md", "exec"), scope)
    assert 0 < scope["quality"]["abs_rel"] < 0.1  # type: ignore[index]


def test_every_metric_is_named_on_its_page() -> None:
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    names = [name for name in metrics.__all__ if name[0].islower()]
    names += [*DEPTH, *BOUNDARY, "flying", *LENGTHS, *NORMALS, *CAMERAS, "gate_entropy", "expert_share_"]
    assert [name for name in names if f"`{name}" not in page] == []


def test_the_page_states_the_figures_of_the_code() -> None:
    page = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert f"`tolerance` {flying.TOLERANCE}, `radius` {flying.RADIUS}, `edge_ratio` {flying.EDGE_RATIO}" in page

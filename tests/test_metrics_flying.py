"""Flying points: planted ones are counted, sound ones are not."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe3d_deploy.errors import EXTRA_OF, InputError, MissingExtraError
from moe3d_deploy.metrics import flying_point_ratio
from moe3d_deploy.runtime import packages

INTRINSICS = np.array([[40.0, 0, 12], [0, 40, 9], [0, 0, 1]])


def step() -> np.ndarray:
    """A board at depth 2 in the left half, a wall at depth 4 in the right one; 18x24."""
    return np.where(np.arange(24) < 12, 2.0, 4.0)[None].repeat(18, axis=0)


def test_planted_points_are_counted_exactly() -> None:
    """At depth 3, five of them near the edge: 1 from the board and from the wall, which is more than a tenth of 3."""
    pred = step()
    pred[4, 10:13] = 3
    pred[9, 12:14] = 3
    assert flying_point_ratio(pred, step(), INTRINSICS) == pytest.approx(5 / (18 * 24))


def test_true_depth_has_none() -> None:
    assert flying_point_ratio(step(), step(), INTRINSICS) == 0


@pytest.mark.parametrize(
    ("depth", "column"),
    [
        (3.0, 3),  # far from the edge
        (3.0, 20),
        (2.0, 12),  # the board one pixel too wide
        (4.0, 11),  # too narrow
        (2.15, 11),  # within a tenth of its depth of the board
        (3.8, 12),  # of the wall
        (1.7, 11),  # in front of the board
        (4.6, 12),  # behind the wall
    ],
)
def test_a_point_that_is_wrong_in_another_way_does_not_fly(depth: float, column: int) -> None:
    pred = step()
    pred[:, column] = depth
    assert flying_point_ratio(pred, step(), INTRINSICS) == 0


def test_the_tolerance_is_a_share_of_the_points_own_depth() -> None:
    """3.7 is 0.3 in front of the wall, 8.1 % of 3.7; nothing else is as near."""
    pred = step()
    pred[8, 12] = 3.7
    assert flying_point_ratio(pred, step(), INTRINSICS, tolerance=0.0815) == 0
    assert flying_point_ratio(pred, step(), INTRINSICS, tolerance=0.0805) == pytest.approx(1 / (18 * 24))


def test_the_window_reaches_as_many_pixels_as_asked_for() -> None:
    """The board ends at column 11."""
    pred = step()
    pred[8, 14] = 3
    assert flying_point_ratio(pred, step(), INTRINSICS, radius=2) == 0
    assert flying_point_ratio(pred, step(), INTRINSICS, radius=3) > 0
    pred = step()
    pred[8, 15] = 3
    assert flying_point_ratio(pred, step(), INTRINSICS, radius=3) == 0
    assert flying_point_ratio(pred, step(), INTRINSICS, radius=4) > 0


def test_a_slope_is_no_edge() -> None:
    """Neighbours differ by 5 %, the window by 34 %: whatever lies between them lies between points of one surface."""
    true = (2 * 1.05 ** np.arange(24.0))[None].repeat(18, axis=0)
    pred = true * 1.12
    assert flying_point_ratio(pred, true, INTRINSICS, tolerance=0.02) == 0
    assert flying_point_ratio(pred, true, INTRINSICS, tolerance=0.02, edge_ratio=1.04) > 0.3
    true[0, 0] = 1.5
    assert flying_point_ratio(pred, true, INTRINSICS, tolerance=0.02) <= 4 * 4 / (18 * 24), "near that edge at most"
    two_true, two_pred = np.stack([step(), true]), np.stack([step(), pred])
    k, poses = np.stack([INTRINSICS] * 2), np.stack([np.eye(3, 4)] * 2)
    poses[0, 0, 3] = 100
    ratio = flying_point_ratio(two_pred, two_true, k, poses, tolerance=0.02)
    assert ratio <= 4 * 4 / (2 * 18 * 24), "an edge of one view is none of another"


def test_a_surface_that_only_another_view_sees_holds_the_point() -> None:
    pred = np.stack([step(), step()])
    pred[0, 5, 12] = 3
    k = np.stack([INTRINSICS] * 2)
    poses = np.stack([np.eye(3, 4)] * 2)
    assert flying_point_ratio(pred, np.stack([step()] * 2), k, poses) == pytest.approx(1 / (2 * 18 * 24))
    seen = np.stack([step(), np.full((18, 24), 3.0)])
    assert flying_point_ratio(np.stack([pred[0], seen[1]]), seen, k, poses) == 0
    aside = poses.copy()
    aside[1, 0, 3] = 5  # that surface now lies 5 to the left
    assert flying_point_ratio(np.stack([pred[0], seen[1]]), seen, k, aside) == pytest.approx(1 / (2 * 18 * 24))


def test_pixels_without_truth_are_no_background_and_are_not_counted() -> None:
    true = step()
    true[:, 12:] = 0
    pred = step()
    pred[:, 11:] = 3
    assert flying_point_ratio(pred, true, INTRINSICS) == 0
    true = step()
    true[:9] = 0
    pred = step()
    pred[:, 12] = 3
    assert flying_point_ratio(pred, true, INTRINSICS) == pytest.approx(9 / (9 * 24))


def test_a_wider_ramp_across_the_edge_has_more() -> None:
    ratios = []
    for width in (1, 3, 5, 7):
        pred = step()
        left = 12 - width // 2
        pred[:, left : left + width] = np.linspace(2, 4, width + 2)[1:-1]
        ratios.append(flying_point_ratio(pred, step(), INTRINSICS))
    assert all(a < b for a, b in zip(ratios, ratios[1:], strict=False))


def reference(pred, true, intrinsics, extrinsics, tolerance, radius, edge_ratio) -> float:  # type: ignore[no-untyped-def]
    """The definition, pixel by pixel, with the inverse of whole matrices."""
    views, height, width = true.shape

    def point(s: int, y: int, x: int, depth: float) -> np.ndarray:
        camera = depth * np.linalg.inv(intrinsics[s]) @ [x, y, 1]
        return (np.linalg.inv(np.vstack([extrinsics[s], [0, 0, 0, 1]])) @ [*camera, 1])[:3]

    pixels = [tuple(map(int, index)) for index in np.argwhere(true > 0)]
    surface = np.array([point(*index, true[index]) for index in pixels])
    flying = 0
    for s, y, x in pixels:
        window = [
            (j, i)
            for j in range(max(y - radius, 0), min(y + radius + 1, height))
            for i in range(max(x - radius, 0), min(x + radius + 1, width))
            if true[s, j, i] > 0
        ]
        at_edge = False
        for j, i in window:
            for b, a in ((j, i + 1), (j, i - 1), (j + 1, i), (j - 1, i)):
                if 0 <= b < height and 0 <= a < width and true[s, b, a] > 0:
                    at_edge |= true[s, b, a] > edge_ratio * true[s, j, i]
        depths = [true[s, j, i] for j, i in window]
        p = pred[s, y, x]
        if at_edge and min(depths) < p < max(depths):
            flying += np.linalg.norm(surface - point(s, y, x, p), axis=1).min() > tolerance * p
    return flying / len(pixels)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), radius=st.integers(1, 3), scale=st.floats(1e-2, 1e2))
def test_against_a_pixel_by_pixel_reference_at_any_scale_and_in_any_world(seed: int, radius: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    true = rng.choice([1.0, 1.05, 1.6, 2.5], (2, 7, 8)) * (rng.random((2, 7, 8)) < 0.9)
    true[0, 0, 0] = 1
    pred = np.where(rng.random(true.shape) < 0.5, rng.uniform(0.8, 3, true.shape), np.maximum(true, 1))
    k = np.stack([[[f, 0, 4], [0, f, 3.5], [0, 0, 1]] for f in (9.0, 12.0)])
    poses = np.stack([camera(rng) for _ in range(2)])
    expected = reference(pred, true, k, poses, 0.08, radius, 1.1)
    arguments = {"tolerance": 0.08, "radius": radius, "edge_ratio": 1.1}
    assert flying_point_ratio(pred, true, k, poses, **arguments) == pytest.approx(expected)
    world = np.vstack([camera(rng), [0, 0, 0, 1]])
    world[:3, 3] += 1e7  # float32 points would be off by 1 there
    moved = poses.copy()
    moved[:, :, 3] *= scale
    assert flying_point_ratio(scale * pred, scale * true, k, moved @ world, **arguments) == pytest.approx(expected)


def camera(rng: np.random.Generator) -> np.ndarray:
    """A camera near the origin, turned by some degrees about a random axis (Rodrigues)."""
    x, y, z = axis = rng.normal(size=3)
    angle = 0.2 * rng.random()
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]) / math.sqrt(axis @ axis)
    rotation = np.eye(3) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross
    return np.concatenate([rotation, 0.3 * rng.normal(size=(3, 1))], axis=1)


def test_scipy_missing_is_one_line_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(packages.importlib, "import_module", missing)
    with pytest.raises(MissingExtraError) as error:
        flying_point_ratio(step() * 1.01, step(), INTRINSICS)
    assert str(error.value) == f"scipy is not installed: pip install 'moe3d-deploy[{EXTRA_OF['scipy']}]'"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"tolerance": 0.0},
            "tolerance 0.0, radius 3 and edge ratio 1.1 define no flying point; "
            "pass a tolerance above 0, a radius of 1 pixel or more and a ratio of 1 or more",
        ),
        ({"radius": 0}, "tolerance 0.1, radius 0 and edge ratio 1.1 define no flying point; .*"),
        ({"edge_ratio": np.nan}, "tolerance 0.1, radius 3 and edge ratio nan define no flying point; .*"),
        ({"pred_depth": -step()}, "predicted depth is -2 at the first of 432 unusable pixels .*"),
        (
            {"pred_depth": np.ones((1, 2, 2, 2)), "true_depth": np.ones((1, 2, 2, 2))},
            r"depth has shape \(1, 2, 2, 2\); .*",
        ),
        (
            {"pred_depth": step()[None].repeat(2, 0), "true_depth": step()[None].repeat(2, 0)},
            r"2 views need extrinsics \(2, 3, 4\); only one view can do without",
        ),
        ({"extrinsics": np.zeros((3, 4))}, r"true extrinsics of view 0 hold no rotation; pass \[R | t\] with .*"),
        ({"extrinsics": np.eye(3)}, r"true extrinsics have shape \(1, 3, 3\); pass \(S, 3, 4\), camera from world"),
        ({"intrinsics": np.eye(2)}, r"true intrinsics have shape \(1, 2, 2\); pass \(1, 3, 3\), in pixels"),
        ({"intrinsics": -INTRINSICS}, "true intrinsics hold NaN or a focal length that is not above 0; .*"),
    ],
)
def test_bad_input_is_told_in_one_line(arguments: dict[str, np.ndarray], message: str) -> None:
    given_ = {"pred_depth": step(), "true_depth": step(), "intrinsics": INTRINSICS} | arguments
    with pytest.raises(InputError, match=f"^{message}$"):
        flying_point_ratio(**given_)  # type: ignore[arg-type]


def test_views_and_cameras_that_differ_in_number_are_told() -> None:
    maps = step()[None].repeat(2, 0)
    with pytest.raises(InputError) as error:
        flying_point_ratio(maps, maps, INTRINSICS[None].repeat(2, 0), np.eye(3, 4)[None].repeat(3, 0))
    assert str(error.value) == "there are 2 views and extrinsics of 3; pass one for each view"

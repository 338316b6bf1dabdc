"""Depth, normals and shadows of the ray caster, against closed forms and a reference in float64.

The reference knows each shape as a set of polynomials that are not positive inside of it, and takes the least root of
any of them at which all hold: another way than the planes and intervals of inverse depth of the caster.
"""

import math

import numpy as np
import pytest
import torch

from moe3d_deploy.training.scenes import SceneOptions
from moe3d_deploy.training.scenes.cast import Projection, Tiles, first_hits
from moe3d_deploy.training.scenes.kinds import upright
from moe3d_deploy.training.scenes.shade import Light, direct_light, surface, view_rays
from moe3d_deploy.training.scenes.solids import Shape, Solid, Solids, pack, rotation
from moe3d_deploy.training.scenes.world import describe

CPU = torch.device("cpu")
SIZE = (42, 56)
_SIDES = [lambda x, y, z: x - 1, lambda x, y, z: -x - 1, lambda x, y, z: y - 1, lambda x, y, z: -y - 1]
_ENDS = [lambda x, y, z: z - 1, lambda x, y, z: -z - 1]
_ROOF = [lambda x, y, z: 2 * x + z - 1, lambda x, y, z: -2 * x + z - 1]


def inside(shape: int, taper: float) -> list:
    """Polynomials of at most degree 2 in the unit frame, none positive inside."""
    return {
        Shape.ROOM: _SIDES + _ENDS,
        Shape.BOX: _SIDES + _ENDS,
        Shape.WEDGE: [*_SIDES, *_ENDS, lambda x, y, z: z - x],
        Shape.GABLE: [*_ENDS, *_ROOF, _SIDES[2], _SIDES[3]],
        Shape.PYRAMID: [*_ENDS, *_ROOF, lambda x, y, z: 2 * y + z - 1, lambda x, y, z: -2 * y + z - 1],
        Shape.ELLIPSOID: [lambda x, y, z: x * x + y * y + z * z - 1],
        Shape.FRUSTUM: [*_ENDS, lambda x, y, z: x * x + y * y - (1 + (taper - 1) * (z + 1) / 2) ** 2],
        Shape.LEAF: [lambda x, y, z: z, lambda x, y, z: -z, lambda x, y, z: x * x + y * y - 1],
    }[Shape(shape)]


def reference_hit(solids: Solids, number: int, origin: np.ndarray, rays: np.ndarray) -> np.ndarray:
    """Ray parameter of the first hit beyond 0, inf without one: origin (3,) or (R, 3), rays (R, 3) -> (R,)."""
    to_unit = solids.axes[number].T / solids.half[number][:, None]
    o = np.broadcast_to((origin - solids.centre[number]) @ to_unit.T, rays.shape)
    d = rays @ to_unit.T
    tests = inside(solids.shape[number], solids.taper[number])
    best = np.full(len(rays), np.inf)
    for polynomial in tests:
        zero, plus, minus = (polynomial(*(o + t * d).T) for t in (0.0, 1.0, -1.0))
        a, b, c = (plus + minus) / 2 - zero, (plus - minus) / 2, zero
        with np.errstate(all="ignore"):
            quadratic = np.abs(a) > 1e-12 * (np.abs(b) + np.abs(c))
            root = np.sqrt(b * b - 4 * a * c)
            for t in np.where(quadratic, [(-b - root) / (2 * a), (-b + root) / (2 * a)], [-c / b] * 2):
                q = (o + t[:, None] * d).T
                holds = (np.array([other(*q) for other in tests]) < 1e-7).all(axis=0) & (t > 1e-9)
                best = np.where(holds & (t < best), t, best)
    return best


def camera(
    position: tuple[float, float, float], target: tuple[float, float, float], tangent: float = 0.6
) -> Projection:
    """A camera whose pixels are SIZE, looking at a target."""
    height, width = SIZE
    eye = np.array(position)
    frame = upright(np.array(target) - eye)  # any roll
    focal = width / 2 / tangent
    inverse = np.array([[1 / focal, 0, -width / 2 / focal], [0, 1 / focal, -height / 2 / focal], [0, 0, 1]])
    return Projection(eye[None], (frame @ inverse)[None])


def cast(solids: Solids, eye: Projection) -> tuple[np.ndarray, np.ndarray]:
    """Depth, inf for none, and solid: (H, W)."""
    tiles = Tiles(1, *SIZE)
    hits = first_hits(solids, eye, tiles, CPU)
    with np.errstate(divide="ignore"):
        return 1 / tiles.image(hits.inverse_depth)[0].numpy(), tiles.image(hits.solid)[0].numpy()


def reference(solids: Solids, eye: Projection) -> np.ndarray:
    """Depths (N, H, W) of every solid alone, inf for none."""
    v, u = np.mgrid[: SIZE[0], : SIZE[1]]
    rays = (eye.rays[0] @ np.stack([u, v, np.ones_like(u)]).reshape(3, -1)).T
    return np.stack([reference_hit(solids, n, eye.origin[0], rays) for n in range(len(solids))]).reshape(-1, *SIZE)


def turned() -> np.ndarray:
    return rotation(2, 0.7) @ rotation(0, 0.4) @ rotation(1, -0.3)


def one(shape: Shape, taper: float = 1.0, axes: np.ndarray | None = None) -> Solids:
    half = np.array([0.8, 0.5, 0.6])
    return pack([Solid(shape, np.array([0.1, -0.2, 0.3]), half, turned() if axes is None else axes, 0, taper)])


POSITIONS = [(3.0, 0.4, 0.5), (-1.2, 2.5, -1.0), (0.2, -0.3, 3.1), (0.1, 0.2, -2.8), (1.4, -1.3, 1.5)]


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(
    ("shape", "taper"),
    [(shape, 1.0) for shape in Shape if shape != Shape.ROOM] + [(Shape.FRUSTUM, t) for t in (0.0, 0.4, 1.6)],
)
def test_depth_of_every_shape_is_that_of_the_reference(shape: Shape, taper: float, position: tuple) -> None:
    solids, eye = one(shape, taper), camera(position, (0.1, -0.2, 0.3))
    depth, solid = cast(solids, eye)
    expected = reference(solids, eye)[0]
    both = np.isfinite(expected) & (solid == 0)
    assert both.sum() > (5 if shape == Shape.LEAF else 150)  # one camera sees the leaf nearly edge on
    assert (np.isfinite(expected) != (solid == 0)).sum() <= 1  # a ray that grazes an edge
    np.testing.assert_allclose(depth[both], expected[both], rtol=2e-5)


def test_an_eye_beyond_the_tip_of_a_cone_sees_no_second_cone() -> None:
    solids = one(Shape.FRUSTUM, 0.0, np.eye(3))
    for height in (1.2, 2.5, 6.0):  # the tip is at 0.9; the mirrored cone would surround the eye
        eye = camera((0.15, -0.2, height), (0.1, -0.2, 0.3))
        depth, solid = cast(solids, eye)
        expected = reference(solids, eye)[0]
        assert (np.isfinite(expected) == (solid == 0)).all()
        np.testing.assert_allclose(depth[solid == 0], expected[solid == 0], rtol=2e-5)


def test_closed_forms_in_the_middle_of_the_picture() -> None:
    """From (5, 0, 0) towards the origin: a ball of radius 1, a box of half size 0.7, a cylinder of radius 0.4."""
    eye = camera((5.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    middle = SIZE[0] // 2, SIZE[1] // 2  # the principal point is a pixel's centre
    for shape, half, expected in (
        (Shape.ELLIPSOID, (1.0, 1.0, 1.0), 4.0),
        (Shape.BOX, (0.7, 0.7, 0.7), 4.3),
        (Shape.FRUSTUM, (0.4, 0.4, 2.0), 4.6),
    ):
        depth, _ = cast(pack([Solid(shape, np.zeros(3), np.array(half), np.eye(3), 0)]), eye)
        assert depth[middle] == pytest.approx(expected, rel=1e-6)


def test_a_ball_is_as_wide_as_its_tangent_cone() -> None:
    """A ball of radius 1 at distance 5 ends at the angle asin(1/5); along the middle row that is f tan(asin(1/5))."""
    eye = camera((5.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    _, solid = cast(pack([Solid(Shape.ELLIPSOID, np.zeros(3), np.ones(3), np.eye(3), 0)]), eye)
    focal = SIZE[1] / 2 / 0.6
    reach = math.floor(focal * math.tan(math.asin(1 / 5)))
    row = np.flatnonzero(solid[SIZE[0] // 2] == 0) - SIZE[1] // 2
    assert (row.min(), row.max()) == (-reach, reach)


@pytest.mark.parametrize("split", ["train", "test-kinds"])
def test_first_hits_of_whole_scenes_are_those_of_the_reference(split: str) -> None:
    options = SceneOptions(*SIZE, views=2, split=split)
    for seed in range(3):
        world = describe(seed, options)
        cameras = world.cameras.projection(*SIZE)
        for view in range(2):
            eye = Projection(cameras.origin[view : view + 1], cameras.rays[view : view + 1])
            depth, solid = cast(world.solids, eye)
            every = reference(world.solids, eye)
            expected = every.min(axis=0)
            # Of pixels whose ray grazes an edge, float32 may choose the other side.
            grazes = ~np.isclose(depth, expected, rtol=1e-3)
            assert grazes.mean() < 2e-3
            ok = np.isfinite(expected) & ~grazes
            np.testing.assert_allclose(depth[ok], expected[ok], rtol=2e-4)
            chosen = np.take_along_axis(every, np.maximum(solid, 0)[None], axis=0)[0]
            np.testing.assert_allclose(chosen[ok], expected[ok], rtol=1e-3)


def normals_of(solids: Solids, eye: Projection) -> tuple[np.ndarray, np.ndarray]:
    """Points and normals (P, 3) of the pixels that hit something."""
    tiles = Tiles(1, *SIZE)
    hits = first_hits(solids, eye, tiles, CPU)
    at = surface(solids, eye, tiles, hits, view_rays(eye, tiles, CPU))
    hit = (hits.solid >= 0).view(-1).numpy()
    return at.point.numpy().T[hit].astype(np.float64), at.normal.numpy().T[hit]


def test_normals_of_a_ball_point_from_its_centre() -> None:
    centre = np.array([0.1, -0.2, 0.3])
    solids = pack([Solid(Shape.ELLIPSOID, centre, np.full(3, 0.9), turned(), 0)])
    points, normals = normals_of(solids, camera((3.0, 0.4, 0.5), (0.1, -0.2, 0.3)))
    expected = (points - centre) / 0.9
    np.testing.assert_allclose(normals, expected, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize(
    ("shape", "taper"),
    [(shape, 1.0) for shape in Shape if shape not in (Shape.ROOM, Shape.LEAF)]
    + [(Shape.FRUSTUM, t) for t in (0.0, 0.4, 1.6)],
)
def test_normals_are_gradients_of_what_is_zero_at_the_surface(shape: Shape, taper: float, position: tuple) -> None:
    solids = one(shape, taper)
    points, normals = normals_of(solids, camera(position, (0.1, -0.2, 0.3)))
    to_unit = solids.axes[0].T / solids.half[0][:, None]
    tests, step = inside(shape, taper), 1e-4

    def values(moved: np.ndarray) -> np.ndarray:
        return np.array([polynomial(*(to_unit @ (moved - solids.centre[0]).T)) for polynomial in tests])

    gradients = np.stack([values(points + step * e) - values(points - step * e) for e in np.eye(3)], axis=-1)
    size = np.linalg.norm(gradients, axis=-1)
    distance = np.abs(values(points)) / (size / (2 * step))  # to each boundary, to first order
    order = np.sort(distance, axis=0)
    clear = order[1] > 0.01 if len(tests) > 1 else np.ones(len(points), bool)  # not at an edge between two
    which = distance.argmin(axis=0)[None, :, None]
    expected = np.take_along_axis(gradients / size[..., None], which, axis=0)[0]
    assert clear.sum() > 100
    np.testing.assert_allclose(normals[clear], expected[clear], atol=2e-3)


def shadow_of(solids: Solids, light: Light, eye: Projection) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Direct light (P,), points (P, 3) and whether they face the light (P,), of pixels that hit something."""
    tiles = Tiles(len(eye.origin), *SIZE)
    hits = first_hits(solids, eye, tiles, CPU)
    at = surface(solids, eye, tiles, hits, view_rays(eye, tiles, CPU))
    hit = hits.solid.view(-1) >= 0
    strength = direct_light(solids, light, at, hit).numpy()[hit.numpy()]
    points = at.point.numpy().T[hit.numpy()].astype(np.float64)
    facing = ((light.position - points) * at.normal.numpy().T[hit.numpy()]).sum(axis=1) > 1e-3
    return strength, points, facing


def test_the_shadow_of_a_ball_on_the_ground_is_a_disc() -> None:
    """Light 4 above the ground, a ball of radius 0.5 with its middle at 2: sin(a) = 0.5 / 2, radius 4 tan(a)."""
    ground = Solid(Shape.LEAF, np.zeros(3), np.array([9.0, 9.0, 1.0]), np.eye(3), 0, casts_shadow=False)
    ball = Solid(Shape.ELLIPSOID, np.array([0.3, 0.2, 2.0]), np.full(3, 0.5), np.eye(3), 0)
    light = Light(np.array([0.3, 0.2, 4.0]), np.array([0.3, 0.2, 0.0]), np.ones(3), 4.0)
    strength, points, _ = shadow_of(pack([ground, ball]), light, camera((4.0, 0.0, 1.0), (0.3, 0.2, 0.3), 0.9))
    floor = points[:, 2] < 1e-4
    distance = np.linalg.norm(points[floor, :2] - [0.3, 0.2], axis=1)
    radius = 4 * math.tan(math.asin(0.25))
    assert (distance < radius - 0.01).sum() > 50
    np.testing.assert_array_equal(strength[floor] > 0, distance > radius)


@pytest.mark.parametrize("split", ["train", "test-kinds"])
def test_shadows_lie_where_a_solid_stands_between_point_and_light(split: str) -> None:
    shadowed_pixels = lit_pixels = 0
    for seed in range(5):
        world = describe(seed, SceneOptions(*SIZE, views=1, split=split))
        light = world.lighting.lights[0]
        strength, points, facing = shadow_of(world.solids, light, world.cameras.projection(*SIZE))
        points, strength = points[facing], strength[facing]
        rays = light.position - points
        length = np.linalg.norm(rays, axis=1)
        blocked = np.zeros(len(points), bool)
        for number in np.flatnonzero(world.solids.casts_shadow):
            start = points + rays * (0.01 / length)[:, None]  # the caster's bias
            blocked |= reference_hit(world.solids, number, start, rays) < 1
        dark = strength == 0
        assert (dark != blocked).mean() < 0.01  # the outlines of shadows, and contacts within the bias
        shadowed_pixels += int((dark & blocked).sum())
        lit_pixels += int((~dark & ~blocked).sum())
    assert min(shadowed_pixels, lit_pixels) > 100

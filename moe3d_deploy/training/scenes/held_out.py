"""Kinds of objects of the split "test-kinds" alone: round and pointed ones, and ones composed in other ways."""

import numpy as np

from moe3d_deploy.training.scenes.kinds import Kind, Rng, rod, solid
from moe3d_deploy.training.scenes.materials import Palette
from moe3d_deploy.training.scenes.solids import Shape, Solid, rotation


def _cone(rng: Rng, palette: Palette, size: float) -> list[Solid]:
    """A cone, or one whose tip is cut off; some upside down."""
    r, h = size / 2 * rng.uniform(0.35, 0.9), size / 2 * rng.uniform(0.6, 1.3)
    taper = 0.0 if rng.random() < 0.6 else rng.uniform(0.2, 0.7)
    axes = rotation(0, np.pi) if taper and rng.random() < 0.4 else np.eye(3)
    return [solid(Shape.FRUSTUM, (0, 0, h), (r, r, h), palette.thing(size), axes=axes, taper=taper)]


def _ellipsoid(rng: Rng, palette: Palette, size: float) -> list[Solid]:
    """Three different axes, tilted."""
    half = size / 2 * rng.uniform(0.3, 1.1, 3)
    axes = rotation(0, rng.uniform(-0.7, 0.7)) @ rotation(1, rng.uniform(-0.7, 0.7))
    height = float(np.linalg.norm(axes[2] * half))
    return [Solid(Shape.ELLIPSOID, np.array([0, 0, height]), half, axes, palette.thing(size))]


def _capsule(rng: Rng, palette: Palette, size: float) -> list[Solid]:
    r, h, material = size * rng.uniform(0.12, 0.28), size * rng.uniform(0.25, 0.6), palette.thing(size)
    along = np.array([0.0, np.sin(lean := rng.uniform(0, 1.5)), np.cos(lean)])
    low, high = np.array([0.0, 0.0, r]), np.array([0.0, 0.0, r]) + 2 * h * along
    ends = [Solid(Shape.ELLIPSOID, end, np.full(3, r), np.eye(3), material) for end in (low, high)]
    return [rod(low, high, r, material), *ends]


def _pyramid(rng: Rng, palette: Palette, size: float) -> list[Solid]:
    x, y, z = size / 2 * rng.uniform(0.5, 1.0, 3)
    return [solid(Shape.PYRAMID, (0, 0, z), (x, y, z), palette.thing(size))]


def _ramp(rng: Rng, palette: Palette, size: float) -> list[Solid]:
    x, y, z = size / 2 * rng.uniform(0.4, 1.0, 3)
    return [solid(Shape.WEDGE, (0, 0, z), (x, y, z), palette.thing(size))]


def _house(rng: Rng, palette: Palette, size: float) -> list[Solid]:
    """A body with a gabled roof that stands out."""
    x, y, z = size / 2 * rng.uniform(0.4, 0.8, 3)
    roof = z * rng.uniform(0.4, 0.9)
    return [
        solid(Shape.BOX, (0, 0, z), (x, y, z), palette.thing(size)),
        solid(Shape.GABLE, (0, 0, 2 * z + roof), (1.15 * x, 1.1 * y, roof), palette.thing(size)),
    ]


def _stairs(rng: Rng, palette: Palette, size: float) -> list[Solid]:
    steps, material = int(rng.integers(3, 8)), palette.thing(size)
    x, y, z = size / 2, size / 2 * rng.uniform(0.4, 0.9), size / 2 * rng.uniform(0.5, 0.9)
    deep = x / steps
    return [
        solid(Shape.BOX, ((2 * i + 1) * deep - x, 0, (i + 1) * z / steps), (deep, y, (i + 1) * z / steps), material)
        for i in range(steps)
    ]


def _arch(rng: Rng, palette: Palette, size: float) -> list[Solid]:
    """Two piers and a half circle of stones."""
    radius, pier = size * rng.uniform(0.28, 0.42), size * rng.uniform(0.25, 0.6)
    thick, deep = size * rng.uniform(0.05, 0.09), size * rng.uniform(0.07, 0.15)
    material, stones = palette.thing(size), 9
    parts = [solid(Shape.BOX, (a * radius, 0, pier / 2), (thick, deep, pier / 2), material) for a in (-1, 1)]
    long = radius * np.tan(np.pi / stones / 2) * 1.25
    for angle in (np.arange(stones) + 0.5) * np.pi / stones:
        place = (radius * np.cos(angle), 0.0, pier + radius * np.sin(angle))
        parts.append(solid(Shape.BOX, place, (thick, deep, long), material, axes=rotation(1, -angle)))
    return parts


def _chair(rng: Rng, palette: Palette, size: float) -> list[Solid]:
    """Four legs, a seat and a back of slats."""
    x, y, seat = 0.24 * size, 0.24 * size, 0.45 * size * rng.uniform(0.8, 1.1)
    leg, material = 0.02 * size * rng.uniform(0.7, 1.6), palette.thing(size, dull=0.6)
    back = seat * rng.uniform(0.8, 1.2)
    parts = [
        solid(Shape.BOX, (a * (x - leg), b * (y - leg), seat / 2), (leg, leg, seat / 2), material)
        for a in (-1, 1)
        for b in (-1, 1)
    ]
    parts.append(solid(Shape.BOX, (0, 0, seat + leg), (x, y, leg), palette.thing(size)))
    for at in np.linspace(-1, 1, int(rng.integers(2, 6))):
        parts.append(solid(Shape.BOX, (at * (x - leg), y - leg, seat + back / 2), (leg, leg / 2, back / 2), material))
    return [*parts, solid(Shape.BOX, (0, y - leg, seat + back), (x, leg, 2 * leg), material)]


def _vase(rng: Rng, palette: Palette, size: float) -> list[Solid]:
    """Three cut cones on top of each other."""
    r, material, parts, base = size * rng.uniform(0.12, 0.25), palette.thing(size / 2), [], 0.0
    for _ in range(3):
        h, taper = size * rng.uniform(0.1, 0.22), rng.uniform(0.55, 1.7)
        parts.append(solid(Shape.FRUSTUM, (0, 0, base + h), (r, r, h), material, taper=taper))
        base, r = base + 2 * h, r * taper
    return parts


def _umbrella(rng: Rng, palette: Palette, size: float) -> list[Solid]:
    """A wide flat cone on a thin pole."""
    r, pole, roof = size * rng.uniform(0.3, 0.5), size * rng.uniform(0.7, 1.0), size * rng.uniform(0.08, 0.15)
    return [
        solid(Shape.FRUSTUM, (0, 0, pole / 2), (0.015 * size, 0.015 * size, pole / 2), palette.thing(size, dull=1)),
        solid(Shape.FRUSTUM, (0, 0, pole + roof), (r, r, roof), palette.thing(size), taper=0.0),
    ]


HELD_OUT: dict[str, Kind] = {
    "cone": Kind(_cone, weight=2, small=True),
    "ellipsoid": Kind(_ellipsoid, weight=2, small=True),
    "capsule": Kind(_capsule, weight=1.5, small=True),
    "pyramid": Kind(_pyramid, weight=1.5, small=True),
    "ramp": Kind(_ramp, weight=1.5, small=True),
    "house": Kind(_house, sizes=(0.6, 1.8), weight=1.5),
    "stairs": Kind(_stairs, sizes=(0.8, 1.8), weight=1.5),
    "arch": Kind(_arch, sizes=(1.0, 2.0), weight=1.5),
    "chair": Kind(_chair, sizes=(0.7, 1.3), weight=2),
    "vase": Kind(_vase, sizes=(0.5, 1.2), weight=1.5, small=True),
    "umbrella": Kind(_umbrella, sizes=(1.0, 2.0), weight=1),
}

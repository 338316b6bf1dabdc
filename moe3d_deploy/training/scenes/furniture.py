"""Composed objects of the training split: thin structures, foliage, tables and shelves."""

import numpy as np

from moe3d_deploy.training.scenes.kinds import Kind, Rng, frames, rod, solid, upright
from moe3d_deploy.training.scenes.materials import Palette
from moe3d_deploy.training.scenes.objects import box, cylinder, sphere
from moe3d_deploy.training.scenes.solids import Array, Shape, Solid, moved, rotation

_UP = np.array([0.0, 0.0, 1.0])


def _poles(rng: Rng, palette: Palette, size: float) -> list[Solid]:
    """One to four thin poles, upright or leaning."""
    parts = []
    for _ in range(rng.integers(1, 5)):
        foot = np.array([*rng.uniform(-0.2, 0.2, 2) * size, 0])
        lean = rng.normal(0, 0.02 if rng.random() < 0.6 else 0.25, 2)
        radius = np.exp(rng.uniform(np.log(0.008), np.log(0.045)))
        top = foot + size * rng.uniform(0.6, 1.0) * np.array([*lean, 1])
        parts.append(rod(foot, top, radius, palette.thing(size / 3, dull=0.6)))
    return parts


def _fence(rng: Rng, palette: Palette, size: float) -> list[Solid]:
    """Rails with posts, or with slats."""
    material, length, height = palette.thing(size, dull=0.7), size, size * rng.uniform(0.3, 0.6)
    count = int(rng.integers(4, 16))
    thin, deep = rng.uniform(0.008, 0.35 / count) * size, rng.uniform(0.008, 0.02) * size
    round_posts = rng.random() < 0.4
    parts = []
    for x in np.linspace(-length / 2, length / 2, count):
        shape, half = (Shape.FRUSTUM, (deep, deep)) if round_posts else (Shape.BOX, (thin, deep))
        parts.append(solid(shape, (x, 0, height / 2), (*half, height / 2), material))
    rail = rng.uniform(0.01, 0.03) * size
    for z in np.linspace(0.25, 0.85, int(rng.integers(2, 4))) * height:
        parts.append(solid(Shape.BOX, (0, 1.5 * deep, z), (length / 2, deep / 2, rail), material))
    return parts


def _leaves(rng: Rng, palette: Palette, centre: Array, spread: Array, count: int, length: float) -> list[Solid]:
    """Elliptic leaves around a centre (3,), their normals mostly upwards and outwards."""
    greens = [palette.leaf(length) for _ in range(3)]
    outwards = rng.normal(0, 1, (count, 3))
    outwards /= np.linalg.norm(outwards, axis=1, keepdims=True)
    places = centre + spread * outwards * rng.uniform(0.3, 1.0, (count, 1))
    axes = frames(outwards + 0.7 * _UP + rng.normal(0, 0.5, (count, 3)))
    half = np.ones((count, 3))
    half[:, 0] = length * rng.uniform(0.6, 1.2, count)
    half[:, 1] = half[:, 0] * rng.uniform(0.3, 0.7, count)
    material = rng.integers(3, size=count).tolist()
    return [Solid(Shape.LEAF, p, h, a, greens[m]) for p, h, a, m in zip(places, half, axes, material, strict=True)]


def _plant(rng: Rng, palette: Palette, size: float) -> list[Solid]:
    """A pot, a stem and leaves."""
    pot, stem = size * rng.uniform(0.1, 0.18), size * rng.uniform(0.4, 0.7)
    crown = np.array([0, 0, 2 * pot + stem])
    spread = size * np.array([1, 1, 1]) * rng.uniform(0.18, 0.3)
    return [
        solid(Shape.FRUSTUM, (0, 0, pot), (pot, pot, pot), palette.thing(size)),
        rod(np.array([0, 0, pot]), crown, 0.02 * size, palette.thing(size, dull=1)),
        *_leaves(rng, palette, crown, spread, int(rng.integers(25, 70)), size * rng.uniform(0.05, 0.1)),
    ]


def _bush(rng: Rng, palette: Palette, size: float) -> list[Solid]:
    spread = size * np.array([0.35, 0.35, 0.3]) * rng.uniform(0.7, 1.1, 3)
    centre = np.array([0, 0, 1.05 * spread[2]])
    return _leaves(rng, palette, centre, spread, int(rng.integers(60, 140)), size * rng.uniform(0.05, 0.09))


def _reeds(rng: Rng, palette: Palette, size: float) -> list[Solid]:
    """Upright blades in a tuft."""
    greens, parts = [palette.leaf(0.1 * size) for _ in range(3)], []
    for _ in range(rng.integers(12, 40)):
        foot = np.array([*rng.normal(0, 0.12, 2) * size, 0])
        along = np.array([*rng.normal(0, 0.2, 2), 1])
        a = size / 2 * rng.uniform(0.4, 1.0)
        frame = upright(along)  # the blade's long axis is the frame's z
        axes = frame @ rotation(2, rng.uniform(-np.pi, np.pi)) @ rotation(1, np.pi / 2)
        half = np.array([a, size * rng.uniform(0.008, 0.025), 1])
        parts.append(Solid(Shape.LEAF, foot + a * frame[:, 2], half, axes, greens[rng.integers(3)]))
    return parts


def _table(rng: Rng, palette: Palette, size: float) -> list[Solid]:
    """Four legs, a board, and sometimes things on it."""
    x, y, height = size / 2 * rng.uniform(0.7, 1.1), size / 2 * rng.uniform(0.4, 0.8), size * rng.uniform(0.35, 0.6)
    leg, board = rng.uniform(0.015, 0.04) * size, rng.uniform(0.01, 0.03) * size
    wood, top = palette.thing(size), palette.thing(size, dull=0.15)
    shape = Shape.BOX if rng.random() < 0.6 else Shape.FRUSTUM
    parts = [
        solid(shape, (a * (x - leg), b * (y - leg), height / 2), (leg, leg, height / 2), wood)
        for a in (-1, 1)
        for b in (-1, 1)
    ]
    for _ in range(rng.integers(0, 5)):
        make = (box, sphere, cylinder)[rng.integers(3)]
        place = np.array([*rng.uniform(-0.7, 0.7, 2) * (x, y), height + 2 * board])
        parts += moved(make(rng, palette, size * rng.uniform(0.1, 0.3)), place, rotation(2, rng.uniform(-3, 3)))
    return [*parts, solid(Shape.BOX, (0, 0, height + board), (x, y, board), top)]


def _shelf(rng: Rng, palette: Palette, size: float) -> list[Solid]:
    """Two sides, boards, sometimes a back, and things on the boards."""
    x, y, z = size / 2 * rng.uniform(0.4, 0.8), size / 2 * rng.uniform(0.2, 0.35), size / 2
    thin, wood = 0.015 * size, palette.thing(size)
    parts = [solid(Shape.BOX, (a * (x - thin), 0, z), (thin, y, z), wood) for a in (-1, 1)]
    if rng.random() < 0.5:
        parts.append(solid(Shape.BOX, (0, y, z), (x, thin / 2, z), palette.thing(size)))
    boards = np.linspace(0.06, 1.0, int(rng.integers(3, 6))) * (2 * z - thin)
    for floor, above in zip(boards, boards[1:], strict=False):
        room = 0.85 * (above - floor) - 2 * thin
        at = -x + 3 * thin
        while at < x - 4 * thin and room > 0:
            wide = rng.uniform(0.03, 0.12) * size
            if rng.random() < 0.75 and at + wide < x - 2 * thin:
                half = (wide / 2, y * rng.uniform(0.3, 0.9), room / 2 * rng.uniform(0.4, 1.0))
                shape = Shape.BOX if rng.random() < 0.7 else Shape.FRUSTUM
                if shape == Shape.FRUSTUM:
                    half = (wide / 2, min(wide / 2, y), half[2])
                material = palette.thing(wide, dull=0.5)
                parts.append(solid(shape, (at + wide / 2, 0, floor + thin + half[2]), half, material))
            at += wide * rng.uniform(1.0, 1.4)
    return parts + [solid(Shape.BOX, (0, 0, height), (x - 2 * thin, y, thin), wood) for height in boards]


def _wall_board(rng: Rng, palette: Palette, size: float) -> list[Solid]:
    """A board on a wall, with things on it."""
    x, y, thin = size / 2, size * rng.uniform(0.08, 0.15), 0.012 * size
    parts = [solid(Shape.BOX, (0, -y, -thin), (x, y, thin), palette.thing(size))]
    for at in np.arange(-0.8, 0.9, 0.3) * x:
        if rng.random() < 0.7:
            make = (box, sphere, cylinder)[rng.integers(3)]
            parts += moved(make(rng, palette, size * rng.uniform(0.08, 0.2)), np.array([at, -y, 0]), rotation(2, 0.3))
    return parts


FURNITURE: dict[str, Kind] = {
    "poles": Kind(_poles, sizes=(1.0, 2.3), weight=1.2),
    "fence": Kind(_fence, sizes=(1.0, 2.6), weight=0.9),
    "plant": Kind(_plant, sizes=(0.6, 1.5), weight=1.0),
    "bush": Kind(_bush, sizes=(0.5, 1.4), weight=0.5),
    "reeds": Kind(_reeds, sizes=(0.4, 1.3), weight=0.6),
    "table": Kind(_table, sizes=(0.8, 1.9), weight=1.3, top=True),
    "shelf": Kind(_shelf, sizes=(0.9, 2.0), weight=1.0),
    "wall board": Kind(_wall_board, place="wall", sizes=(0.5, 1.3), weight=0.6),
}

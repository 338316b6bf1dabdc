"""Simple objects of the training split: boxes, balls, columns, what hangs on walls and from ceilings, heaps of them."""

import numpy as np

from moe3d_deploy.training.scenes.kinds import Kind, Rng, solid
from moe3d_deploy.training.scenes.materials import Palette
from moe3d_deploy.training.scenes.solids import Shape, Solid, moved, rotation


def box(rng: Rng, palette: Palette, size: float) -> list[Solid]:
    x, y, z = size / 2 * rng.uniform(0.4, 1.0, 3)
    return [solid(Shape.BOX, (0, 0, z), (x, y, z), palette.thing(size))]


def _tilted_box(rng: Rng, palette: Palette, size: float) -> list[Solid]:
    """Rests on an edge or a corner, sunk a little into the floor."""
    half = size / 2 * rng.uniform(0.3, 1.0, 3)
    axes = rotation(0, rng.uniform(-0.6, 0.6)) @ rotation(1, rng.uniform(-0.6, 0.6))
    height = float(np.abs(axes[2]) @ half)
    return [Solid(Shape.BOX, np.array([0, 0, 0.97 * height]), half, axes, palette.thing(size))]


def _stack(rng: Rng, palette: Palette, size: float) -> list[Solid]:
    parts, base = [], 0.0
    half = size / 2 * rng.uniform(0.6, 1.0, 3)
    for _ in range(rng.integers(2, 5)):
        height = half[2] * rng.uniform(0.3, 0.7)
        x, y = rng.uniform(-0.1, 0.1, 2) * size
        axes = rotation(2, rng.uniform(-0.5, 0.5))
        parts.append(
            solid(Shape.BOX, (x, y, base + height), (half[0], half[1], height), palette.thing(size), axes=axes)
        )
        base += 2 * height
        half = half * rng.uniform(0.7, 0.95, 3)
    return parts


def sphere(rng: Rng, palette: Palette, size: float) -> list[Solid]:
    r = size / 2 * rng.uniform(0.5, 1.0)
    return [solid(Shape.ELLIPSOID, (0, 0, r), (r, r, r), palette.thing(size))]


def cylinder(rng: Rng, palette: Palette, size: float) -> list[Solid]:
    r, h = size / 2 * rng.uniform(0.25, 0.8), size / 2 * rng.uniform(0.4, 1.2)
    return [solid(Shape.FRUSTUM, (0, 0, h), (r, r, h), palette.thing(size))]


def _log(rng: Rng, palette: Palette, size: float) -> list[Solid]:
    """A cylinder that lies or leans."""
    r, h = size / 2 * rng.uniform(0.15, 0.4), size / 2 * rng.uniform(0.7, 1.4)
    axes = rotation(0, np.pi / 2 if rng.random() < 0.5 else rng.uniform(0.3, 1.2))
    height = float(abs(axes[2, 2]) * h + r * np.sqrt(1 - axes[2, 2] ** 2))
    return [solid(Shape.FRUSTUM, (0, 0, 0.98 * height), (r, r, h), palette.thing(size), axes=axes)]


def _pillar(rng: Rng, palette: Palette, size: float) -> list[Solid]:
    r, h, m = size * rng.uniform(0.06, 0.14), size / 2, palette.thing(size / 2)
    foot, plinth = 1.4 * r, 0.05 * size
    return [
        solid(Shape.BOX, (0, 0, plinth / 2), (foot, foot, plinth / 2), m),
        solid(Shape.FRUSTUM, (0, 0, plinth + h), (r, r, h), m),
        solid(Shape.BOX, (0, 0, 1.5 * plinth + 2 * h), (foot, foot, plinth / 2), m),
    ]


def _screen(rng: Rng, palette: Palette, size: float) -> list[Solid]:
    """A piece of wall that stands in the room."""
    x, y, z = size * rng.uniform(0.3, 0.7), rng.uniform(0.02, 0.1), size * rng.uniform(0.35, 0.6)
    return [solid(Shape.BOX, (0, 0, z), (x, y, z), palette.thing(size, dull=0.1))]


def _clutter(rng: Rng, palette: Palette, size: float) -> list[Solid]:
    """Many small things of few materials, spread over the floor."""
    makers, parts = (box, _tilted_box, sphere, cylinder, _log), []
    colours = [palette.thing(0.15 * size) for _ in range(4)]
    for _ in range(rng.integers(7, 22)):
        make = makers[rng.integers(len(makers))]
        x, y = size / 2 * rng.normal(0, 0.5, 2).clip(-1, 1)
        piece = make(rng, palette, size * np.exp(rng.uniform(np.log(0.05), np.log(0.3))))
        piece = [part._replace(material=colours[rng.integers(4)]) for part in piece]
        parts += moved(piece, np.array([x, y, 0]), rotation(2, rng.uniform(-np.pi, np.pi)))
    return parts


def _lamp(rng: Rng, palette: Palette, size: float) -> list[Solid]:
    r, drop = size * rng.uniform(0.15, 0.3), size * rng.uniform(0.5, 1.1)
    return [
        solid(Shape.FRUSTUM, (0, 0, -drop / 2), (0.015, 0.015, drop / 2), palette.thing(size, dull=1)),
        solid(Shape.ELLIPSOID, (0, 0, -drop - 0.9 * r), (r, r, r), palette.thing(size, dull=0.6)),
    ]


def _hanging_box(rng: Rng, palette: Palette, size: float) -> list[Solid]:
    half, drop = size * rng.uniform(0.1, 0.35, 3), size * rng.uniform(0.4, 1.0)
    axes = rotation(2, rng.uniform(-np.pi, np.pi))
    return [
        solid(Shape.FRUSTUM, (0, 0, -drop / 2), (0.01, 0.01, drop / 2), palette.thing(size, dull=1)),
        Solid(Shape.BOX, np.array([0, 0, -drop - half[2]]), half, axes, palette.thing(size)),
    ]


def _picture(rng: Rng, palette: Palette, size: float) -> list[Solid]:
    x, z, d = size / 2 * rng.uniform(0.5, 1.2), size / 2 * rng.uniform(0.5, 1.2), rng.uniform(0.01, 0.03)
    return [
        solid(Shape.BOX, (0, -d, 0), (x, d, z), palette.thing(size, dull=1)),
        solid(Shape.BOX, (0, -d - 0.004, 0), (0.88 * x, d, 0.88 * z), palette.picture(2 * max(x, z))),
    ]


OBJECTS: dict[str, Kind] = {
    "box": Kind(box, weight=2.5, top=True, small=True),
    "tilted box": Kind(_tilted_box, weight=1, small=True),
    "stack": Kind(_stack, sizes=(0.5, 1.6), weight=1.5, small=True),
    "sphere": Kind(sphere, weight=2, small=True),
    "cylinder": Kind(cylinder, weight=1.5, top=True, small=True),
    "log": Kind(_log, weight=1, small=True),
    "pillar": Kind(_pillar, sizes=(1.2, 2.2), weight=0.7),
    "screen": Kind(_screen, sizes=(1.2, 2.6), weight=0.6),
    "clutter": Kind(_clutter, sizes=(0.8, 2.0), weight=1.3),
    "lamp": Kind(_lamp, place="ceiling", sizes=(0.6, 1.2), weight=0.6),
    "hanging box": Kind(_hanging_box, place="ceiling", sizes=(0.6, 1.3), weight=0.5),
    "picture": Kind(_picture, place="wall", sizes=(0.5, 1.3), weight=1.4),
}

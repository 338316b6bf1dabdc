"""Where things stand: a room or an open ground, and objects on its floor, its walls, its ceiling and on each other."""

from dataclasses import dataclass, field

import numpy as np

from moe3d_deploy.training.scenes.furniture import FURNITURE
from moe3d_deploy.training.scenes.held_out import HELD_OUT
from moe3d_deploy.training.scenes.kinds import Kind, Rng
from moe3d_deploy.training.scenes.materials import Palette
from moe3d_deploy.training.scenes.objects import OBJECTS
from moe3d_deploy.training.scenes.solids import Array, Shape, Solid, moved, pack, rotation

KINDS: dict[str, dict[str, Kind]] = {
    "train": OBJECTS | FURNITURE,
    "test-seeds": OBJECTS | FURNITURE,
    "test-kinds": HELD_OUT,
}
_TRIES = 12  # for a free place


@dataclass
class Layout:
    """Half sizes of the floor that things stand on, the height of the ceiling (None outdoors), and what is there."""

    x: float
    y: float
    ceiling: float | None
    solids: list[Solid]
    kinds: set[str] = field(default_factory=set)
    taken: list[tuple[float, float, float]] = field(default_factory=list)  # circles on the floor: x, y, radius


def lay_out(rng: Rng, palette: Palette, split: str) -> Layout:
    """Everything but light and cameras. The first solid is the room or the ground."""
    layout = _room(rng, palette) if rng.random() < 0.65 else _ground(rng, palette)
    kinds = {n: kind for n, kind in KINDS[split].items() if layout.ceiling is not None or kind.place == "floor"}
    weights = np.array([kind.weight for kind in kinds.values()])
    for name in rng.choice(list(kinds), size=rng.integers(9, 25), p=weights / weights.sum()):
        _put(rng, palette, layout, str(name), kinds)
    return layout


def _room(rng: Rng, palette: Palette) -> Layout:
    x, y, height = rng.uniform(1.7, 4.2), rng.uniform(1.7, 4.2), rng.uniform(2.2, 3.6)
    same = rng.random() < 0.6
    wall = palette.surface(2 * x, dull=0.2)
    for _ in range(3):  # -x, +x, -y, +y, then floor and ceiling: the order of a room's faces
        if same:
            palette.repeat(wall)
        else:
            palette.surface(2 * x, dull=0.2)
    palette.surface(2 * x, dull=0.1)
    palette.surface(2 * x, dull=0.7)
    half = np.array([x, y, height / 2])
    room = Solid(Shape.ROOM, np.array([0, 0, height / 2]), half, np.eye(3), wall, casts_shadow=False)
    return Layout(x, y, height, [room])


def _ground(rng: Rng, palette: Palette) -> Layout:
    """A disc of ground; beyond it, and above the walls that may stand around, is sky."""
    reach = rng.uniform(9, 16)
    floor = palette.surface(reach, dull=0.05)
    ground = Solid(Shape.LEAF, np.zeros(3), np.array([reach, reach, 1]), np.eye(3), floor, casts_shadow=False)
    x, y = rng.uniform(2.2, 5, 2)
    layout = Layout(x, y, None, [ground])
    for _ in range(rng.choice([0, 1, 2, 4], p=[0.2, 0.35, 0.25, 0.2])):
        axes = rotation(2, rng.uniform(-np.pi, np.pi))
        half = np.array([rng.uniform(1, 8), rng.uniform(0.1, 0.5), rng.uniform(0.8, 2.8)])
        centre = axes @ np.array([rng.uniform(-2, 2), rng.uniform(6.0, 8.5), half[2]])
        layout.solids.append(Solid(Shape.BOX, centre, half, axes, palette.surface(6, dull=0.1)))
    return layout


def _put(rng: Rng, palette: Palette, layout: Layout, name: str, kinds: dict[str, Kind]) -> None:
    """Add an object where there is room for it; without room there is none."""
    kind = kinds[name]
    parts = kind.make(rng, palette, float(np.exp(rng.uniform(*np.log(kind.sizes)))))
    stands = _on_wall(rng, parts, layout) if kind.place == "wall" else _on_floor(rng, parts, layout, kind.place)
    if stands is None:
        return
    parts = moved(parts, *stands)
    layout.solids += parts
    layout.kinds.add(name)
    if kind.top and rng.random() < 0.5:
        _on_top(rng, palette, layout, parts[-1], kinds)


def _extent(parts: list[Solid]) -> tuple[float, float, float]:
    """Radius about the z axis, lowest and highest z."""
    corners = pack(parts).corners.reshape(-1, 3)
    return float(np.linalg.norm(corners[:, :2], axis=1).max()), float(corners[:, 2].min()), float(corners[:, 2].max())


def _on_floor(rng: Rng, parts: list[Solid], layout: Layout, place: str) -> tuple[Array, Array] | None:
    radius, low, high = _extent(parts)
    if layout.ceiling is not None and high - low > layout.ceiling - 0.05:
        return None
    if layout.x < radius or layout.y < radius:
        return None
    for _ in range(_TRIES):
        x, y = rng.uniform(-1, 1) * (layout.x - radius), rng.uniform(-1, 1) * (layout.y - radius)
        if place == "floor":
            if any((x - a) ** 2 + (y - b) ** 2 < (radius + r) ** 2 for a, b, r in layout.taken):
                continue
            layout.taken.append((x, y, radius))
        z = layout.ceiling if place == "ceiling" and layout.ceiling is not None else 0.0
        return np.array([x, y, z]), rotation(2, rng.uniform(-np.pi, np.pi))
    return None


def _on_wall(rng: Rng, parts: list[Solid], layout: Layout) -> tuple[Array, Array] | None:
    if layout.ceiling is None:
        return None
    radius, low, high = _extent(parts)
    wall = int(rng.integers(4))
    width, depth = (layout.x, layout.y) if wall % 2 == 0 else (layout.y, layout.x)
    if radius > width or high - low > layout.ceiling - 0.4:
        return None
    along = rng.uniform(-1, 1) * (width - radius)
    z = rng.uniform(0.2 - low, layout.ceiling - 0.1 - high)
    axes = rotation(2, wall * np.pi / 2)
    return axes @ np.array([along, depth, 0]) + np.array([0, 0, z]), axes


def _on_top(rng: Rng, palette: Palette, layout: Layout, below: Solid, kinds: dict[str, Kind]) -> None:
    """Put a smaller object on the level top of a solid."""
    name = str(rng.choice([name for name, kind in kinds.items() if kind.small]))
    room = 2 * float(min(below.half[0], below.half[1]))
    parts = kinds[name].make(rng, palette, room * rng.uniform(0.4, 0.8))
    position = below.centre + below.axes @ np.array([0, 0, below.half[2]])
    if layout.ceiling is not None and position[2] + _extent(parts)[2] > layout.ceiling - 0.05:
        return
    layout.solids += moved(parts, position, rotation(2, rng.uniform(-np.pi, np.pi)))
    layout.kinds.add(name)

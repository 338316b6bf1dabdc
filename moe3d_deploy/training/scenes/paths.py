"""Paths of cameras through a scene: an arc, a strafe, a dolly, a walk; tried until one sees enough."""

import math
from dataclasses import dataclass

import numpy as np

from moe3d_deploy.training.scenes.cast import Projection
from moe3d_deploy.training.scenes.solids import Array

PATHS = ("arc", "strafe", "dolly", "walk")


@dataclass(frozen=True)
class Cameras:
    """S cameras of one field of view: position (S, 3) and axes (S, 3, 3), whose rows are right, down, forward."""

    position: Array
    axes: Array
    tangent: float  # of half the horizontal field of view

    def extrinsics(self) -> Array:
        """(S, 3, 4): camera from world."""
        translation = -np.einsum("sij,sj->si", self.axes, self.position)
        return np.concatenate([self.axes, translation[:, :, None]], axis=2)

    def focal(self, width: int) -> float:
        return width / 2 / self.tangent

    def intrinsics(self, height: int, width: int) -> Array:
        """(3, 3) in pixels."""
        f = self.focal(width)
        return np.array([[f, 0, width / 2], [0, f, height / 2], [0, 0, 1]])

    def projection(self, height: int, width: int) -> Projection:
        inverse = np.linalg.inv(self.intrinsics(height, width))
        return Projection(self.position, np.swapaxes(self.axes, 1, 2) @ inverse)


def looking(position: Array, target: Array, roll: float) -> Array:
    """Axes (3, 3) of a camera at `position` (3,) that looks at `target` (3,) with its right side level, then rolled."""
    x, y, z = (float(value) for value in target - position)
    level = math.hypot(x, y)
    length = math.hypot(level, z)
    right = np.array([y / level, -x / level, 0])
    down = np.array([x * z / level, y * z / level, -level]) / length
    c, s = math.cos(roll), math.sin(roll)
    return np.stack([c * right + s * down, c * down - s * right, np.array([x, y, z]) / length])


def draw_path(
    rng: np.random.Generator, views: int, start: Array, target: Array, tangent: float, depth: float
) -> Cameras:
    """A path around `start`, where a camera looks at `target`, with steps of about 7 to 30 % of `depth`."""
    kind = rng.choice(PATHS)
    away = start - target
    distance = float(np.linalg.norm(away[:2]))
    step = depth * np.exp(rng.uniform(np.log(0.07), np.log(0.3)))
    side = np.array([-away[1], away[0], 0.0]) / distance
    ahead = -np.array([away[0], away[1], 0.0]) / distance
    k = np.arange(views) - (views - 1) / 2
    sign = rng.choice([-1, 1])
    if kind == "arc":
        angle = sign * step / distance * k
        c, s = np.cos(angle)[:, None], np.sin(angle)[:, None]
        position = target + c * away + s * side * distance + (1 - c) * np.array([0, 0, away[2]])
        goal = np.tile(target, (views, 1))
    elif kind == "strafe":
        position = start + sign * step * k[:, None] * side
        goal = position - away + rng.uniform(0, 0.5) * (start - position)
    elif kind == "dolly":
        drift = rng.uniform(-0.3, 0.3)
        position = start + step * k[:, None] * (ahead + drift * side)
        goal = np.tile(target, (views, 1)) + 0.5 * step * k[:, None] * ahead
    else:
        headings = np.cumsum(rng.normal(0, 0.5, views)) + rng.uniform(-np.pi, np.pi)
        moves = step * (np.cos(headings)[:, None] * ahead + np.sin(headings)[:, None] * side)
        position = start + np.cumsum(moves, axis=0) - moves.mean(axis=0) * (views + 1) / 2
        sway = np.clip(np.cumsum(rng.normal(0, 0.16, views)), -0.6, 0.6)
        goal = target + distance * np.tan(sway)[:, None] * side
    position = position + rng.normal(0, 0.03, (views, 3)) * distance * np.array([0.3, 0.3, 1])
    goal = goal + rng.normal(0, 0.04, (views, 3)) * distance
    roll = np.deg2rad(rng.normal(0, 2.0, views) + rng.normal(0, 2.0))
    axes = np.stack([looking(p, g, r) for p, g, r in zip(position, goal, roll, strict=True)])
    return Cameras(position, axes, tangent)

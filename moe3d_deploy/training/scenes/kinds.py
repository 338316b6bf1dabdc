"""What a kind of object is, and how its solids are written down."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from moe3d_deploy.training.scenes.materials import Palette
from moe3d_deploy.training.scenes.solids import Array, Shape, Solid

Rng = np.random.Generator
_LEVEL = np.eye(3)
Maker = Callable[[Rng, Palette, float], list[Solid]]


class Kind(NamedTuple):
    """How a kind of object is made: make(rng, palette, size) with the object's rough size in scene units.

    An object stands on z = 0 around the origin, z up. place: "floor"; "wall": its back is the plane y = 0, the room
    lies towards -y; "ceiling": it hangs from z = 0.

    sizes    from .. to
    weight   how often it appears, beside the others
    top      whether something may be put on its last solid
    small    whether it may be put on something
    """

    make: Maker
    place: str = "floor"
    sizes: tuple[float, float] = (0.4, 1.4)
    weight: float = 1.0
    top: bool = False
    small: bool = False


def solid(
    shape: Shape,
    centre: tuple[float, float, float],
    half: tuple[float, float, float],
    material: int,
    *,
    axes: Array | None = None,
    taper: float = 1.0,
) -> Solid:
    """A solid by its middle and half sizes, not turned unless `axes` says so."""
    return Solid(shape, np.array(centre), np.array(half), _LEVEL if axes is None else axes, material, taper)


def rod(start: Array, end: Array, radius: float, material: int, taper: float = 1.0) -> Solid:
    """A cylinder, or a cone's part, from one point (3,) to another."""
    along = end - start
    length = float(np.linalg.norm(along))
    return Solid(
        Shape.FRUSTUM, (start + end) / 2, np.array([radius, radius, length / 2]), upright(along), material, taper
    )


def upright(z: Array) -> Array:
    """A right-handed orthonormal frame (3, 3) whose third column is along z (3,)."""
    a, b, c = (float(value) for value in z)
    length = math.sqrt(a * a + b * b + c * c)
    a, b, c = a / length, b / length, c / length
    # The first column is level unless z is nearly upright. In plain numbers: ten times as fast as with arrays.
    x, y, w = (-b, a, 0.0) if abs(c) < 0.99 else (c, 0.0, -a)
    size = math.sqrt(x * x + y * y + w * w)
    x, y, w = x / size, y / size, w / size
    return np.array([[x, b * w - c * y, a], [y, c * x - a * w, b], [w, a * y - b * x, c]])


def frames(z: Array) -> Array:
    """`upright` for many at once: (N, 3) -> (N, 3, 3)."""
    z = z / np.linalg.norm(z, axis=1, keepdims=True)
    a, b, c = z.T
    zero = np.zeros_like(a)
    x = np.where((np.abs(c) < 0.99)[:, None], np.stack([-b, a, zero], axis=1), np.stack([c, zero, -a], axis=1))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return np.stack([x, np.cross(z, x), z], axis=2)

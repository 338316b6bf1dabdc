"""The convex solids that scenes are made of: their shapes in a unit frame, and lists of them.

A solid is a unit shape under an affine map: q = diag(1 / half) axes^T (X - centre) takes a world point X to the unit
frame, in which every coordinate of the shape's bounding box runs from -1 to 1.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class Shape(IntEnum):
    """The unit shapes; z is up, and FRUSTUM has radius 1 at the bottom and `taper` at the top."""

    ROOM = 0  # a box seen from inside
    BOX = 1
    WEDGE = 2  # a ramp that rises with x
    GABLE = 3  # a roof whose ridge runs along y
    PYRAMID = 4
    ELLIPSOID = 5
    FRUSTUM = 6
    LEAF = 7  # the disc z = 0, seen from both sides


def _planes(*rows: tuple[float, float, float, float]) -> Array:
    """Half-spaces a q <= b, a of unit length, as six rows (a, b); the last one fills up."""
    rows += (rows[-1],) * (6 - len(rows))
    planes = np.array(rows, np.float64)
    return planes / np.linalg.norm(planes[:, :3], axis=1, keepdims=True)


_X, _Y, _Z = (1, 0, 0, 1), (0, 1, 0, 1), (0, 0, 1, 1)
_MINUS_X, _MINUS_Y, _MINUS_Z = (-1, 0, 0, 1), (0, -1, 0, 1), (0, 0, -1, 1)

# In the order of faces: -x, +x, -y, +y, -z, +z for a box.
POLYTOPES: dict[Shape, Array] = {
    Shape.ROOM: _planes(_MINUS_X, _X, _MINUS_Y, _Y, _MINUS_Z, _Z),
    Shape.BOX: _planes(_MINUS_X, _X, _MINUS_Y, _Y, _MINUS_Z, _Z),
    Shape.WEDGE: _planes((-1, 0, 1, 0), _X, _MINUS_Y, _Y, _MINUS_Z),
    Shape.GABLE: _planes((-2, 0, 1, 1), (2, 0, 1, 1), _MINUS_Y, _Y, _MINUS_Z),
    Shape.PYRAMID: _planes((-2, 0, 1, 1), (2, 0, 1, 1), (0, -2, 1, 1), (0, 2, 1, 1), _MINUS_Z),
}


class Solid(NamedTuple):
    """One solid in some frame; `axes` has the unit frame's axes as columns."""

    shape: Shape
    centre: Array
    half: Array
    axes: Array
    material: int
    taper: float = 1.0
    casts_shadow: bool = True


@dataclass(frozen=True)
class Solids:
    """N solids as arrays.

    shape (N,), centre (N, 3), half (N, 3), axes (N, 3, 3), taper (N,), material (N,), casts_shadow (N,)
    """

    shape: Array
    centre: Array
    half: Array
    axes: Array
    taper: Array
    material: Array
    casts_shadow: Array

    def __len__(self) -> int:
        return len(self.shape)

    def __getitem__(self, chosen: Array) -> "Solids":
        return Solids(*(getattr(self, field.name)[chosen] for field in fields(self)))

    @property
    def to_unit(self) -> Array:
        """(N, 3, 3): the linear part of world -> unit frame."""
        return np.swapaxes(self.axes, 1, 2) / self.half[:, :, None]

    @property
    def _box(self) -> Array:
        """(N, 3): half sizes of the bounding boxes; a leaf is flat."""
        flat = (self.shape == Shape.LEAF)[:, None] & np.array([False, False, True])
        widest = np.where(self.shape == Shape.FRUSTUM, np.maximum(self.taper, 1), 1)[:, None]
        return np.where(flat, 0, self.half * np.where([True, True, False], widest, 1))

    @property
    def corners(self) -> Array:
        """(N, 8, 3): the corners of the bounding boxes, in world coordinates."""
        signs = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float64)
        offsets = (signs * self._box[:, None, :]) @ np.swapaxes(self.axes, 1, 2)
        return self.centre[:, None, :] + offsets

    def clearance(self, points: Array) -> Array:
        """Distance of points (P, 3) to the bounding boxes of the solids, to the walls of a room: (P, N).

        No solid is nearer than that; negative inside of a box.
        """
        local = np.einsum("nji,pnj->pni", self.axes, points[:, None, :] - self.centre)
        beyond = np.abs(local) - self._box
        outside = np.linalg.norm(np.maximum(beyond, 0), axis=2)
        signed = outside + np.minimum(beyond.max(axis=2), 0)
        return np.where(self.shape == Shape.ROOM, -signed, signed)


def pack(solids: Iterable[Solid]) -> Solids:
    rows = list(solids)
    return Solids(
        shape=np.array([row.shape for row in rows], np.int64),
        centre=np.array([row.centre for row in rows], np.float64),
        half=np.array([row.half for row in rows], np.float64),
        axes=np.array([row.axes for row in rows], np.float64),
        taper=np.array([row.taper for row in rows], np.float64),
        material=np.array([row.material for row in rows], np.int64),
        casts_shadow=np.array([row.casts_shadow for row in rows], bool),
    )


def moved(solids: Iterable[Solid], position: Array, axes: Array) -> list[Solid]:
    """The solids of a frame with origin `position` (3,) and `axes` (3, 3) as columns, in that frame's own frame."""
    return [Solid(s, position + axes @ centre, half, axes @ turn, m, t, c) for s, centre, half, turn, m, t, c in solids]


def rotation(axis: int, angle: float) -> Array:
    """Right-handed rotation (3, 3) by `angle` radians about a coordinate axis."""
    i, j = (axis + 1) % 3, (axis + 2) % 3
    matrix = np.eye(3)
    matrix[i, i] = matrix[j, j] = math.cos(angle)
    matrix[j, i] = math.sin(angle)
    matrix[i, j] = -matrix[j, i]
    return matrix

"""Cameras that see something: paths are drawn and looked through, with few rays, until one does."""

from dataclasses import dataclass

import numpy as np
import torch

from moe3d_deploy.training.scenes.cast import Tiles, first_hits
from moe3d_deploy.training.scenes.layout import Layout
from moe3d_deploy.training.scenes.options import SceneOptions
from moe3d_deploy.training.scenes.paths import Cameras, draw_path, looking
from moe3d_deploy.training.scenes.solids import Array, Shape, Solids

CLEARANCE = 0.35  # of a camera to every surface, in scene units
# No depth is less: the clearance times the cosine of the angle to a picture's corner, at 85 x 85 degrees of view.
NEAR = 0.2
FIELD_OF_VIEW_DEGREES = (45, 85)  # horizontal; where the picture is upright, vertical
BASELINE = (0.05, 0.35)  # between neighbours, of the median depth of their views
MOST_TURN_DEGREES = 40.0  # between neighbours

_SMALL = 0.1  # half a solid's size; smaller ones, leaves above all, are not looked for
_ROUNDS = 12  # in one world
_STARTS = 6  # per round, looked from at once
_RAYS = 24  # along the longer side of a picture
_LEAST_VALID = 0.65
_MOST_OF_ONE = 0.55  # of a picture, for one solid that is not the room or the ground
_LEAST_OBJECTS = 0.15  # of a picture
_LEAST_SOLIDS = 4  # beside the room or the ground
_LEAST_OVERLAP = 0.4  # of a view's points that its neighbour sees
_LEAST_MEDIAN = 0.9  # depth, scene units


def find_cameras(rng: np.random.Generator, solids: Solids, layout: Layout, options: SceneOptions) -> Cameras | None:
    """A path on which every view shows enough, or None where none was found."""
    aspect = options.height / options.width
    coarse = solids[(solids.half.max(axis=1) > _SMALL) | (solids.shape == Shape.LEAF) & ~solids.casts_shadow]
    for _ in range(_ROUNDS):
        tangent = float(np.tan(np.deg2rad(rng.uniform(*FIELD_OF_VIEW_DEGREES)) / 2)) / max(1.0, aspect)
        starts = [_draw_start(rng, layout) for _ in range(_STARTS)]
        candidates = Cameras(
            np.stack([start for start, _ in starts]),
            np.stack([looking(start, target, 0.0) for start, target in starts]),
            tangent,
        )
        clear = np.flatnonzero(_are_clear(solids, candidates))
        if not len(clear):
            continue
        some = Cameras(candidates.position[clear], candidates.axes[clear], tangent)
        for number, median in zip(clear, _look(coarse, some, aspect).medians(), strict=True):
            if np.isnan(median):
                continue
            cameras = draw_path(rng, options.views, *starts[number], tangent, float(median))
            if _are_clear(solids, cameras).all() and sees_enough(coarse, cameras, aspect):
                return cameras
    return None


def _draw_start(rng: np.random.Generator, layout: Layout) -> tuple[Array, Array]:
    """Where a camera is in the middle of its path, and a point that it looks at, mostly above an object's place."""
    floor = np.array([layout.x, layout.y])
    while True:
        target = np.array([*rng.uniform(-0.5, 0.5, 2) * floor, rng.uniform(0.2, 1.5)])
        if layout.taken and rng.random() < 0.7:
            target[:2] = layout.taken[rng.integers(len(layout.taken))][:2]
        if layout.ceiling is None:
            angle, distance = rng.uniform(-np.pi, np.pi), rng.uniform(1.8, 5.5)
            start = target + distance * np.array([np.cos(angle), np.sin(angle), 0])
            start[2] = rng.uniform(0.45, 2.3)
        else:
            start = np.array([*rng.uniform(-0.92, 0.92, 2) * floor, rng.uniform(0.45, min(2.3, layout.ceiling - 0.4))])
        if np.linalg.norm((start - target)[:2]) > 1.2:
            return start, target


def _are_clear(solids: Solids, cameras: Cameras) -> Array:
    """(S,): which cameras keep their distance from all surfaces; the bounding box of the ground is flat."""
    return solids.clearance(cameras.position).min(axis=1) > CLEARANCE


@dataclass(frozen=True)
class _Look:
    """What a few rays of every view hit: solid and inverse depth (S, height width)."""

    solid: Array
    inverse: Array
    height: int
    width: int
    solids: int

    def medians(self) -> Array:
        """The median depth of every view, (S,); NaN for one that shows too little, or too much of one object."""
        medians = np.full(len(self.solid), np.nan)
        for view, (solid, inverse) in enumerate(zip(self.solid, self.inverse, strict=True)):
            valid = solid >= 0
            if valid.mean() < _LEAST_VALID:
                continue
            share = np.bincount(solid[valid], minlength=self.solids)[1:] / valid.size
            median = 1 / np.median(inverse[valid])
            enough = share.sum() >= _LEAST_OBJECTS and (share > 0).sum() >= _LEAST_SOLIDS
            if enough and share.max() <= _MOST_OF_ONE and median >= _LEAST_MEDIAN:
                medians[view] = median
        return medians


def _look(solids: Solids, cameras: Cameras, aspect: float) -> _Look:
    width = max(4, round(_RAYS / max(1.0, aspect)))
    height = max(4, round(width * aspect))
    tiles = Tiles(len(cameras.position), height, width)
    hits = first_hits(solids, cameras.projection(height, width), tiles, torch.device("cpu"))
    solid, inverse = (tiles.image(part).view(tiles.views, -1).numpy() for part in hits[::-1])
    return _Look(solid, inverse, height, width, len(solids))


def sees_enough(solids: Solids, cameras: Cameras, aspect: float) -> bool:
    """Whether every view shows enough and is as far from its neighbours as BASELINE and MOST_TURN_DEGREES say.

    aspect: height over width of the pictures
    """
    turns = np.einsum("sij,sij->s", cameras.axes[1:], cameras.axes[:-1])  # trace of the relative rotation
    if (turns < 1 + 2 * np.cos(np.deg2rad(MOST_TURN_DEGREES))).any():
        return False
    look = _look(solids, cameras, aspect)
    medians = look.medians()
    if np.isnan(medians).any():
        return False
    baseline = np.linalg.norm(np.diff(cameras.position, axis=0), axis=1) / ((medians[1:] + medians[:-1]) / 2)
    if ((baseline < BASELINE[0]) | (baseline > BASELINE[1])).any():
        return False
    pairs = [pair for a in range(len(medians) - 1) for pair in ((a, a + 1), (a + 1, a))]
    return all(_overlap(cameras, look, a, b) >= _LEAST_OVERLAP for a, b in pairs)


def _overlap(cameras: Cameras, look: _Look, a: int, b: int) -> float:
    """The share of view a's points that view b sees too."""
    inverse, height, width = look.inverse, look.height, look.width
    v, u = np.divmod(np.arange(height * width), width)
    hit = inverse[a] > 0
    projection = cameras.projection(height, width)
    depth = 1 / inverse[a][hit].astype(np.float64)
    pixels = np.stack([u, v, np.ones_like(u)])[:, hit]
    points = projection.origin[a] + (depth * (projection.rays[a] @ pixels)).T
    local = (points - cameras.position[b]) @ cameras.axes[b].T
    z = np.maximum(local[:, 2], 1e-6)
    f = cameras.focal(width)
    x, y = np.round(f * local[:, 0] / z + width / 2), np.round(f * local[:, 1] / z + height / 2)
    seen = (local[:, 2] > 0) & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    there = inverse[b][(y[seen] * width + x[seen]).astype(np.int64)]
    agrees = np.abs(there * z[seen] - 1) < 0.15
    return float(agrees.sum() / max(1, hit.sum()))

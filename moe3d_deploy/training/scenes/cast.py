"""Rays against solids: exact first hits, for the pixels of cameras and for points seen from a light.

A camera and a light are the same here: points X = origin + z G [u v 1]^T. In inverse depth w = 1 / z a plane is linear
in (u, v), and the two hits of a quadric are -b +- sqrt(D) with b linear and D quadratic in (u, v). A ray is inside of
a convex solid for w between w_out and w_in: it enters last through the planes that it faces (the least of their w) and
leaves first through the others (the greatest). So a solid costs additions, minima and maxima, no division.

Pixels are worked on in tiles of 8 x 8, laid out as (64, tiles), in pairs of a tile and a solid that may be seen in it.
Coefficients are computed in float64 and, before they are rounded, moved to the middle of the tile, or of the solid:
float32 then loses nothing to cancellation. Only operations that IEEE 754 rounds exactly are used, so the result does
not depend on how threads split them.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe3d_deploy.training.scenes.solids import POLYTOPES, Array, Shape, Solids

SIDE = 8
PIXELS = SIDE * SIDE
_PAIRS = 1024  # at a time, so that their values stay in the processor's cache
_BEHIND = 1e-3  # a corner nearer than this has no useful projection
_FAR = 1e30

# How a pair is evaluated: the number of planes that face the eye for a polytope; the cases of a quadric by where the
# eye is: outside of the infinite cone, inside with the solid, or inside of its mirror image beyond the apex.
_ROOM, _ELLIPSOID, _LEAF = 0, 10, 11
_OUTSIDE, _OUTSIDE_SLAB, _INSIDE, _MIRRORED = 20, 21, 22, 23


class Projection(NamedTuple):
    """V eyes: origin (V, 3), rays (V, 3, 3): X = origin + z rays [u v 1]^T."""

    origin: Array
    rays: Array


class Tiles(NamedTuple):
    """The tiles of S pictures: tile `(view * down + y) * across + x` covers pixels from (8 x, 8 y)."""

    views: int
    height: int
    width: int

    @property
    def down(self) -> int:
        return -(-self.height // SIDE)

    @property
    def across(self) -> int:
        return -(-self.width // SIDE)

    @property
    def total(self) -> int:
        return self.views * self.down * self.across

    def image(self, values: Tensor) -> Tensor:
        """(64, tiles) -> (S, H, W)."""
        blocks = values.view(SIDE, SIDE, self.views, self.down, self.across).permute(2, 3, 0, 4, 1)
        whole = blocks.reshape(self.views, self.down * SIDE, self.across * SIDE)
        return whole[:, : self.height, : self.width].contiguous()

    def pixels(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """u (1, 8, tiles), v (8, 1, tiles) float32 and view (tiles,) of every pixel."""
        tile = torch.arange(self.total, device=device)
        steps = torch.arange(SIDE, device=device)
        x, y = tile % self.across, torch.div(tile, self.across, rounding_mode="floor") % self.down
        u, v = (x * SIDE + steps[:, None]).float(), (y * SIDE + steps[:, None]).float()
        return u[None], v[:, None], torch.div(tile, self.across * self.down, rounding_mode="floor")


@dataclass(frozen=True)
class _Forms:
    """What V eyes see of N solids, as functions of (u, v, 1).

    mode (V, N); linear (V, N, 6, 3); quadratic (V, N, 6): coefficients of u u, u v, v v, u, v, 1
    """

    mode: Array
    linear: Array
    quadratic: Array


def _forms(solids: Solids, eye: Projection) -> _Forms:
    to_unit = solids.to_unit
    origin = np.einsum("nij,vnj->vni", to_unit, eye.origin[:, None, :] - solids.centre)
    rays = np.einsum("nij,vjk->vnik", to_unit, eye.rays)
    views, count = origin.shape[:2]
    forms = _Forms(np.zeros((views, count), np.int64), np.zeros((views, count, 6, 3)), np.zeros((views, count, 6)))
    for shape in np.unique(solids.shape):
        members = np.flatnonzero(solids.shape == shape)
        parts = origin[:, members], rays[:, members]
        if shape in POLYTOPES:
            mode, linear = _polytope(POLYTOPES[Shape(shape)], *parts)
            quadratic = None
        elif shape == Shape.LEAF:
            mode, linear, quadratic = _leaf(*parts)
        else:
            taper = None if shape == Shape.ELLIPSOID else solids.taper[members]
            mode, linear, quadratic = _quadric(taper, *parts)
        forms.mode[:, members] = mode
        forms.linear[:, members, : linear.shape[2]] = linear
        if quadratic is not None:
            forms.quadratic[:, members] = quadratic
    return forms


def _nonzero(x: Array) -> Array:
    return np.where(np.abs(x) < 1e-9, np.where(x < 0, -1e-9, 1e-9), x)


def _polytope(planes: Array, origin: Array, rays: Array) -> tuple[Array, Array]:
    """Six planes, those that face the eye first; the mode is their number, 0 for a room from inside."""
    distance = _nonzero(planes[:, 3] - origin @ planes[:, :3].T)
    linear = np.einsum("ka,vnai->vnki", planes[:, :3], rays) / distance[..., None]
    faces = distance < 0
    order = np.argsort(~faces, axis=2, kind="stable")
    return faces.sum(axis=2), np.take_along_axis(linear, order[..., None], axis=2)


def _leaf(origin: Array, rays: Array) -> tuple[Array, Array, Array]:
    """w of the plane q_z = 0, and w^2 (1 - q_x^2 - q_y^2) there, positive on the disc."""
    w = -rays[..., 2, :] / _nonzero(origin[..., 2])[..., None]
    p = w[..., None, :] * origin[..., :2, None] + rays[..., :2, :]
    form = _outer(w) - _outer(p[..., 0, :]) - _outer(p[..., 1, :])
    return np.full(origin.shape[:2], _LEAF), w[:, :, None], _symmetric(form)


def _quadric(taper: Array | None, origin: Array, rays: Array) -> tuple[Array, Array, Array]:
    """q_x^2 + q_y^2 + e q_z^2 < (m + n q_z)^2 between q_z = -1 and 1; taper None is the ellipsoid, e = 1.

    With a + 2 b w + c w^2 for the left side less the right side along a ray, c < 0 where the eye is inside of the
    infinite solid, and D = b^2 - a c. Linear forms: b / c, then the planes q_z = -1 and 1, a facing one first.
    """
    if taper is None:
        e, m, n = 1.0, np.ones(origin.shape[1]), np.zeros(origin.shape[1])
    else:
        e, m, n = 0.0, (1 + taper) / 2, (taper - 1) / 2
    radius = m + n * origin[..., 2]
    c = _nonzero(origin[..., 0] ** 2 + origin[..., 1] ** 2 + e * origin[..., 2] ** 2 - radius**2)
    b = (
        origin[..., 0, None] * rays[..., 0, :]
        + origin[..., 1, None] * rays[..., 1, :]
        + (e * origin[..., 2] - radius * n)[..., None] * rays[..., 2, :]
    )
    a = _outer(rays[..., 0, :]) + _outer(rays[..., 1, :]) + (e - n**2)[..., None, None] * _outer(rays[..., 2, :])
    quadratic = _symmetric((_outer(b) - c[..., None, None] * a) / (c**2)[..., None, None])
    b = b / c[..., None]
    if taper is None:
        return np.full(c.shape, _ELLIPSOID), b[:, :, None], quadratic
    slab = np.array([[0, 0, -1.0, 1.0], [0, 0, 1.0, 1.0]])
    facing, planes = _polytope(slab, origin, rays)
    mode = np.where(c > 0, np.where(facing > 0, _OUTSIDE_SLAB, _OUTSIDE), np.where(radius > 0, _INSIDE, _MIRRORED))
    return mode, np.concatenate([b[:, :, None], planes], axis=2), quadratic


def _outer(x: Array) -> Array:
    return x[..., :, None] * x[..., None, :]


def _symmetric(form: Array) -> Array:
    """(..., 3, 3) -> coefficients (..., 6) of u u, u v, v v, u, v, 1."""
    f = form
    parts = [f[..., 0, 0], 2 * f[..., 0, 1], f[..., 1, 1], 2 * f[..., 0, 2], 2 * f[..., 1, 2], f[..., 2, 2]]
    return np.stack(parts, axis=-1)


def _centred(linear: Array, quadratic: Array, u: Array, v: Array) -> tuple[Array, Array]:
    """The forms of P pairs, linear (P, 6, 3) and quadratic (P, 6), as functions of the offset from u, v (P,)."""
    linear, quadratic = linear.copy(), quadratic.copy()
    linear[..., 2] += linear[..., 0] * u[:, None] + linear[..., 1] * v[:, None]
    uu, uv, vv, fu, fv, f = np.moveaxis(quadratic, -1, 0)
    quadratic[:, 5] = f + u * (fu + uu * u + uv * v) + v * (fv + vv * v)
    quadratic[:, 3] = fu + 2 * uu * u + uv * v
    quadratic[:, 4] = fv + 2 * vv * v + uv * u
    return linear, quadratic


def _first_hit(mode: int, linear: Tensor, quadratic: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """w of the first hit, not above 0 where there is none.

    linear (6, 3, P), quadratic (6, P); u and v broadcast against (P,).
    """

    def line(row: int) -> Tensor:
        return (linear[row, 2] + linear[row, 1] * v) + linear[row, 0] * u

    if mode == _ROOM:
        return _extreme(torch.maximum, [line(row) for row in range(6)])
    if mode <= 6:
        enters = _extreme(torch.minimum, [line(row) for row in range(mode)])
        leaves = _extreme(torch.maximum, [line(row) for row in range(mode, 6)]) if mode < 6 else None
        return enters if leaves is None else enters * (enters > leaves)
    uu, uv, vv, fu, fv, f = quadratic
    inside = ((f + v * (fv + vv * v)) + u * (fu + uu * u)) + (uv * v) * u
    if mode == _LEAF:
        return line(0) * (inside > 0)
    root, middle = inside.clamp_min(0).sqrt(), line(0)  # without a root both hits are the same: none
    if mode == _ELLIPSOID:
        return (root - middle) * (root > 0)
    if mode == _OUTSIDE:
        enters, leaves = root - middle, _extreme(torch.maximum, [-root - middle, line(1), line(2)])
    elif mode == _OUTSIDE_SLAB:
        enters, leaves = torch.minimum(root - middle, line(1)), torch.maximum(-root - middle, line(2))
    elif mode == _INSIDE:
        enters, leaves = line(1), torch.maximum(root - middle, line(2))
    else:
        enters, leaves = torch.minimum(-root - middle, line(1)), line(2)
    return enters * (enters > leaves)


def _extreme(function: Callable[[Tensor, Tensor], Tensor], values: list[Tensor]) -> Tensor:
    return functools.reduce(function, values)


class Hits(NamedTuple):
    """First hits: inverse depth (64, tiles) float32, 0 for none, and which solid (64, tiles) int64, -1 for none."""

    inverse_depth: Tensor
    solid: Tensor


def first_hits(solids: Solids, cameras: Projection, tiles: Tiles, device: torch.device) -> Hits:
    """What the pixels of all views see first."""
    forms = _forms(solids, cameras)
    view, solid, tile = _candidates(solids, cameras, tiles)
    x, y = tile % tiles.across, tile // tiles.across % tiles.down
    middle = (SIDE - 1) / 2
    linear, quadratic = _centred(
        forms.linear[view, solid], forms.quadratic[view, solid], x * SIDE + middle, y * SIDE + middle
    )
    steps = torch.arange(SIDE, device=device) - middle
    u, v = steps[None, :, None], steps[:, None, None]
    keys = torch.zeros(PIXELS, tiles.total, dtype=torch.int64, device=device)
    for mode, pairs in _groups(forms.mode[view, solid]):
        w = _first_hit(mode, _to(linear[pairs], device), _to(quadratic[pairs], device), u, v)
        w = w.expand(SIDE, SIDE, len(pairs)).reshape(PIXELS, len(pairs))
        # The bits of positive floats are ordered as they are; a solid's number below them decides between equals.
        key = w.view(torch.int32).to(torch.int64) * (1 << 32) + torch.from_numpy(solid[pairs] + 1).to(device)
        keys.scatter_reduce_(1, torch.from_numpy(tile[pairs]).to(device).expand(PIXELS, -1), key, "amax")
    inverse_depth = (keys >> 32).to(torch.int32).view(torch.float32)
    return Hits(inverse_depth, torch.where(inverse_depth > 0, (keys & 0xFFFFFFFF) - 1, -1))


def _to(values: Array, device: torch.device) -> Tensor:
    """(P, ...) float64 -> (..., P) float32: pairs are the axis that is contiguous."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(values, 0, -1), np.float32)).to(device)


def _groups(modes: Array) -> Iterator[tuple[int, Array]]:
    for mode in np.unique(modes):
        members = np.flatnonzero(modes == mode)
        for start in range(0, len(members), _PAIRS):
            yield int(mode), members[start : start + _PAIRS]


def _bounds(solids: Solids, eye: Projection) -> tuple[Array, Array, Array]:
    """The projected bounding boxes: low and high (V, N, 2), and the least z of their corners (V, N).

    A box that reaches behind the eye may be seen anywhere.
    """
    corners = solids.corners
    local = np.einsum("vij,vnkj->vnki", np.linalg.inv(eye.rays), corners[None] - eye.origin[:, None, None, :])
    z = local[..., 2]
    with np.errstate(divide="ignore", invalid="ignore"):
        uv = local[..., :2] / z[..., None]
    near, far = z.min(axis=2), z.max(axis=2)
    behind = (near < _BEHIND)[..., None]
    low = np.where(behind, -np.inf, uv.min(axis=2))
    high = np.where(behind, np.inf, uv.max(axis=2))
    gone = (far < _BEHIND)[..., None]
    return np.where(gone, np.inf, low), np.where(gone, -np.inf, high), near


def _candidates(solids: Solids, cameras: Projection, tiles: Tiles) -> tuple[Array, Array, Array]:
    """Pairs of a solid and a tile that its bounding box touches: view, solid and tile, each (P,)."""
    low, high, _ = _bounds(solids, cameras)
    everywhere = (solids.shape == Shape.ROOM)[None, :, None]
    low, high = np.where(everywhere, -np.inf, low), np.where(everywhere, np.inf, high)
    last = np.array([tiles.across, tiles.down]) - 1
    size = np.array([tiles.width, tiles.height])
    seen = ((high >= 0) & (low <= size - 1)).all(axis=2)
    view, solid = np.nonzero(seen)
    first = np.floor(np.clip(low[view, solid], 0, size - 1) / SIDE).astype(np.int64)
    final = np.minimum(np.floor(np.clip(high[view, solid], 0, size - 1) / SIDE).astype(np.int64), last)
    span = final - first + 1
    counts = span.prod(axis=1)
    pair = np.repeat(np.arange(len(view)), counts)
    step = np.arange(len(pair)) - np.repeat(np.cumsum(counts) - counts, counts)
    x = first[pair, 0] + step % span[pair, 0]
    y = first[pair, 1] + step // span[pair, 0]
    return view[pair], solid[pair], (view[pair] * tiles.down + y) * tiles.across + x


def shadowed(solids: Solids, light: Projection, s: Tensor, t: Tensor, z: Tensor, lit: Tensor, bias: float) -> Tensor:
    """Whether a solid stands between a light and points that face it.

    s, t, z (64, tiles)   the points in the light's coordinates: X = origin + z rays [s t 1]^T
    lit (64, tiles) bool  which of them are asked for
    bias                  lengths of z: what is nearer to the point than this casts no shadow on it
    returns               (64, tiles) float32, 1 in shadow
    """
    device = s.device
    w = torch.where(lit, 1 / (z - bias), _FAR)
    far = torch.where(lit, z, -_FAR).amax(dim=0)
    box = [torch.where(lit, value, _FAR).amin(dim=0) for value in (s, t)]
    box += [torch.where(lit, value, -_FAR).amax(dim=0) for value in (s, t)]
    low_s, low_t, high_s, high_t, far_z = torch.stack([*box, far]).cpu().numpy()
    low, high, near = (part[0] for part in _bounds(solids, light))
    overlaps = (low[:, :1] <= high_s) & (high[:, :1] >= low_s) & (low[:, 1:] <= high_t) & (high[:, 1:] >= low_t)
    overlaps &= (near[:, None] < far_z) & solids.casts_shadow[:, None]
    solid, tile = np.nonzero(overlaps)
    result = torch.zeros_like(s)
    if not len(solid):
        return result
    forms = _forms(solids, light)
    centre = np.linalg.solve(light.rays[0], (solids.centre - light.origin[0]).T).T
    middle = centre[:, :2] / np.maximum(centre[:, 2:], _BEHIND)
    linear, quadratic = _centred(forms.linear[0], forms.quadratic[0], middle[:, 0], middle[:, 1])
    points = torch.cat([s, t, w])  # of two axes: along the last of three, index_select is 20 times as slow
    for mode, pairs in _groups(forms.mode[0, solid]):
        where, which = torch.from_numpy(tile[pairs]).to(device), solid[pairs]
        ps, pt, pw = points.index_select(1, where).view(3, PIXELS, -1)
        u, v = ps - _to(middle[which, 0], device), pt - _to(middle[which, 1], device)
        hit = _first_hit(mode, _to(linear[which], device), _to(quadratic[which], device), u, v) > pw
        result.scatter_reduce_(1, where.expand(PIXELS, -1), hit.float(), "amax")
    return result

"""From hits to pictures: surface points, normals, light, shadow and sky."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe3d_deploy.training.scenes.cast import PIXELS, Hits, Projection, Tiles, shadowed
from moe3d_deploy.training.scenes.kinds import upright
from moe3d_deploy.training.scenes.solids import POLYTOPES, Array, Shape, Solids
from moe3d_deploy.training.scenes.textures import colours

_SHADOW_BIAS = 0.01  # scene units


@dataclass(frozen=True)
class Light:
    """A point light; far away it is a sun. `colour` (3,) is what a surface that faces it at `reach` receives."""

    position: Array
    towards: Array  # a point that its light falls on; the plane through the light across this direction sees nothing
    colour: Array
    reach: float
    shadows: bool = True


@dataclass(frozen=True)
class Lighting:
    """All light of a scene: sky colours are those of the horizon and the zenith, linear, as is `ambient`."""

    lights: tuple[Light, ...]
    ambient: Array
    horizon: Array
    zenith: Array


class Surface(NamedTuple):
    """Points that were hit, all (..., 64 tiles) in one row of P = 64 tiles values.

    point (3, P), normal (3, P) unit and towards the eye, s and t (P,) on the surface, face (P,) int64 of a room
    """

    point: Tensor
    normal: Tensor
    s: Tensor
    t: Tensor
    face: Tensor


def view_rays(cameras: Projection, tiles: Tiles, device: torch.device) -> Tensor:
    """(3, P): X - origin at depth 1 for every pixel, world axes."""
    u, v, view = tiles.pixels(device)
    rays = torch.from_numpy(cameras.rays.astype(np.float32)).to(device)[view]
    parts = [(rays[:, i, 2] + rays[:, i, 1] * v) + rays[:, i, 0] * u for i in range(3)]
    return torch.stack([part.expand(8, 8, tiles.total).reshape(-1) for part in parts])


def surface(solids: Solids, cameras: Projection, tiles: Tiles, hits: Hits, rays: Tensor) -> Surface:
    """Points, normals and surface coordinates of hits; meaningless where nothing was hit."""
    device = rays.device
    solid = hits.solid.reshape(-1).clamp_min(0)
    w = hits.inverse_depth.reshape(-1)
    depth = torch.where(w > 0, 1 / w, 0.0)
    _, _, view = tiles.pixels(device)
    origin = torch.from_numpy(cameras.origin.T.astype(np.float32)).to(device)[:, view]
    point = depth * rays + origin.repeat(1, PIXELS)

    table = np.concatenate(
        [solids.to_unit.reshape(-1, 9), solids.centre, solids.half, solids.taper[:, None], solids.shape[:, None]],
        axis=1,
    )
    row = torch.from_numpy(np.ascontiguousarray(table.T, np.float32)).to(device).index_select(1, solid)
    matrix, centre, half, taper, shape = row[:9].view(3, 3, -1), row[9:12], row[12:15], row[15], row[16]
    offset = point - centre
    unit = matrix[:, 0] * offset[0] + matrix[:, 1] * offset[1] + matrix[:, 2] * offset[2]

    normal = torch.zeros_like(unit)
    face = torch.zeros_like(solid)
    s, t = torch.zeros_like(w), torch.zeros_like(w)
    for kind in np.unique(solids.shape):
        where = torch.nonzero(shape == float(kind)).view(-1)
        q, h = unit.index_select(1, where), half.index_select(1, where)
        if kind in POLYTOPES:
            n, f = _polytope_normal(Shape(kind), q)
            face.index_copy_(0, where, f)
            coordinates = _across(n / h, q * h)
        elif kind == Shape.LEAF:
            n = torch.zeros_like(q)
            n[2] = 1.0
            coordinates = q[0] * h[0], q[1] * h[1]
        else:
            n, cap = _quadric_normal(None if kind == Shape.ELLIPSOID else taper.index_select(0, where), q)
            around = _angle(q[1], q[0]) * h[0]
            coordinates = torch.where(cap, q[0] * h[0], around), torch.where(cap, q[1] * h[1], q[2] * h[2])
        normal.index_copy_(1, where, n)
        s.index_copy_(0, where, coordinates[0])
        t.index_copy_(0, where, coordinates[1])
    world = matrix[0] * normal[0] + matrix[1] * normal[1] + matrix[2] * normal[2]
    length = (world[0] * world[0] + world[1] * world[1] + world[2] * world[2]).sqrt().clamp_min(1e-20)
    towards = (world[0] * rays[0] + world[1] * rays[1] + world[2] * rays[2]) > 0
    world = world / (length * (1.0 - 2.0 * towards))
    return Surface(point, world, s, t, face)


def _polytope_normal(shape: Shape, q: Tensor) -> tuple[Tensor, Tensor]:
    """The face nearest to points on the unit shape: its normal (3, P) and number (P,)."""
    planes = POLYTOPES[shape].astype(np.float32)
    nearest = torch.full_like(q[0], -1e30)
    face = torch.zeros_like(nearest)
    for number, (a, b, c, d) in enumerate(planes.tolist()):
        distance = _scaled(q, (a, b, c)) - d
        face = face + (number - face) * (distance > nearest)
        nearest = torch.maximum(nearest, distance)
    which = face.to(torch.int64)
    return torch.from_numpy(planes[:, :3].T.copy()).to(q.device).index_select(1, which), which


def _scaled(q: Tensor, factors: tuple[float, float, float]) -> Tensor:
    """The scalar product of points (3, P) with a vector, many of whose parts are 0."""
    total = torch.zeros_like(q[0])
    for part, factor in zip(q, factors, strict=True):
        if factor:
            total = total + factor * part
    return total


def _across(normal: Tensor, point: Tensor) -> tuple[Tensor, Tensor]:
    """Two of a point's local coordinates (3, P): those across the axis that its local normal is nearest to."""
    size = normal.abs()
    along_x = (size[0] >= size[1]) & (size[0] >= size[2])
    along_z = (size[2] > size[0]) & (size[2] > size[1])
    return torch.where(along_x, point[1], point[0]), torch.where(along_z, point[1], point[2])


def _quadric_normal(taper: Tensor | None, q: Tensor) -> tuple[Tensor, Tensor]:
    """Normals (3, P) in the unit frame, and whether a point lies on an end cap."""
    if taper is None:
        return q, torch.zeros_like(q[0], dtype=torch.bool)
    slope = (taper - 1) / 2
    radius = (1 + taper) / 2 + slope * q[2]
    side = (q[0] * q[0] + q[1] * q[1] - radius * radius).abs()
    cap = (1 - q[2].abs()).abs() < 0.5 * side
    z = torch.where(cap, q[2], -slope * radius)
    keep = 1.0 - cap.float()
    return torch.stack([q[0] * keep, q[1] * keep, z]), cap


def _angle(y: Tensor, x: Tensor) -> Tensor:
    """atan2 to 1e-3 radians, from operations that are the same on every path of the processor."""
    high, low = torch.maximum(x.abs(), y.abs()).clamp_min(1e-12), torch.minimum(x.abs(), y.abs())
    a = low / high
    angle = a * (0.9953 + a * a * (-0.2887 + 0.0793 * (a * a)))
    angle = torch.where(y.abs() > x.abs(), 1.5707963 - angle, angle)
    angle = torch.where(x < 0, 3.1415927 - angle, angle)
    return torch.where(y < 0, -angle, angle)


def radiance(
    solids: Solids, rows: Array, lighting: Lighting, hits: Hits, at: Surface, rays: Tensor, focal: float
) -> Tensor:
    """Linear light from every pixel, (3, P)."""
    device = rays.device
    table = torch.from_numpy(rows).to(device)
    solid = hits.solid.reshape(-1)
    inside = solid >= 0
    shape, material = (torch.from_numpy(part).to(device) for part in (solids.shape, solids.material))
    index = solid.clamp_min(0)
    number = material.index_select(0, index) + at.face * (shape.index_select(0, index) == int(Shape.ROOM))
    w = hits.inverse_depth.reshape(-1)
    facing = (at.normal[0] * rays[0] + at.normal[1] * rays[1] + at.normal[2] * rays[2]).abs()
    footprint = 1 / (w.clamp_min(1e-6) * focal * facing.clamp_min(0.15))
    albedo = colours(table, number, at.s, at.t, footprint)
    up = 0.7 + 0.3 * at.normal[2]
    ambient = lighting.ambient.tolist()
    light = torch.stack([up * value for value in ambient])
    for source in lighting.lights:
        direct = direct_light(solids, source, at, inside)
        light = light + torch.stack([direct * value for value in source.colour.tolist()])
    sky = _sky(lighting, rays)
    return torch.where(inside, albedo * light, sky)


def direct_light(solids: Solids, source: Light, at: Surface, inside: Tensor) -> Tensor:
    """Lambert's cosine times the falloff of a point light, 0 in shadow: (P,)."""
    frame = upright(source.towards - source.position)
    px, py, pz = (at.point[i] - float(source.position[i]) for i in range(3))
    distance2 = px * px + py * py + pz * pz
    distance = distance2.sqrt()
    cosine = -(px * at.normal[0] + py * at.normal[1] + pz * at.normal[2]) / distance.clamp_min(1e-6)
    lit = (cosine > 0) & inside
    strength = (cosine * (source.reach**2 / distance2.clamp_min(1e-6))).clamp(0, 4)
    s, t, z = (px * float(axis[0]) + py * float(axis[1]) + pz * float(axis[2]) for axis in frame.T)
    lit &= z > 0.05
    if source.shadows:
        safe = z.clamp_min(0.05)
        eye = Projection(source.position[None], frame[None])
        ps, pt, pz, asked = (value.view(PIXELS, -1) for value in (s / safe, t / safe, safe, lit))
        dark = shadowed(solids, eye, ps, pt, pz, asked, _SHADOW_BIAS)
        strength = strength * (1 - dark.view(-1))
    return strength * lit


def _sky(lighting: Lighting, rays: Tensor) -> Tensor:
    length = (rays[0] * rays[0] + rays[1] * rays[1] + rays[2] * rays[2]).sqrt()
    height = (rays[2] / length * 1.6).clamp(0, 1)
    ends = zip(lighting.horizon.tolist(), lighting.zenith.tolist(), strict=True)
    return torch.stack([low + height * (high - low) for low, high in ends])

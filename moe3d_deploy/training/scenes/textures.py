"""The colours of surface points: patterns and noise, evaluated at many points at once.

Patterns fade to their mean where a pixel is wider than they are, so that distant floors do not flicker from view to
view. Noise comes from a fixed lattice of random values, never from a random generator's state.
"""

import functools

import numpy as np
import torch
from torch import Tensor

from moe3d_deploy.training.scenes import materials as m
from moe3d_deploy.training.scenes import photographs
from moe3d_deploy.training.scenes.materials import Pattern

_LATTICE = 64  # cells until the noise repeats
_OCTAVES = 3
_SEED = 20240713  # of the lattice


@functools.lru_cache(maxsize=4)
def _lattice(device: torch.device) -> Tensor:
    values = np.random.default_rng(_SEED).random(_LATTICE * _LATTICE, dtype=np.float32)
    return torch.from_numpy(values).to(device)


def colours(rows: Tensor, number: Tensor, s: Tensor, t: Tensor, footprint: Tensor) -> Tensor:
    """Albedo of points in linear light.

    rows (M, COLUMNS)      materials
    number (P,) int64      each point's material
    s, t (P,)              where on its surface it lies, scene units
    footprint (P,)         how much of the surface a pixel covers, scene units
    returns (3, P)
    """
    row = rows.T.contiguous().index_select(1, number)
    scale = row[m.SCALE]
    x = (s * row[m.COSINE] + t * row[m.SINE]) * scale
    y = (t * row[m.COSINE] - s * row[m.SINE]) * (scale * row[m.ASPECT])
    width = (footprint * scale).clamp_min(1e-4)
    noise = _noise(
        s * row[m.NOISE_SCALE] + row[m.OFFSET_S], t * row[m.NOISE_SCALE] + row[m.OFFSET_T],
        footprint * row[m.NOISE_SCALE],
    )  # fmt: skip
    mix = _mix(row, x, y, width, noise)
    shade = 1 + row[m.NOISE_AMOUNT] * (noise - 0.5)
    first, second = row[m.COLOUR_A], row[m.COLOUR_B]
    result = (first + mix * (second - first)) * shade
    where = torch.nonzero(row[m.PHOTO] >= 0).view(-1)
    if len(where):
        part = row.index_select(1, where)
        ps, pt = s[where], t[where]
        x = (ps * part[m.COSINE] + pt * part[m.SINE]) * part[m.PHOTO_SCALE] + part[m.OFFSET_S]
        y = (pt * part[m.COSINE] - ps * part[m.SINE]) * part[m.PHOTO_SCALE] + part[m.OFFSET_T]
        width = footprint[where] * part[m.PHOTO_SCALE]
        result[:, where] = photographs.sample(part[m.PHOTO].to(torch.int64), x, y, width)
    return result


def _mix(row: Tensor, x: Tensor, y: Tensor, width: Tensor, noise: Tensor) -> Tensor:
    """The share of colour B, (P,)."""
    pattern, duty = row[m.PATTERN], row[m.DUTY]
    square_x, square_y = _square(x, duty, width), _square(y, duty, width * row[m.ASPECT])
    row_of = torch.floor(y)
    odd = row_of - 2 * torch.floor(row_of / 2)
    shifted = _square(x + 0.5 * odd, duty, width)
    dx, dy = x - torch.floor(x) - 0.5, y - torch.floor(y) - 0.5
    dots = ((0.16 * (0.5 + duty) - (dx * dx + dy * dy)) / width + 0.5).clamp(0, 1)
    gradient = (2 * (0.25 * x - torch.floor(0.25 * x)) - 1).abs()
    choices = {
        Pattern.CHECKER: square_x + square_y - 2 * square_x * square_y,
        Pattern.STRIPES: square_x,
        Pattern.BRICKS: torch.maximum(shifted, square_y),
        Pattern.TILES: torch.maximum(square_x, square_y),
        Pattern.DOTS: dots,
        Pattern.GRADIENT: gradient,
        Pattern.NOISE: (2.5 * noise - 0.75).clamp(0, 1),
    }
    mix = torch.zeros_like(x)
    for kind, value in choices.items():
        mix = mix + value * (pattern == float(kind))
    return mix


def _square(x: Tensor, duty: Tensor, width: Tensor) -> Tensor:
    """A square wave of period 1, 1 for the share `duty`, with edges as wide as a pixel; its mean where that is wide."""
    inside = duty / 2 - (x - torch.floor(x) - 0.5).abs()
    sharp = (inside / width + 0.5).clamp(0, 1)
    fade = (2 * width - 0.5).clamp(0, 1)
    return sharp + fade * (duty - sharp)


def _noise(x: Tensor, y: Tensor, width: Tensor) -> Tensor:
    """Value noise in 0..1 with a mean of one half; octaves finer than a pixel fade out."""
    lattice = _lattice(x.device)
    total = torch.full_like(x, 0.5)
    weight = 0.5
    for octave in range(_OCTAVES):
        frequency = float(2**octave)
        fx, fy = x * frequency + 17.3 * octave, y * frequency + 5.7 * octave
        floor_x, floor_y = torch.floor(fx), torch.floor(fy)
        ix, iy = floor_x.to(torch.int32), floor_y.to(torch.int32)
        dx, dy = fx - floor_x, fy - floor_y
        dx, dy = dx * dx * (3 - 2 * dx), dy * dy * (3 - 2 * dy)
        left, right = ix & (_LATTICE - 1), (ix + 1) & (_LATTICE - 1)
        upper, lower = (iy & (_LATTICE - 1)) * _LATTICE, ((iy + 1) & (_LATTICE - 1)) * _LATTICE
        v00, v01 = lattice.index_select(0, upper + left), lattice.index_select(0, upper + right)
        v10, v11 = lattice.index_select(0, lower + left), lattice.index_select(0, lower + right)
        top, bottom = v00 + dx * (v01 - v00), v10 + dx * (v11 - v10)
        value = top + dy * (bottom - top) - 0.5
        fade = (1.5 - 2 * frequency * width).clamp(0, 1)
        total = total + 1.1 * weight * fade * value
        weight /= 2
    return total.clamp(0, 1)

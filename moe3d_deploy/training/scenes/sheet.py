"""Contact sheets: the views of many scenes beside their inverse depth, normals and edges."""

from collections.abc import Iterable

import numpy as np

from moe3d_deploy.runtime.colormaps import colorize
from moe3d_deploy.training.scenes.options import Scene
from moe3d_deploy.training.scenes.solids import Array

_GAP = 4  # pixels, white


def contact_sheet(scenes: Iterable[Scene], columns: int = 2) -> Array:
    """(height, width, 3) uint8: per scene a row of its views, and one each of inverse depth, normals and edges."""
    blocks = [_block(scene) for scene in scenes]
    blocks += [np.full_like(blocks[0], 255)] * (-len(blocks) % columns)
    rows = [np.concatenate(blocks[i : i + columns], axis=1) for i in range(0, len(blocks), columns)]
    return np.concatenate(rows, axis=0)


def _block(scene: Scene) -> Array:
    images = scene.images.cpu().numpy().transpose(0, 2, 3, 1)
    depth = scene.depth.cpu().numpy()
    with np.errstate(divide="ignore"):
        inverse = np.where(depth > 0, 1 / depth, np.nan)
    tops = [np.nanpercentile(inverse, 98), np.nanpercentile(inverse, 1)]
    rows = [list(images)]
    rows.append([colorize(part, lo=tops[1], hi=tops[0]) for part in inverse])
    normals = np.round((scene.normals.cpu().numpy() * 0.5 + 0.5) * 255).astype(np.uint8)
    rows.append([np.where(d[..., None] > 0, part, 0).astype(np.uint8) for part, d in zip(normals, depth, strict=True)])
    rows.append(
        [np.repeat(np.where(part, 0, 255)[..., None], 3, -1).astype(np.uint8) for part in scene.edges.cpu().numpy()]
    )
    pad = ((0, _GAP), (0, _GAP), (0, 0))
    lines = [np.concatenate([np.pad(part, pad, constant_values=255) for part in row], axis=1) for row in rows]
    return np.pad(np.concatenate(lines, axis=0), ((0, 2 * _GAP), (0, 2 * _GAP), (0, 0)), constant_values=255)

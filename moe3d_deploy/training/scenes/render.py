"""A seed and options -> a rendered scene."""

import numpy as np
import torch
from torch import Tensor

from moe3d_deploy.training.scenes import photographs
from moe3d_deploy.training.scenes.cast import Tiles, first_hits
from moe3d_deploy.training.scenes.effects import camera_effects, exposed, noisy
from moe3d_deploy.training.scenes.options import Scene, SceneOptions, check_seed
from moe3d_deploy.training.scenes.shade import radiance, surface, view_rays
from moe3d_deploy.training.scenes.world import describe

EDGE_RATIO = 1.05


def render_scene(seed: int, options: SceneOptions | None = None, device: str | torch.device = "cpu") -> Scene:
    """Render the scene of a seed: S views with exact depth, normals, cameras and occlusion edges.

    seed     0 and above; with the split it decides everything that is drawn at random
    options  SceneOptions() by default
    device   of the tensors that come back, and where the rays are cast

    On the CPU the result is equal to the bit for equal seed and options, whatever the number of threads and whatever
    was rendered before. Raises InputError for a seed that is not a whole number of 0 or more, MissingExtraError for
    photographs without scikit-image.
    """
    options = options or SceneOptions()
    check_seed(seed)
    where = torch.device(device)
    height, width = options.height, options.width
    if options.photographs:
        photographs.atlas(where)  # what is missing is told before anything is drawn
    world = describe(seed, options, len(photographs.NAMES) if options.photographs else 0)
    tiles = Tiles(options.views, height, width)
    cameras = world.cameras.projection(height, width)
    with torch.no_grad():
        rays = view_rays(cameras, tiles, where)
        hits = first_hits(world.solids, cameras, tiles, where)
        at = surface(world.solids, cameras, tiles, hits, rays)
        light = radiance(
            world.solids, world.materials, world.lighting, hits, at, rays, world.cameras.focal(width)
        )  # fmt: skip
        images = torch.stack([tiles.image(channel.view(64, -1)) for channel in light], dim=1)
        surfaces = tiles.image(hits.solid).to(torch.int32)
        inverse = tiles.image(hits.inverse_depth)
        depth = torch.where(inverse > 0, 1 / inverse, 0.0)
        hit = (surfaces >= 0).float()
        normals = torch.stack([tiles.image(part.view(64, -1)) * hit for part in at.normal], dim=-1)
        images = _develop(images, world.effects, options.camera_effects)
    extrinsics = torch.from_numpy(world.cameras.extrinsics().astype(np.float32)).to(where)
    intrinsics = torch.from_numpy(world.cameras.intrinsics(height, width).astype(np.float32)).to(where)
    return Scene(
        images=images,
        depth=depth,
        normals=normals,
        extrinsics=extrinsics,
        intrinsics=intrinsics.expand(options.views, 3, 3).contiguous(),
        edges=occlusion_edges(inverse, surfaces),
        surfaces=surfaces,
        kinds=world.kinds,
        seed=seed,
    )


def _develop(light: Tensor, rng: np.random.Generator, effects: bool) -> Tensor:
    """Linear light (S, 3, H, W) -> uint8 pictures, with a gamma of 2."""
    light = exposed(light, float(rng.uniform(0.18, 0.42)))
    if effects:
        light = camera_effects(light, rng)
    picture = light.clamp(0, 1).sqrt()
    if effects:
        picture = noisy(picture, rng)
    return (picture.clamp(0, 1) * 255).round().to(torch.uint8)


def occlusion_edges(inverse_depth: Tensor, surfaces: Tensor) -> Tensor:
    """Pixels in front of a 4-neighbour of another surface that is farther by EDGE_RATIO: (S, H, W) bool.

    inverse_depth (S, H, W), 0 where nothing was hit; surfaces (S, H, W)
    """
    edges = torch.zeros_like(surfaces, dtype=torch.bool)
    for axis in (1, 2):
        n = inverse_depth.shape[axis]
        a, b = slice_of(axis, 0, n - 1), slice_of(axis, 1, n)
        differs = surfaces[a] != surfaces[b]
        edges[a] |= differs & (inverse_depth[a] > EDGE_RATIO * inverse_depth[b])
        edges[b] |= differs & (inverse_depth[b] > EDGE_RATIO * inverse_depth[a])
    return edges


def slice_of(axis: int, start: int, stop: int) -> tuple[slice, ...]:
    return tuple(slice(start, stop) if i == axis else slice(None) for i in range(3))

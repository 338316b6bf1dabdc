"""The description of a scene: what stands where, in which light, seen by which cameras. It makes no pixels."""

from dataclasses import dataclass

import numpy as np

from moe3d_deploy.training.scenes.layout import Layout, lay_out
from moe3d_deploy.training.scenes.materials import Palette
from moe3d_deploy.training.scenes.options import GENERATOR_VERSION, SPLITS, SceneOptions
from moe3d_deploy.training.scenes.paths import Cameras
from moe3d_deploy.training.scenes.shade import Light, Lighting
from moe3d_deploy.training.scenes.solids import Array, Solids, pack
from moe3d_deploy.training.scenes.viewpoints import find_cameras

_SUN = 40.0  # how far away, in scene units
_MOST_WORLDS = 50  # tried until cameras find a place; one or two as a rule


@dataclass(frozen=True)
class World:
    """A scene before it is rendered; `materials` (M, COLUMNS) float32; `effects` draws what cameras do to pictures."""

    solids: Solids
    materials: Array
    lighting: Lighting
    cameras: Cameras
    kinds: tuple[str, ...]
    effects: np.random.Generator


def describe(seed: int, options: SceneOptions, photographs: int = 0) -> World:
    """The world of a seed. It depends on the size of the pictures through their aspect alone.

    photographs: how many there are to choose from
    """
    for attempt in range(_MOST_WORLDS):
        stream = np.random.SeedSequence([GENERATOR_VERSION, SPLITS.index(options.split), seed, attempt])
        rng, photo_rng, effects = (np.random.Generator(np.random.PCG64(part)) for part in stream.spawn(3))
        palette = Palette(rng, photo_rng, photographs)
        layout = lay_out(rng, palette, options.split)
        lighting = _lighting(rng, layout)
        solids = pack(layout.solids)
        cameras = find_cameras(rng, solids, layout, options)
        if cameras is not None:
            return World(solids, palette.rows, lighting, cameras, tuple(sorted(layout.kinds)), effects)
    raise RuntimeError(f"no cameras found for seed {seed}, {options}")  # one world in ten has none


def _lighting(rng: np.random.Generator, layout: Layout) -> Lighting:
    horizon = rng.uniform(0.55, 0.9) * np.array([rng.uniform(0.75, 1), rng.uniform(0.85, 1), 1.0])
    zenith = horizon * np.array([rng.uniform(0.3, 0.9), rng.uniform(0.5, 0.95), 1.0])
    ambient = rng.uniform(0.2, 0.5) * np.array([rng.uniform(0.85, 1), rng.uniform(0.9, 1), 1.0])
    colour = np.array([1.0, rng.uniform(0.85, 1.0), rng.uniform(0.7, 1.0)])
    lights = [_light(rng, layout, rng.uniform(0.6, 1.1) * colour, shadows=True)]
    if rng.random() < 0.4:
        colour = np.array([rng.uniform(0.8, 1.0), rng.uniform(0.85, 1.0), 1.0])
        lights.append(_light(rng, layout, rng.uniform(0.2, 0.5) * colour, shadows=rng.random() < 0.4))
    return Lighting(tuple(lights), ambient, horizon, zenith)


def _light(rng: np.random.Generator, layout: Layout, colour: Array, *, shadows: bool) -> Light:
    """A sun, or a lamp above a ceiling that lets its light through: below it, everything is on one side."""
    if layout.ceiling is None:
        around, lift = rng.uniform(-np.pi, np.pi), rng.uniform(0.5, 1.3)
        position = _SUN * np.array([np.cos(around) * np.cos(lift), np.sin(around) * np.cos(lift), np.sin(lift)])
        return Light(position, np.zeros(3), colour, _SUN, shadows)
    x, y = rng.uniform(-0.9, 0.9, 2) * np.array([layout.x, layout.y])
    height = layout.ceiling + rng.uniform(0.4, 2.5)
    return Light(np.array([x, y, height]), np.array([x, y, 0]), colour, height * rng.uniform(0.8, 1.1), shadows)

"""What surfaces look like, as numbers: colours, patterns and their sizes, drawn at random."""

from enum import IntEnum

import numpy as np

from moe3d_deploy.training.scenes.solids import Array


class Pattern(IntEnum):
    """How colour B lies on colour A."""

    PLAIN = 0
    CHECKER = 1
    STRIPES = 2
    BRICKS = 3  # B is the mortar
    TILES = 4  # B is the joint
    DOTS = 5
    GRADIENT = 6
    NOISE = 7


# Columns of a material.
COLOUR_A, COLOUR_B = slice(0, 3), slice(3, 6)
PATTERN, SCALE, COSINE, SINE, ASPECT, DUTY = range(6, 12)  # scale: periods per unit of length
NOISE_SCALE, NOISE_AMOUNT, OFFSET_S, OFFSET_T = range(12, 16)
PHOTO, PHOTO_SCALE = 16, 17  # -1: none; pictures per unit of length
COLUMNS = 18

_JOINTED = (Pattern.BRICKS, Pattern.TILES)


class Palette:
    """Collects the materials of one scene and draws them from a few hues, so that a scene has a look of its own."""

    def __init__(self, rng: np.random.Generator, photo_rng: np.random.Generator, photographs: int = 0) -> None:
        """`photographs` is how many there are to choose from; they have a generator of their own, so that a scene is
        the same with and without them but for its textures."""
        self._rng, self._photo_rng, self._photographs = rng, photo_rng, photographs
        self._rows: list[Array] = []
        self._hues = rng.uniform(0, 1, rng.integers(2, 6))
        self._saturation = rng.uniform(0.25, 1.0)

    @property
    def rows(self) -> Array:
        """(materials, COLUMNS) float32."""
        return np.array(self._rows, np.float32)

    def thing(self, size: float, dull: float = 0.25) -> int:
        """A material for an object of `size` units, plain with the probability `dull`; its number."""
        periods = np.exp(self._rng.uniform(np.log(1.5), np.log(9)))
        return self._add(size, periods, dull, (self._colour(0.06, 0.85), self._colour(0.06, 0.85)), photo=0.35)

    def surface(self, size: float, dull: float) -> int:
        """A material for a wall or a floor: more periods, paler colours."""
        first, second = self._colour(0.2, 0.8), self._colour(0.2, 0.8)
        if self._rng.random() < 0.5:  # alike, as on wallpaper
            second = first * self._rng.uniform(0.55, 0.85)
        return self._add(size, self._rng.uniform(4, 16), dull, (first, second), photo=0.45)

    def leaf(self, size: float) -> int:
        """Mostly greens."""
        rng = self._rng
        green = np.array([rng.uniform(0.05, 0.45), rng.uniform(0.25, 0.6), rng.uniform(0.02, 0.15)])
        first = green if rng.random() < 0.8 else self._colour(0.1, 0.7)
        return self._add(size, 2.0, 0.7, (first, 0.6 * first), photo=0.0)

    def picture(self, size: float) -> int:
        """Rich in contrast; one whole photograph where there are any."""
        number = self._add(size, self._rng.uniform(1, 5), 0.0, (self._colour(0.4, 0.9), self._colour(0.03, 0.4)), 1.0)
        row = self._rows[number]
        if row[PHOTO] >= 0:
            row[PHOTO_SCALE], row[COSINE], row[SINE] = 1 / size, 1.0, 0.0
            row[OFFSET_S] = row[OFFSET_T] = 0.5
        return number

    def repeat(self, number: int) -> int:
        """Another material that looks like one there is."""
        self._rows.append(self._rows[number])
        return len(self._rows) - 1

    def _colour(self, low: float, high: float) -> Array:
        """In linear light, (3,)."""
        rng = self._rng
        hue = self._hues[rng.integers(len(self._hues))] + rng.normal(0, 0.04) if rng.random() < 0.8 else rng.random()
        saturation = self._saturation * rng.uniform(0.3, 1.0)
        value = rng.uniform(low**0.5, high**0.5) ** 2
        wheel = (min(max(abs((hue % 1 * 6 + turn) % 6 - 3) - 1, 0), 1) for turn in (0, 4, 2))
        return np.array([value * (1 - saturation * (1 - part)) for part in wheel])

    def _add(self, size: float, periods: float, dull: float, colours: tuple[Array, Array], photo: float) -> int:
        rng, row = self._rng, np.zeros(COLUMNS)
        pattern = Pattern.PLAIN if rng.random() < dull else Pattern(int(rng.integers(1, len(Pattern))))
        angle = np.pi / 2 * rng.integers(2) if pattern in _JOINTED else rng.uniform(0, np.pi)
        if rng.random() < 0.4:
            angle = 0.0
        row[COLOUR_A], row[COLOUR_B] = colours
        row[PATTERN], row[SCALE] = pattern, periods / size
        row[COSINE], row[SINE] = np.cos(angle), np.sin(angle)
        row[ASPECT] = rng.uniform(1.5, 3.5) if pattern == Pattern.BRICKS else rng.uniform(0.7, 1.4)
        row[DUTY] = rng.uniform(0.03, 0.12) if pattern in _JOINTED else rng.uniform(0.25, 0.75)
        row[NOISE_SCALE] = np.exp(rng.uniform(np.log(1.5), np.log(12))) / size
        row[NOISE_AMOUNT] = rng.uniform(0.1, 0.7)
        row[OFFSET_S], row[OFFSET_T] = rng.uniform(0, 64, 2)
        row[PHOTO] = -1
        if self._photographs and self._photo_rng.random() < photo:
            row[PHOTO] = self._photo_rng.integers(self._photographs)
            row[PHOTO_SCALE] = np.clip(periods, 1, 6) * self._photo_rng.uniform(0.4, 1.0) / size
        self._rows.append(row)
        return len(self._rows) - 1

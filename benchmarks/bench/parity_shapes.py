"""The shapes of a parity measurement: whatever the exporter was tuned and verified at is not among them."""

from collections.abc import Sequence

from moe3d_deploy import costs
from moe3d_deploy.config import ModelConfig
from moe3d_deploy.export.verify import SHAPES_IN_PATCHES
from moe3d_deploy.manifest import EngineRecord

Shape = tuple[int, int, int, int]

ESTIMATED_FLOPS_PER_SECOND = 200e9  # two cores
_GRID = 37  # patches of 14 along the 518 pixels of VGGT and MoE3D

# (B, S, rows, columns) in patches of a grid of _GRID, scaled to the model's own. For moe3d-1b the first four are views
# of 518x378 and 518x154 (width x height), which MoE3D was trained at, and both of these on end.
_AT_SIZE: tuple[Shape, ...] = (
    (1, 1, 27, 37),
    (1, 3, 11, 37),
    (1, 1, 37, 27),
    (1, 1, 37, 11),
    (1, 2, 27, 37),
    (1, 1, 37, 37),
)
# (B, S, rows, columns) in patches: single patches and strips of them, odd numbers of views, sides of every ratio, more
# than one scene.
_SMALL: tuple[Shape, ...] = (
    (1, 2, 1, 1), (3, 1, 1, 1), (1, 1, 1, 2), (1, 1, 2, 1), (1, 3, 1, 7), (1, 1, 9, 1), (1, 1, 1, 16), (1, 2, 16, 1),
    (1, 3, 3, 4), (1, 5, 4, 5), (1, 7, 4, 3), (1, 9, 3, 3), (1, 11, 2, 4), (1, 13, 2, 2),
    (1, 1, 3, 13), (1, 2, 13, 3), (1, 1, 4, 7), (1, 2, 7, 4), (1, 1, 5, 5), (1, 4, 6, 8), (1, 1, 8, 6), (1, 3, 9, 16),
    (1, 1, 16, 9), (1, 2, 10, 13), (1, 1, 12, 17), (1, 1, 17, 12), (1, 1, 7, 19), (1, 6, 5, 7), (1, 1, 19, 5),
    (2, 1, 4, 3), (2, 3, 3, 5), (3, 1, 5, 4), (3, 2, 2, 3), (2, 5, 2, 5), (3, 3, 3, 3),
)  # fmt: skip


def default_shapes(config: ModelConfig) -> list[Shape]:
    """(B, S, H, W) in pixels, 30 or more, all different, none of `export.verify`.

    At ESTIMATED_FLOPS_PER_SECOND a variant of moe3d-1b takes about 2 minutes for all of them (`estimated_seconds`),
    most of it for the six of the model's own size.
    """
    scale = config.pos_embed_grid / _GRID
    scaled = [(b, s, max(1, round(rows * scale)), max(1, round(columns * scale))) for b, s, rows, columns in _AT_SIZE]
    patch = config.patch_size
    return [
        (b, s, rows * patch, columns * patch)
        for b, s, rows, columns in dict.fromkeys((*scaled, *_SMALL))
        if (b, s, rows, columns) not in SHAPES_IN_PATCHES
    ]


def estimated_seconds(config: ModelConfig, shapes: Sequence[Shape]) -> float:
    """Of a variant, from `costs` alone: loading and the figures come on top."""
    return sum(sum(costs.flops_by_type(config, shape, costs.all_float32).values()) for shape in shapes) / (
        ESTIMATED_FLOPS_PER_SECOND
    )


def in_profiles(record: EngineRecord, shape: Shape) -> bool:
    """Whether one of an engine's profiles holds the shape."""
    return any(
        all(low <= size <= high for low, size, high in zip(profile.min, shape, profile.max, strict=True))
        for profile in record.profiles
    )

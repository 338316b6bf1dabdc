"""What the tests of the cost model share: odd and random configs, and models without data."""

import torch
from hypothesis import strategies as st

from moe3d_deploy.config import (
    AggregatorConfig,
    CameraHeadConfig,
    DptHeadConfig,
    ModelConfig,
    MoeConfig,
    VitConfig,
)
from moe3d_deploy.costs import Shape4
from moe3d_deploy.model import MoE3D

# No two sizes alike, none a power of two of another, so that a mixed-up size shows.
ODD = ModelConfig(
    img_size=35,
    patch_size=7,
    vit=VitConfig(embed_dim=24, depth=2, num_heads=3, mlp_ratio=2.3, num_register_tokens=3),
    aggregator=AggregatorConfig(embed_dim=24, depth=3, num_heads=2, mlp_ratio=3.1, num_register_tokens=1),
    camera_head=CameraHeadConfig(dim_in=48, trunk_depth=5, num_heads=4, num_iterations=3),
    dpt_head=DptHeadConfig(dim_in=48, features=40, out_channels=(4, 12, 20, 28), intermediate_layer_idx=(0, 2, 1, 1)),
    moe=MoeConfig(num_experts=3, hidden_channels=5, gate_hidden_channels=9),
)


def configs() -> st.SearchStrategy[ModelConfig]:
    """Small models of any proportions."""

    def build(
        heads: int, quarter: int, ratio: float, registers: tuple[int, int], depths: tuple[int, int, int, int],
        features: int, widths: tuple[int, int, int, int], patch: int, moe: MoeConfig | None, point_head: bool,
    ) -> ModelConfig:  # fmt: skip
        dim = heads * quarter * 4
        last = depths[1] - 1
        return ModelConfig(
            img_size=3 * patch,
            patch_size=patch,
            vit=VitConfig(dim, depths[0], heads, ratio, registers[0]),
            aggregator=AggregatorConfig(dim, depths[1], heads, ratio + 0.5, registers[1]),
            camera_head=CameraHeadConfig(2 * dim, depths[2], heads, depths[3]),
            dpt_head=DptHeadConfig(2 * dim, features, widths, (0, last, last, 0)),
            moe=moe,
            point_head=point_head,
        )

    few, width = st.integers(1, 3), st.integers(1, 7).map(lambda n: 4 * n)
    experts = st.builds(MoeConfig, st.sampled_from([1, 2, 4, 8]), st.integers(1, 9), st.integers(1, 9))
    return st.builds(
        build, few, few, st.floats(0.5, 4), st.tuples(few, few), st.tuples(few, few, few, few),
        st.integers(1, 5).map(lambda n: 8 * n), st.tuples(width, width, width, width), st.integers(2, 16),
        st.none() | experts, st.booleans(),
    )  # fmt: skip


def grids() -> st.SearchStrategy[tuple[int, int, int, int]]:
    """Scenes, views, rows and columns of patches."""
    return st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6))


def in_pixels(config: ModelConfig, grid: tuple[int, int, int, int]) -> Shape4:
    batch, views, rows, columns = grid
    return batch, views, rows * config.patch_size, columns * config.patch_size


def meta_model(config: ModelConfig) -> MoE3D:
    with torch.device("meta"):
        return MoE3D(config).requires_grad_(False)

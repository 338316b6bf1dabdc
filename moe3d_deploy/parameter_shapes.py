"""Names and shapes of a model's weights from its config alone: what `MoE3D(config).state_dict()` has, without torch."""

from collections.abc import Iterator

from moe3d_deploy.config import DptHeadConfig, ModelConfig

POSE_DIM = 9  # translation 3, quaternion 4, fields of view 2
OUTPUT_HIDDEN = 32  # channels between the last two convolutions of VGGT's heads
CAMERA_MLP_RATIO = 4  # of the camera head's blocks; no config changes it
DEPTH_CHANNELS, POINT_CHANNELS = 2, 4  # value and confidence

Shape = tuple[int, ...]
_Named = Iterator[tuple[str, Shape]]


def parameter_shapes(config: ModelConfig, *, point_head: bool | None = None) -> dict[str, Shape]:
    """State-dict key -> shape, experts in their plain form (merging them moves values, and adds none).

    point_head   with VGGT's point head or not; default: as the config says
    """
    return dict(_model(config, config.point_head if point_head is None else point_head))


def mlp_width(ratio: float, dim: int) -> int:
    """Hidden channels of a block's MLP."""
    return int(ratio * dim)


def _model(config: ModelConfig, point_head: bool) -> _Named:
    vit, aggregator, head = config.vit, config.aggregator, config.dpt_head
    dim = aggregator.embed_dim
    yield "aggregator.camera_token", (1, 2, 1, dim)
    yield "aggregator.register_token", (1, 2, aggregator.num_register_tokens, dim)

    encoder = "aggregator.patch_embed"
    yield f"{encoder}.cls_token", (1, 1, dim)
    yield f"{encoder}.pos_embed", (1, 1 + config.pos_embed_grid**2, dim)
    yield f"{encoder}.register_tokens", (1, vit.num_register_tokens, dim)
    yield f"{encoder}.mask_token", (1, dim)
    yield from _layer(f"{encoder}.patch_embed.proj", (dim, 3, config.patch_size, config.patch_size))
    for i in range(vit.depth):
        yield from _block(f"{encoder}.blocks.{i}", dim, mlp_width(vit.mlp_ratio, dim))
    yield from _layer(f"{encoder}.norm", (dim,))
    for kind in ("frame", "global"):
        for i in range(aggregator.depth):
            name = f"aggregator.{kind}_blocks.{i}"
            yield from _block(name, dim, mlp_width(aggregator.mlp_ratio, dim), dim // aggregator.num_heads)

    yield from _camera_head(config)
    if point_head:
        yield from _dense_body("point_head", head)
        yield from _branch("point_head.scratch.output_conv2", head.features // 2, OUTPUT_HIDDEN, POINT_CHANNELS)
    yield from _dense_body("depth_head", head)
    yield from _depth_output(config)


def _camera_head(config: ModelConfig) -> _Named:
    dim = config.camera_head.dim_in
    yield "camera_head.empty_pose_tokens", (1, 1, POSE_DIM)
    for i in range(config.camera_head.trunk_depth):
        yield from _block(f"camera_head.trunk.{i}", dim, CAMERA_MLP_RATIO * dim)
    yield from _layer("camera_head.token_norm", (dim,))
    yield from _layer("camera_head.trunk_norm", (dim,))
    yield from _layer("camera_head.embed_pose", (dim, POSE_DIM))
    yield from _layer("camera_head.poseLN_modulation.1", (3 * dim, dim))
    yield from _layer("camera_head.pose_branch.fc1", (dim // 2, dim))
    yield from _layer("camera_head.pose_branch.fc2", (POSE_DIM, dim // 2))


def _dense_body(prefix: str, head: DptHeadConfig) -> _Named:
    """A dense head up to its full-resolution features."""
    features, widths = head.features, head.out_channels
    yield from _layer(f"{prefix}.norm", (head.dim_in,))
    for i, width in enumerate(widths):
        yield from _layer(f"{prefix}.projects.{i}", (width, head.dim_in, 1, 1))
    yield from _layer(f"{prefix}.resize_layers.0", (widths[0], widths[0], 4, 4))
    yield from _layer(f"{prefix}.resize_layers.1", (widths[1], widths[1], 2, 2))
    yield from _layer(f"{prefix}.resize_layers.3", (widths[3], widths[3], 3, 3))
    for level, width in enumerate(widths, start=1):
        yield f"{prefix}.scratch.layer{level}_rn.weight", (features, width, 3, 3)
    for level in (1, 2, 3, 4):
        name = f"{prefix}.scratch.refinenet{level}"
        yield from _layer(f"{name}.out_conv", (features, features, 1, 1))
        for unit in (1, 2) if level < 4 else (2,):  # the coarsest has nothing to add to
            for conv in (1, 2):
                yield from _layer(f"{name}.resConfUnit{unit}.conv{conv}", (features, features, 3, 3))
    yield from _layer(f"{prefix}.scratch.output_conv1", (features // 2, features, 3, 3))


def _depth_output(config: ModelConfig) -> _Named:
    moe, channels = config.moe, config.dpt_head.features // 2
    if moe is None:
        yield from _branch("depth_head.scratch.output_conv2", channels, OUTPUT_HIDDEN, DEPTH_CHANNELS)
        return
    for k in range(moe.num_experts):
        yield from _branch(f"depth_head.experts.{k}", channels, moe.hidden_channels, DEPTH_CHANNELS)
    yield from _branch("depth_head.gate", channels, moe.gate_hidden_channels, moe.num_experts)


def _branch(name: str, channels: int, hidden: int, out: int) -> _Named:
    yield from _layer(f"{name}.0", (hidden, channels, 3, 3))
    yield from _layer(f"{name}.2", (out, hidden, 1, 1))


def _block(name: str, dim: int, hidden: int, normed_head_dim: int | None = None) -> _Named:
    """A transformer block; `normed_head_dim` where queries and keys are normalised."""
    yield from _layer(f"{name}.norm1", (dim,))
    yield from _layer(f"{name}.attn.qkv", (3 * dim, dim))
    if normed_head_dim is not None:
        yield from _layer(f"{name}.attn.q_norm", (normed_head_dim,))
        yield from _layer(f"{name}.attn.k_norm", (normed_head_dim,))
    yield from _layer(f"{name}.attn.proj", (dim, dim))
    yield f"{name}.ls1.gamma", (dim,)
    yield from _layer(f"{name}.norm2", (dim,))
    yield from _layer(f"{name}.mlp.fc1", (hidden, dim))
    yield from _layer(f"{name}.mlp.fc2", (dim, hidden))
    yield f"{name}.ls2.gamma", (dim,)


def _layer(name: str, weight: Shape) -> _Named:
    """A layer with a bias as long as its first axis (of these transposed convolutions both axes are equal)."""
    yield f"{name}.weight", weight
    yield f"{name}.bias", weight[:1]

"""What a model costs to run, from its config alone: FLOPs, parameters, bytes of weights, least bytes moved.

Exact integers, without torch. One multiply-add is 2 FLOP; matrix products, convolutions and attention count, all other
operations (norms, activations, softmax, resizing, position embeddings) are 0. Formulas: docs/costs.md. How much memory
a run takes beside its weights is `memory`'s subject.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from moe3d_deploy.config import ModelConfig
from moe3d_deploy.errors import InputError
from moe3d_deploy.parameter_shapes import (
    CAMERA_MLP_RATIO,
    DEPTH_CHANNELS,
    OUTPUT_HIDDEN,
    POINT_CHANNELS,
    POSE_DIM,
    mlp_width,
    parameter_shapes,
)

Shape4 = tuple[int, int, int, int]
"""batch, views, height, width"""
TypeOf = Callable[[str], str]
"""From a parameter's name to the type of its layer, a key of BYTES. A layer computes in the type of its weights."""

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
_IMAGE_CHANNELS = 3


def all_float32(name: str) -> str:
    """The rule of a model that is float32 throughout."""
    return "float32"


class Work(NamedTuple):
    """FLOPs of like layers, and the parameter whose type is theirs."""

    component: str
    parameter: str
    flops: int


@dataclass(frozen=True)
class Sizes:
    """The counts that formulas are written in: B scenes of S views of H x W pixels, cut into patches.

    `patches` P, `coarse` Q, `pixels`, `tokens` and `levels` are of one view.
    """

    config: ModelConfig
    batch: int
    views: int
    height: int
    width: int

    @classmethod
    def of(cls, config: ModelConfig, shape: Shape4) -> "Sizes":
        """Of a shape (B, S, H, W). Raises InputError for one that the model cannot take."""
        check_shape(config, shape)
        return cls(config, *shape)

    @property
    def images(self) -> int:
        """All views of all scenes, N."""
        return self.batch * self.views

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.height // self.config.patch_size, self.width // self.config.patch_size

    @property
    def patches(self) -> int:
        return math.prod(self.grid)

    @property
    def pixels(self) -> int:
        return self.height * self.width

    @property
    def levels(self) -> list[tuple[int, int]]:
        """(rows, columns) of the dense heads' four levels, the finest first: 4, 2, 1 and 1/2 times the grid."""
        rows, columns = self.grid
        return [(4 * rows, 4 * columns), (2 * rows, 2 * columns), self.grid, (-(-rows // 2), -(-columns // 2))]

    @property
    def coarse(self) -> int:
        """Pixels of the dense heads' coarsest level."""
        return math.prod(self.levels[-1])

    @property
    def tokens(self) -> int:
        """In the aggregator, T."""
        return self.tokens_with(self.config.aggregator.num_register_tokens)

    def tokens_with(self, registers: int) -> int:
        """One class or camera token, the registers, the patches."""
        return 1 + registers + self.patches


def check_shape(config: ModelConfig, shape: Shape4) -> None:
    """Raise InputError, naming what to use instead, unless the model runs on (batch, views, height, width)."""
    text = "x".join(map(str, shape))
    if len(shape) != 4 or not all(isinstance(size, int) and size >= 1 for size in shape):
        raise InputError(f"shape {text}: expected 4 sizes of at least 1, BxSxHxW, for example 1x8x392x518")
    patch = config.patch_size
    for name, size in zip(("height", "width"), shape[2:], strict=True):
        if size % patch:
            below = size // patch * patch
            nearest = f"{below} and {below + patch}" if below else str(patch)
            raise InputError(
                f"shape {text}: {name} {size} is not a multiple of the patch size {patch}; nearest: {nearest}"
            )


def flops(
    config: ModelConfig, batch: int, views: int, height: int, width: int, *, point_head: bool | None = None
) -> dict[str, int]:
    """FLOPs of one run per component, in the order they run; their sum is `total_flops`.

    views         of each of the `batch` scenes
    height, width pixels, multiples of the patch size; anything else raises InputError
    point_head    count VGGT's point head or not; default: as the config says

    The merged and the plain form of the experts do equal work. `position_embedding_flops` come on top.
    """
    return _by(work(config, (batch, views, height, width), point_head=point_head), lambda item: item.component)


def total_flops(
    config: ModelConfig, views: int, height: int, width: int, *, batch: int = 1, point_head: bool | None = None
) -> int:
    """FLOPs of one run on `batch` scenes of `views` views; see `flops`."""
    return sum(flops(config, batch, views, height, width, point_head=point_head).values())


def flops_by_type(
    config: ModelConfig, shape: Shape4, type_of: TypeOf, *, point_head: bool | None = None
) -> dict[str, int]:
    """`total_flops` split by the type that computes them."""
    return _by(work(config, shape, point_head=point_head), lambda item: type_of(item.parameter))


def position_embedding_flops(config: ModelConfig, height: int, width: int) -> int:
    """FLOPs of the two matrix products that resample the encoder's position embedding, once a run.

    They stand in for an interpolation, which the convention counts as 0, so no total includes them. A counter over the
    PyTorch model or the ONNX graph sees them.
    """
    sizes, stored = Sizes.of(config, (1, 1, height, width)), config.pos_embed_grid
    return 2 * config.vit.embed_dim * (sizes.grid[0] * stored * stored + sizes.patches * stored)


def expert_share(config: ModelConfig, views: int, height: int, width: int) -> float:
    """The experts' and the gate's additional work as a share of plain VGGT's with depth and camera heads, 0.02 for 2 %.

    0 for a config without experts.
    """
    plain = total_flops(replace(config, moe=None), views, height, width, point_head=False)
    return total_flops(config, views, height, width, point_head=False) / plain - 1


def parameters(config: ModelConfig, *, point_head: bool | None = None) -> dict[str, int]:
    """Values in the weights per component, and their sum as "total"."""
    counts = dict.fromkeys(("encoder", "frame", "global", "special tokens", "camera head", "depth head"), 0)
    for name, shape in parameter_shapes(config, point_head=point_head).items():
        component = _owner(name)
        counts[component] = counts.get(component, 0) + math.prod(shape)
    return counts | {"total": sum(counts.values())}


def parameters_by_type(config: ModelConfig, type_of: TypeOf, *, point_head: bool | None = None) -> dict[str, int]:
    """Values in the weights per type, when each parameter has the type that `type_of` gives to its name."""
    counts: dict[str, int] = {}
    for name, shape in parameter_shapes(config, point_head=point_head).items():
        counts[type_of(name)] = counts.get(type_of(name), 0) + math.prod(shape)
    return counts


def weight_bytes(config: ModelConfig, type_of: TypeOf = all_float32, *, point_head: bool | None = None) -> int:
    """Bytes of the weights when each parameter has the type that `type_of` gives to its name."""
    counts = parameters_by_type(config, type_of, point_head=point_head)
    return sum(BYTES[kind] * count for kind, count in counts.items())


def traffic_bytes(
    config: ModelConfig, shape: Shape4, type_of: TypeOf = all_float32, *, point_head: bool | None = None
) -> int:
    """Least bytes between memory and processor when the model runs block by block: a floor.

    Weights are read once, images once, depth and confidence are written once. What passes from one transformer block or
    stage of a dense head (a component of `flops`) to the next is written once and read once by each of its readers;
    inside a block or stage everything stays on the chip. The camera head's tokens are too few to count. Images count as
    float32; a bundle that takes uint8 reads a quarter of that.
    """
    sizes, heads = Sizes.of(config, shape), _heads(config, point_head)
    total = weight_bytes(config, type_of, point_head=point_head)
    total += sizes.images * sizes.pixels * BYTES["float32"] * _IMAGE_CHANNELS
    for name, depth, registers in _trunk(config):
        values = sizes.images * sizes.tokens_with(registers) * config.vit.embed_dim
        total += 2 * depth * values * BYTES[type_of(f"{name}.0.ls1.gamma")]
    kept = len(set(config.dpt_head.intermediate_layer_idx))
    for head in heads:
        levels = kept * sizes.patches * config.token_dim * BYTES[type_of(f"{head}.norm.weight")]
        between = sum(2 * values * BYTES[type_of(name)] for values, name in _dense_borders(config, sizes, head))
        total += sizes.images * (levels + between + sizes.pixels * _channels_out(head) * BYTES["float32"])
    return total


def work(config: ModelConfig, shape: Shape4, *, point_head: bool | None = None) -> Iterator[Work]:
    """The layers that `flops` counts, in the order they run. Raises InputError for a shape that does not fit."""
    sizes = Sizes.of(config, shape)
    yield from _trunk_work(config, sizes)
    yield from _camera_work(config, sizes)
    for head in _heads(config, point_head):
        yield from _dense_work(config, sizes, head)
        for component, name, count, hidden, out in _branches(config, head):
            pixels, channels = sizes.images * sizes.pixels, config.dpt_head.features // 2
            yield Work(component, f"{name}.0.weight", count * 2 * pixels * 9 * channels * hidden)
            yield Work(component, f"{name}.2.weight", count * 2 * pixels * hidden * out)


def _heads(config: ModelConfig, point_head: bool | None) -> tuple[str, ...]:
    asked = config.point_head if point_head is None else point_head
    return ("depth_head", "point_head") if asked else ("depth_head",)


def _trunk_work(config: ModelConfig, sizes: Sizes) -> Iterator[Work]:
    vit, aggregator, dim = config.vit, config.aggregator, config.vit.embed_dim
    patch_conv = 2 * sizes.images * sizes.patches * _IMAGE_CHANNELS * config.patch_size**2 * dim
    yield Work("encoder patch conv", "aggregator.patch_embed.patch_embed.proj.weight", patch_conv)
    hidden = {"encoder": mlp_width(vit.mlp_ratio, dim)}
    for component, (name, depth, registers) in zip(("encoder", "frame", "global"), _trunk(config), strict=True):
        tokens = sizes.tokens_with(registers)
        # A global block attends over all views of a scene, the others inside each view.
        sequences, length = (sizes.batch, sizes.views * tokens) if component == "global" else (sizes.images, tokens)
        width = hidden.get(component, mlp_width(aggregator.mlp_ratio, dim))
        linear = depth * sizes.images * tokens * _block_linear(dim, width)
        yield Work(f"{component} linear", f"{name}.0.attn.qkv.weight", linear)
        yield Work(f"{component} attention", f"{name}.0.attn.qkv.bias", depth * sequences * _attention(length, dim))


def _trunk(config: ModelConfig) -> tuple[tuple[str, int, int], ...]:
    """The three stacks of blocks: where their weights are, how many there are, register tokens."""
    vit, aggregator = config.vit, config.aggregator
    return (
        ("aggregator.patch_embed.blocks", vit.depth, vit.num_register_tokens),
        ("aggregator.frame_blocks", aggregator.depth, aggregator.num_register_tokens),
        ("aggregator.global_blocks", aggregator.depth, aggregator.num_register_tokens),
    )


def _camera_work(config: ModelConfig, sizes: Sizes) -> Iterator[Work]:
    """Every iteration: embed the pose, modulate, the trunk over the scene's camera tokens, the pose's update."""
    head, dim = config.camera_head, config.camera_head.dim_in
    blocks = sizes.images * _block_linear(dim, CAMERA_MLP_RATIO * dim) + sizes.batch * _attention(sizes.views, dim)
    modulation = 2 * sizes.images * (POSE_DIM * dim + dim * 3 * dim)
    update = 2 * sizes.images * (dim * (dim // 2) + (dim // 2) * POSE_DIM)
    iteration = modulation + head.trunk_depth * blocks + update
    yield Work("camera head", "camera_head.trunk.0.attn.qkv.weight", head.num_iterations * iteration)


def _dense_work(config: ModelConfig, sizes: Sizes, head: str) -> Iterator[Work]:
    """A dense head up to its full-resolution features. Level i has 16, 4, 1 times the patches, and Q values."""
    dpt, images, patches, coarse = config.dpt_head, sizes.images, sizes.patches, sizes.coarse
    f, widths, levels = dpt.features, dpt.out_channels, (16 * patches, 4 * patches, patches, coarse)
    label = head.replace("_", " ")

    def part(name: str, parameter: str, flops_of_a_view: int) -> Work:
        return Work(f"{label} {name}", f"{head}.{parameter}.weight", images * flops_of_a_view)

    yield part("projects", "projects.0", 2 * patches * dpt.dim_in * sum(widths))
    resize = 2 * patches * (16 * widths[0] ** 2 + 4 * widths[1] ** 2) + 2 * coarse * 9 * widths[3] ** 2
    yield part("resize_layers", "resize_layers.0", resize)
    to_features = sum(2 * 9 * f * size * width for size, width in zip(levels, widths, strict=True))
    yield part("layer_rn", "scratch.layer1_rn", to_features)
    finer = (64 * patches, *levels)  # what each level is enlarged to, before its 1x1 convolution
    for level in (4, 3, 2, 1):
        units = 1 if level == 4 else 2  # of two 3x3 convolutions each
        fusion = units * 2 * (2 * 9 * f * f * levels[level - 1]) + 2 * f * f * finer[level - 1]
        yield part(f"refinenet{level}", f"scratch.refinenet{level}.out_conv", fusion)
    yield part("output_conv1", "scratch.output_conv1", 2 * 9 * 64 * patches * f * (f // 2))


def _branches(config: ModelConfig, head: str) -> Iterator[tuple[str, str, int, int, int]]:
    """What follows a head's full-resolution features, 3x3 convolutions to hidden channels and 1x1 to the output ones.

    Component, where the weights are, number of equal branches, hidden and output channels.
    """
    moe = config.moe if head == "depth_head" else None
    if moe:
        yield "depth head experts", f"{head}.experts.0", moe.num_experts, moe.hidden_channels, DEPTH_CHANNELS
        yield "depth head gate", f"{head}.gate", 1, moe.gate_hidden_channels, moe.num_experts
    else:
        component = f"{head.replace('_', ' ')} output_conv2"
        yield component, f"{head}.scratch.output_conv2", 1, OUTPUT_HIDDEN, _channels_out(head)


def _dense_borders(config: ModelConfig, sizes: Sizes, head: str) -> Iterator[tuple[int, str]]:
    """Values of a view that pass from one stage of a dense head to the next, and the parameter with their type."""
    dpt, patches, coarse = config.dpt_head, sizes.patches, sizes.coarse
    f, widths, levels = dpt.features, dpt.out_channels, (16 * patches, 4 * patches, patches, coarse)
    yield patches * sum(widths), f"{head}.projects.0.weight"
    resized = sum(levels[i] * widths[i] for i in (0, 1, 3))  # the third level keeps its size: no stage of its own
    yield resized, f"{head}.resize_layers.0.weight"
    yield sum(levels) * f, f"{head}.scratch.layer1_rn.weight"
    yield (patches + 4 * patches + 16 * patches + 64 * patches) * f, f"{head}.scratch.refinenet1.out_conv.weight"
    yield 64 * patches * (f // 2), f"{head}.scratch.output_conv1.weight"


def _block_linear(dim: int, hidden: int) -> int:
    """FLOPs of a transformer block's linear layers for one token: qkv, proj, fc1, fc2."""
    return 2 * (3 * dim * dim + dim * dim + 2 * dim * hidden)


def _attention(length: int, dim: int) -> int:
    """FLOPs of q k^T and of its product with v over one sequence, all heads together."""
    return 4 * length * length * dim


def _channels_out(head: str) -> int:
    return DEPTH_CHANNELS if head == "depth_head" else POINT_CHANNELS


def _owner(name: str) -> str:
    """The component that a parameter belongs to."""
    for prefix, component in (
        ("aggregator.patch_embed.", "encoder"),
        ("aggregator.frame_blocks.", "frame"),
        ("aggregator.global_blocks.", "global"),
        ("aggregator.", "special tokens"),
        ("camera_head.", "camera head"),
        ("point_head.", "point head"),
        ("depth_head.experts.", "experts"),
        ("depth_head.gate.", "gate"),
    ):
        if name.startswith(prefix):
            return component
    return "depth head"


def _by(items: Iterator[Work], key: Callable[[Work], str]) -> dict[str, int]:
    totals: dict[str, int] = {}
    for item in items:
        totals[key(item)] = totals.get(key(item), 0) + item.flops
    return totals

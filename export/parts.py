"""What the files of a split model take and give, each in the terms of the whole contract. Without torch.

`heads`     images -> tokens of the layers that the dense heads read, and cameras | those tokens -> maps, view by view
`encoder`   images -> patch tokens, view by view | patch tokens -> every output

Tokens lie on the grid of their patches, (B, S, rows, columns, C), so that a file knows the size of its views from the
shape of what it takes. They are float32, the type of the residual stream in every precision: nothing is rounded
between two files that is not rounded inside one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from moe3d_deploy.config import ModelConfig
from moe3d_deploy.errors import InputError
from moe3d_deploy.export.contract import INPUTS, OUTPUTS, output_names, output_shapes
from moe3d_deploy.export.static import StaticShape
from moe3d_deploy.manifest import SPLITS, Part, Tensor

CAMERAS = ("extrinsics", "intrinsics", "pose_enc")
_OF_WORLD_POINTS = ("extrinsics", "intrinsics")
PATCH_TOKENS = "patch_tokens"


def level_name(layer: int) -> str:
    """The tensor of the patch tokens of one pair of aggregator blocks, counted from 0."""
    return f"tokens_{layer}"


def layers_of(config: ModelConfig) -> tuple[int, ...]:
    """The pairs of aggregator blocks whose tokens the dense heads read, each once, ascending."""
    return tuple(sorted(set(config.dpt_head.intermediate_layer_idx)))


def part_file(role: str) -> str:
    """The ONNX file of a part."""
    return f"model.{role}.onnx"


def model_inputs(input_type: str, static: StaticShape) -> tuple[Tensor, ...]:
    """What a model takes, split or not."""
    shape, meaning = INPUTS[input_type]
    return (Tensor("images", input_type, static.bind(shape), meaning),)


def model_outputs(requested: Sequence[str], config: ModelConfig, static: StaticShape) -> tuple[Tensor, ...]:
    """What a model gives, split or not, in its order."""
    names = output_names(requested)
    shapes = output_shapes(names, config)
    return tuple(
        Tensor(name, "float32", static.bind(shape), OUTPUTS[name][1]) for name, shape in zip(names, shapes, strict=True)
    )


def parts_of(
    split: str | None, config: ModelConfig, requested: Sequence[str], input_type: str, static: StaticShape
) -> tuple[Part, ...]:
    """The parts in the order they run; none for a model that is one file. Raises InputError for an unknown split."""
    if split is None:
        return ()
    if split not in SPLITS:
        raise InputError(f"split {split!r} is unknown; choose from {', '.join(SPLITS)}")
    of_a_view = replace(static, batch=None, views=None)  # what looks at each view by itself takes any number of them
    first, second = SPLITS[split]
    if split == "encoder":
        images, outputs = model_inputs(input_type, of_a_view), model_outputs(requested, config, static)
        return (
            Part(first, part_file(first), images, (_patch_tokens(config, of_a_view),)),
            Part(second, part_file(second), (_patch_tokens(config, static),), outputs),
        )
    cameras = [tensor for tensor in model_outputs(requested, config, static) if tensor.name in CAMERAS]
    outputs = model_outputs(requested, config, of_a_view)
    maps = [tensor for tensor in outputs if tensor.name not in CAMERAS]
    # World points are made view by view, of depth and cameras: where the depth is.
    of_points = _OF_WORLD_POINTS if "world_points" in requested else ()
    posed = [tensor for tensor in outputs if tensor.name in of_points]
    return (
        Part(first, part_file(first), model_inputs(input_type, static), (*_levels(config, static), *cameras)),
        Part(second, part_file(second), (*_levels(config, of_a_view), *posed), tuple(maps)),
    )


def _patch_tokens(config: ModelConfig, static: StaticShape) -> Tensor:
    return _tokens(
        PATCH_TOKENS, config.vit.embed_dim, "patch tokens of the encoder, after its last norm", config, static
    )


def _levels(config: ModelConfig, static: StaticShape) -> Iterator[Tensor]:
    for layer in layers_of(config):
        meaning = f"patch tokens of aggregator pair {layer}: of its frame block, then of its global one"
        yield _tokens(level_name(layer), config.dpt_head.dim_in, meaning, config, static)


def _tokens(name: str, channels: int, meaning: str, config: ModelConfig, static: StaticShape) -> Tensor:
    shape = static.bind(("B", "S", "rows", "columns", channels), config.patch_size)
    return Tensor(name, "float32", shape, meaning)

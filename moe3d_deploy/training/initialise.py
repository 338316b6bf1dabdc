"""Weights to start training from scratch with; `seeded` makes weights for tests and benchmarks, not for training."""

import math
import zlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from moe3d_deploy.config import ModelConfig
from moe3d_deploy.errors import InputError
from moe3d_deploy.model import MoE3D
from moe3d_deploy.model.camera import TRUNK_LAYER_SCALE
from moe3d_deploy.model.transformer import LayerScale

TOKEN_STD = 0.02  # of tokens and position embeddings
OUTPUT_STD = 0.01  # of the last convolution of a depth or point head, whose inputs are about 1
POSE_STD = 0.001  # of the camera head's last layer, whose output is added up over the iterations

# Before a ReLU, where Kaiming's factor 2 makes up for the half that it drops.
_BEFORE_RELU = (".conv1", ".output_conv2.0", ".gate.0")


def new_model(config: ModelConfig, seed: int) -> MoE3D:
    """A model of `config` on the CPU in float32, initialised. Neither reads nor moves torch's global random stream."""
    with torch.device("meta"):
        model = MoE3D(config)
    model.to_empty(device="cpu")
    initialise(model, seed)
    return model


def initialise(model: MoE3D, seed: int) -> None:
    """Overwrite all parameters of `model` with fresh ones, in place. Equal seeds give equal bits on any device.

    Tokens and position embeddings: normal, cut at 2 sigma of 0.02. Linear layers and the patch projection: Xavier,
    uniform. Convolutions: Kaiming, normal by their inputs. Biases 0, norms 1, LayerScale as the config has it.

    The ends are such that training starts from a sane picture: depth about 1 (the mean distance of normalised truth)
    with a confidence of 2, a uniform gate over experts that differ, and after the last iteration cameras near the first
    one's with fields of view of about 1 rad (each iteration adds its share).

    Raises InputError for a negative seed or a model whose experts are merged.
    """
    if seed < 0:
        raise InputError(f"seed {seed} is negative; use an integer >= 0")
    if model.depth_head.merged is not None:
        raise InputError("the experts of this model are merged for deployment; initialise the plain form")
    with torch.no_grad():
        for name, parameter, fill in _rules(model):
            # A stream per tensor: its values depend neither on the order nor on what else the model has.
            stream = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            values = torch.empty(parameter.shape)
            fill(values, stream)
            parameter.copy_(values)


_Fill = Callable[[Tensor, torch.Generator], object]


def _rules(model: MoE3D) -> Iterator[tuple[str, nn.Parameter, _Fill]]:
    for module_name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{leaf}"
            yield name, parameter, _fill_of(model.config, name, module)


def _fill_of(config: ModelConfig, name: str, module: nn.Module) -> _Fill:
    owner, _, leaf = name.rpartition(".")
    if isinstance(module, LayerScale):
        return _constant(_layer_scale(config, name))
    if isinstance(module, nn.LayerNorm):
        return _constant(1.0 if leaf == "weight" else 0.0)
    if owner == "camera_head.pose_branch.fc2":
        return _normal(POSE_STD) if leaf == "weight" else _identity_pose(config.camera_head.num_iterations)
    if leaf in ("bias", "empty_pose_tokens") or owner == "depth_head.gate.2":
        return _constant(0.0)
    if isinstance(module, nn.Linear) or owner == "aggregator.patch_embed.patch_embed.proj":
        return lambda tensor, stream: nn.init.xavier_uniform_(tensor.flatten(1), generator=stream)
    if isinstance(module, nn.ConvTranspose2d):
        # Kernel and stride are equal, so an output pixel has one input pixel: its fan in is the channels alone.
        return _normal(1 / math.sqrt(module.in_channels))
    if isinstance(module, nn.Conv2d):
        if owner.endswith("output_conv2.2") or (owner.startswith("depth_head.experts.") and owner.endswith(".2")):
            return _normal(OUTPUT_STD)
        relu = owner.endswith(_BEFORE_RELU) or owner.startswith("depth_head.experts.")
        fan_in = math.prod(module.kernel_size) * module.in_channels
        return _normal(math.sqrt((2 if relu else 1) / fan_in))
    return lambda tensor, stream: nn.init.trunc_normal_(
        tensor, std=TOKEN_STD, a=-2 * TOKEN_STD, b=2 * TOKEN_STD, generator=stream
    )


def _layer_scale(config: ModelConfig, name: str) -> float:
    if name.startswith("camera_head."):
        return TRUNK_LAYER_SCALE
    return config.vit.init_values if name.startswith("aggregator.patch_embed.") else config.aggregator.init_values


def _constant(value: float) -> _Fill:
    return lambda tensor, stream: tensor.fill_(value)


def _normal(std: float) -> _Fill:
    return lambda tensor, stream: nn.init.normal_(tensor, std=std, generator=stream)


def _identity_pose(iterations: int) -> _Fill:
    """No translation, quaternion (0, 0, 0, 1) and both fields of view 1 rad, in equal shares."""
    pose = torch.tensor([0.0] * 6 + [1.0] * 3) / iterations
    return lambda tensor, stream: tensor.copy_(pose)

"""The model with the signature of a file, tensors in and a tuple of named tensors out: whole, and its parts."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moe3d_deploy.export.parts import PATCH_TOKENS, layers_of, level_name
from moe3d_deploy.manifest import Part
from moe3d_deploy.model import MoE3D
from moe3d_deploy.model.camera import unproject
from moe3d_deploy.model.dpt import Grid

Tensors = dict[str, Tensor]


class ExportModule(nn.Module):
    """The whole model: images in, the outputs out."""

    def __init__(self, model: MoE3D, names: Sequence[str], input_type: str = "float32") -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)
        self.input_type = input_type

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        result = self.model(_floats(images, self.input_type), outputs=_asked(self.names))
        return tuple(result[name] for name in self.names)


class PartModule(nn.Module):
    """One part of a split model. The weights that it does not use stay out of its file."""

    def __init__(self, model: MoE3D, part: Part) -> None:
        super().__init__()
        self.model = model
        self.compute = _ROLES[part.role]
        self.taken = tuple(tensor.name for tensor in part.inputs)
        self.names = tuple(tensor.name for tensor in part.outputs)
        self.input_type = part.inputs[0].dtype

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.taken, tensors, strict=True))
        if "images" in given:
            given["images"] = _floats(given["images"], self.input_type)
        result = self.compute(self.model, given, _asked(self.names))
        return tuple(result[name] for name in self.names)


def _encoder(model: MoE3D, given: Tensors, outputs: Sequence[str]) -> Tensors:
    images = given["images"]
    return {PATCH_TOKENS: _on_grid(model.aggregator.encode(images), _grid(images, model.config.patch_size))}


def _decoder(model: MoE3D, given: Tensors, outputs: Sequence[str]) -> Tensors:
    tokens = given[PATCH_TOKENS]
    return model.decode(tokens.flatten(2, 3), _size(tokens, model.config.patch_size), outputs=outputs)


def _aggregator(model: MoE3D, given: Tensors, outputs: Sequence[str]) -> Tensors:
    images = given["images"]
    grid = _grid(images, model.config.patch_size)
    tokens = model.aggregate(model.aggregator.encode(images), grid)
    patches = {
        level_name(layer): _on_grid(tokens[layer][:, :, model.aggregator.patch_start :], grid)
        for layer in layers_of(model.config)
    }
    return model.cameras(tokens, (images.shape[-2], images.shape[-1])) | patches


def _heads(model: MoE3D, given: Tensors, outputs: Sequence[str]) -> Tensors:
    config = model.config
    layers = [given[level_name(layer)] for layer in config.dpt_head.intermediate_layer_idx]
    batch, views, rows, columns = layers[0].shape[:4]
    maps = model.dense([layer.flatten(2, 3).flatten(0, 1) for layer in layers], Grid(rows, columns), outputs)
    result = {name: value.unflatten(0, (batch, views)) for name, value in maps.items()}
    if "world_points" in outputs:
        result["world_points"] = unproject(result["depth"], given["extrinsics"], given["intrinsics"])
    return result


_ROLES = {"encoder": _encoder, "decoder": _decoder, "aggregator": _aggregator, "heads": _heads}


def _floats(images: Tensor, input_type: str) -> Tensor:
    if input_type == "uint8":  # TensorRT does nothing to uint8 but cast it
        return images.to(torch.float32).permute(0, 1, 4, 2, 3) / 255
    return images


def _asked(names: Sequence[str]) -> list[str]:
    """The names that the model has to be asked for, or may be."""
    return [name for name in names if name != "pose_enc"]


def _grid(images: Tensor, patch_size: int) -> Grid:
    return Grid(images.shape[-2] // patch_size, images.shape[-1] // patch_size)


def _size(tokens_BSRCD: Tensor, patch_size: int) -> tuple[int, int]:
    return tokens_BSRCD.shape[2] * patch_size, tokens_BSRCD.shape[3] * patch_size


def _on_grid(tokens_BSPC: Tensor, grid: Grid) -> Tensor:
    return tokens_BSPC.unflatten(2, grid)

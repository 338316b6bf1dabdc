"""The weights of the written ONNX file: each once, in the policy's type, in one file beside the model."""

import functools
import math
from typing import Any

import exports
import numpy as np
import onnx
import torch
from exports import FILES, IN_EACH, initializers
from numpy.typing import NDArray
from onnx import TensorProto

from moe3d_deploy.export.precision import PrecisionPolicy

# Above this many values the exporter folds no constants; below, it may store a transposed weight twice.
FOLDED_VALUES = 8192


@functools.cache
def stored(file: str) -> dict[str, list[NDArray[Any]]]:
    """Parameter name of the deployed model -> the file's initialisers with its values, as they are or transposed."""
    exported, merge = FILES[file](), file != "fp32 plain"
    outputs = [output.name for output in exported.proto.graph.output]
    deployed = exports.load("fp16" if "fp16" in file else "fp32", outputs)
    if merge:
        deployed.depth_head.merge_experts()
    arrays = list(initializers(exported).values())
    return {
        name: [array for array in arrays if same(array, values) or same(array, values.T)]
        for name, values in ((name, tensor.numpy()) for name, tensor in deployed.state_dict().items())
        if values.ndim > 0
    }


def same(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Equal values whatever the type: half widened to float32 is the copy that must not be there."""
    return a.size == b.size and np.array_equal(a.squeeze(), b.squeeze())


# Folded into constants, so not there as they are: position embedding of the class token, tokens picked by view, the
# empty pose (its embedding is a constant), the experts' biases beside the node, and a token that nothing uses.
FOLDED = {
    "aggregator.patch_embed.cls_token",
    "aggregator.patch_embed.mask_token",
    "aggregator.patch_embed.pos_embed",
    "aggregator.camera_token",
    "aggregator.register_token",
    "camera_head.empty_pose_tokens",
}


@IN_EACH
def test_every_weight_is_in_the_file_once_in_the_policys_type(file: str) -> None:
    """Half of a weight's values may not lie there a second time as float32, nor a shared weight once per iteration."""
    dtype_of = PrecisionPolicy("fp16" if "fp16" in file else "fp32").dtype_of()
    twice = []
    for name, arrays in stored(file).items():
        if name in FOLDED:
            continue
        assert arrays, f"{name} is not in the file"
        key = name.replace("merged.conv", "experts.0.0").replace("merged.", "experts.0.2.")
        expected = np.float16 if dtype_of(key) == torch.float16 else np.float32
        assert {array.dtype for array in arrays} == {np.dtype(expected)}, name
        if len(arrays) > 1:
            twice.append((name, arrays[0].size))
    assert [name for name, size in twice if size > FOLDED_VALUES] == []
    # What is folded per use: weights of the camera head's iterations, and operands that the candidates need too.
    assert all(name.startswith(("camera_head.", "depth_head.merged.")) for name, _ in twice), twice


@IN_EACH
def test_the_weights_take_no_more_room_than_the_parameters(file: str) -> None:
    """The camera head runs twice: stored per iteration its weights would be there twice."""
    exported = FILES[file]()
    outputs = [output.name for output in exported.proto.graph.output]
    deployed = exports.load("fp16" if "fp16" in file else "fp32", outputs)
    parameters = sum(tensor.numel() * tensor.element_size() for tensor in deployed.state_dict().values())
    camera = sum(tensor.numel() * tensor.element_size() for tensor in deployed.camera_head.state_dict().values())
    total = sum(array.nbytes for array in initializers(exported).values())

    assert abs(total - parameters) < 0.1 * camera  # constants, and small weights that are folded twice


def test_half_weights_halve_the_file() -> None:
    sizes = {file: (FILES[file]().path.parent / "model.onnx.data").stat().st_size for file in FILES}
    assert sizes["fp16 merged"] < 0.85 * sizes["fp32 merged"]  # the camera head stays float32


@IN_EACH
def test_the_weights_lie_in_one_file_beside_the_model(file: str) -> None:
    path = FILES[file]().path
    assert {entry.name for entry in path.parent.iterdir()} - {"manifest.json"} == {"model.onnx", "model.onnx.data"}
    bare = onnx.load(path, load_external_data=False)
    external = [tensor for tensor in bare.graph.initializer if tensor.data_location == TensorProto.EXTERNAL]
    assert {entry.value for tensor in external for entry in tensor.external_data if entry.key == "location"} == {
        "model.onnx.data"
    }
    inside = [math.prod(tensor.dims) for tensor in bare.graph.initializer if tensor not in external]
    assert max(inside) <= 256  # only what is too small to be worth a reference
    assert path.stat().st_size < 200_000

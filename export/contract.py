"""The ONNX contract: names, shapes, types and meaning of a file's inputs and outputs. Without torch."""

from collections.abc import Sequence

from moe3d_deploy.config import ModelConfig

MODEL_FILE = "model.onnx"
OPSET = 20  # in the operator table of TensorRT 10.3; the first with Gelu
ATTENTION_OPSET = 23  # the first with an operator for attention
OPSETS = (OPSET, ATTENTION_OPSET)

DEFAULT_OUTPUTS = ("depth", "depth_conf", "extrinsics", "intrinsics")

_B, _S, _H, _W = "B", "S", "H", "W"

INPUTS: dict[str, tuple[tuple[str | int, ...], str]] = {
    "float32": ((_B, _S, 3, _H, _W), "RGB in [0, 1]; H and W multiples of the patch size"),
    "uint8": ((_B, _S, _H, _W, 3), "RGB in 0..255; H and W multiples of the patch size"),
}

OUTPUTS: dict[str, tuple[tuple[str | int, ...], str]] = {
    "depth": ((_B, _S, _H, _W), "along the optical axis, up to the scene's scale (not metres)"),
    "depth_conf": ((_B, _S, _H, _W), "confidence of depth, at least 1"),
    "extrinsics": ((_B, _S, 3, 4), "camera from world, OpenCV axes (x right, y down, z forward)"),
    "intrinsics": ((_B, _S, 3, 3), "pixels of the network input, pixel centres at integers"),
    "pose_enc": ((_B, _S, 9), "translation, quaternion xyzw, vertical and horizontal field of view in radians"),
    "world_points": ((_B, _S, _H, _W, 3), "points of depth and cameras, in the units of depth"),
    "point_map": ((_B, _S, _H, _W, 3), "points of the point head, in the units of depth"),
    "point_map_conf": ((_B, _S, _H, _W), "confidence of point_map, at least 1"),
    "expert_weights": ((_B, _S, "K", _H, _W), "the gate's weight of each expert, summing to 1"),
    "expert_entropy": ((_B, _S, _H, _W), "entropy of the gate's weights, in nats"),
    "depth_variance": ((_B, _S, _H, _W), "variance of depth between the experts, in squared units of depth"),
}

OPTIONAL_OUTPUTS = tuple(name for name in OUTPUTS if name not in DEFAULT_OUTPUTS)


def layout(input_type: str) -> str:
    """The order of the axes of `images`, such as BS3HW."""
    return "".join(map(str, INPUTS[input_type][0]))


def output_names(requested: Sequence[str]) -> tuple[str, ...]:
    """The file's outputs in their order: the default ones, then those requested, each once."""
    return tuple(dict.fromkeys((*DEFAULT_OUTPUTS, *requested)))


def output_shapes(names: Sequence[str], config: ModelConfig) -> list[tuple[str | int, ...]]:
    """Shapes with symbolic B, S, H, W; K is the model's number of experts."""
    experts = config.moe.num_experts if config.moe else 0
    return [tuple(experts if dim == "K" else dim for dim in OUTPUTS[name][0]) for name in names]

"""An ONNX file as a builder's network: parse it, check its input against a profile, count what it holds."""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from moe3d_deploy.errors import EngineError

_DTYPES = {"float": "fp32", "half": "fp16"}  # every other type keeps TensorRT's name in lower case: bf16, int64, ...


class ImageProfile(Protocol):
    """The smallest, typical and largest shape of the input `images`; engines.shapes.ShapeProfile is one."""

    def image_shapes(self, channels_last: bool = False) -> tuple[tuple[int, ...], ...]: ...


@dataclass(frozen=True)
class NetworkFacts:
    """What the parsed network holds before the builder fuses it.

    strongly_typed                  as the network itself says
    layers                          layer type -> count
    matmul, convolution, attention  type of the result (fp32, fp16, bf16, ...) -> count of layers
    plugins                         names of the plugin layers
    functions                       op name of each model-local function that was expanded -> count of its nodes
    """

    strongly_typed: bool
    layers: dict[str, int]
    matmul: dict[str, int]
    convolution: dict[str, int]
    attention: dict[str, int]
    plugins: tuple[str, ...]
    functions: dict[str, int]


def parse(trt: Any, path: Path) -> Any:
    """(builder, network, parser) of a strongly typed network: TensorRT 10 by flag, 11 without one.

    Raises EngineError, or PolygraphyException for a model the parser refuses.
    """
    from polygraphy.backend.trt import network_from_onnx_path

    has_flag = _has_typing_flag(trt)
    if not has_flag and trt.__name__ == "tensorrt" and int(trt.__version__.split(".")[0]) < 11:
        raise EngineError(f"TensorRT {trt.__version__} has no strongly typed networks; install 10.3 or newer")
    network = network_from_onnx_path(str(path), strongly_typed=has_flag)
    if not _is_strongly_typed(trt, network[1]):
        raise EngineError(f"{path.name}: the network did not become strongly typed; types would not be the graph's")
    return network


def input_shapes(trt: Any, network: Any, profile: ImageProfile, model: str) -> tuple[tuple[int, ...], ...]:
    """The profile's shapes in the layout of the input, checked against the sizes the model fixes."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    if [tensor.name for tensor in inputs] != ["images"] or len(inputs[0].shape) != 5:
        found = ", ".join(f"{tensor.name} {tuple(tensor.shape)}" for tensor in inputs) or "nothing"
        raise EngineError(f"{model}: takes {found}; expected one input, images (B, S, 3, H, W); export it again")
    channels_last = inputs[0].dtype == trt.DataType.UINT8
    axes = ("batch", "views", *(("height", "width", "channels") if channels_last else ("channels", "height", "width")))
    shapes = profile.image_shapes(channels_last)
    for axis, fixed, *asked in zip(axes, inputs[0].shape, *shapes, strict=True):
        if fixed != -1 and set(asked) != {fixed}:
            raise EngineError(
                f"{model}: its {axis} is fixed at {fixed}, the profile asks for {':'.join(map(str, asked))}; "
                f"build with --{axis} {fixed} or export with a free {axis}"
            )
    return shapes


def network_facts(trt: Any, network: Any) -> NetworkFacts:
    """Count the layers of a parsed network."""
    layers: Counter[str] = Counter()
    dtypes: dict[str, Counter[str]] = {"MATRIX_MULTIPLY": Counter(), "CONVOLUTION": Counter(), "ATTENTION": Counter()}
    plugins, calls = [], set()
    for layer in network:
        kind = layer.type.name
        layers[kind] += 1
        if kind.startswith("PLUGIN"):
            plugins.append(layer.name)
        # A layer from a function body names its call: "[ONNX Layer: mul | expert_mix (ExpertMix)]".
        calls.update(re.findall(r" \| ([^|\]]+) \((\w+)\)", layer.metadata))
        group = {"DECONVOLUTION": "CONVOLUTION", "ATTENTION_OUTPUT": "ATTENTION"}.get(kind, kind)
        if group in dtypes:
            dtype = layer.get_output(0).dtype.name.lower()
            dtypes[group][_DTYPES.get(dtype, dtype)] += 1
    return NetworkFacts(
        strongly_typed=_is_strongly_typed(trt, network),
        layers=dict(layers),
        matmul=dict(dtypes["MATRIX_MULTIPLY"]),
        convolution=dict(dtypes["CONVOLUTION"]),
        attention=dict(dtypes["ATTENTION"]),
        plugins=tuple(plugins),
        functions=dict(Counter(function for _, function in calls)),
    )


def _has_typing_flag(trt: Any) -> bool:
    return hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")


def _is_strongly_typed(trt: Any, network: Any) -> bool:
    """Read from the network; a library without the flag has no other kind (`parse` refuses those before 10)."""
    return not _has_typing_flag(trt) or network.get_flag(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

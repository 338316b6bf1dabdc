"""An ONNX file as a builder's network: parse it, check its input against a profile, count what it holds."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from moe3d_deploy.errors import EngineError
from moe3d_deploy.trt import onnx_functions
from moe3d_deploy.trt.onnx_names import calls_of

_DTYPES = {"float": "fp32", "half": "fp16"}  # every other type keeps TensorRT's name in lower case: bf16, int64, ...


class ImageProfile(Protocol):
    """The smallest, typical and largest shape of the input `images`; engines.shapes.ShapeProfile is one."""

    def image_shapes(self, channels_last: bool = False) -> tuple[tuple[int, ...], ...]: ...

    def symbol_sizes(self) -> tuple[dict[str, int], ...]: ...


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


def parse(trt: Any, path: Path, *, without_function: tuple[str, str] | None = None) -> Any:
    """(builder, network, parser) of a strongly typed network: TensorRT 10 by flag, 11 without one.

    without_function   name and domain of a function that the parser is not to see; the file stays as it is

    Raises EngineError, or PolygraphyException for a model the parser refuses.
    """
    from polygraphy.backend.trt import network_from_onnx_path

    has_flag = _has_typing_flag(trt)
    if not has_flag and trt.__name__ == "tensorrt" and int(trt.__version__.split(".")[0]) < 11:
        raise EngineError(f"TensorRT {trt.__version__} has no strongly typed networks; install 10.3 or newer")
    if without_function:
        network = _parse_bytes(
            trt, path, onnx_functions.without_function(path.read_bytes(), *without_function, str(path))
        )
    else:
        network = network_from_onnx_path(str(path), strongly_typed=has_flag)
    if not _is_strongly_typed(trt, network[1]):
        raise EngineError(f"{path.name}: the network did not become strongly typed; types would not be the graph's")
    return network


def _parse_bytes(trt: Any, path: Path, model: bytes) -> Any:
    """As Polygraphy's network_from_onnx_path, for a model that stands in for the file: weights are beside `path`."""
    from polygraphy.backend.trt import create_network, get_trt_logger
    from polygraphy.backend.trt.util import check_onnx_parser_errors

    builder, network = create_network(strongly_typed=_has_typing_flag(trt))
    parser = trt.OnnxParser(network, get_trt_logger())
    check_onnx_parser_errors(parser, parser.parse(model, str(path)))
    return builder, network, parser


def profile_shapes(trt: Any, network: Any, profile: ImageProfile, model: str) -> dict[str, tuple[tuple[int, ...], ...]]:
    """The profile's three shapes of every input: of images, or of what a part of a split model takes.

    The axes of such an input have the contract's symbols. Raises EngineError for a network that takes something else.
    """
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    if not inputs or any(tensor.name == "images" for tensor in inputs):
        return {"images": input_shapes(trt, network, profile, model)}
    return {tensor.name: _bound_shapes(tensor, profile, model) for tensor in inputs}


def _bound_shapes(tensor: Any, profile: ImageProfile, model: str) -> tuple[tuple[int, ...], ...]:
    names = [tensor.get_dimension_name(axis) if size == -1 else size for axis, size in enumerate(tensor.shape)]
    sizes = profile.symbol_sizes()
    if unknown := [name for name in names if isinstance(name, str) and name not in sizes[0]]:
        raise EngineError(
            f"{model}: its input {tensor.name} has an axis {unknown[0]!r} of no known size; export it again"
        )
    return tuple(tuple(found[name] if isinstance(name, str) else name for name in names) for found in sizes)


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
        calls.update(calls_of(layer.metadata))
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

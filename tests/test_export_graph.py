"""The written ONNX file: its contract, its weights, what is not in it, and that it computes what PyTorch does."""

import functools
import getpass
import hashlib
import json
import math
import platform
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import exports
import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from exports import EXPERT_OUTPUTS, MOE, Exported
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from moe3d_deploy import __version__
from moe3d_deploy.errors import ExportError, InputError
from moe3d_deploy.export import graph
from moe3d_deploy.export.compare import Limits, errors, require_within
from moe3d_deploy.export.contract import DEFAULT_OUTPUTS, OPTIONAL_OUTPUTS, OUTPUTS, output_names, output_shapes
from moe3d_deploy.export.expert_mix import SymbolicExpertMix
from moe3d_deploy.export.precision import PrecisionPolicy
from moe3d_deploy.export.verify import images_for
from moe3d_deploy.model.moe3d import OF_POINT_HEAD
from moe3d_deploy.model.transformer import Attention, explicit_attention

FILES: dict[str, Callable[[], Exported]] = {
    "fp16 merged": lambda: exports.bundle().exported,
    "fp32 merged": exports.merged,
    "fp32 plain": exports.unmerged,
}
IN_EACH = pytest.mark.parametrize("file", FILES)

# Above this many values the exporter folds no constants; below, it may store a transposed weight twice.
FOLDED_VALUES = 8192


def initializers(exported: Exported) -> dict[str, NDArray[Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in exported.proto.graph.initializer}


def all_nodes(exported: Exported) -> Iterator[onnx.NodeProto]:
    """Of the graph, of its subgraphs and of the functions."""
    waiting = [*exported.proto.graph.node, *(node for f in exported.proto.functions for node in f.node)]
    while waiting:
        node = waiting.pop()
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                waiting += inner.node


def dims(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def mix_nodes(exported: Exported) -> list[onnx.NodeProto]:
    return [node for node in exported.proto.graph.node if node.op_type == "ExpertMix"]


# ---- the contract


@IN_EACH
def test_the_file_is_opset_20_and_valid(file: str) -> None:
    exported = FILES[file]()
    imports = {entry.domain: entry.version for entry in exported.proto.opset_import}
    assert imports == {"": 20} | ({"moe3d": 1} if mix_nodes(exported) else {})
    onnx.checker.check_model(exported.path, full_check=True)


@IN_EACH
def test_inputs_and_outputs_are_those_of_the_contract(file: str) -> None:
    """float32 at the border whatever the precision; scenes, views, height and width symbolic in one file."""
    exported = FILES[file]()
    (images,) = exported.proto.graph.input
    assert (images.name, images.type.tensor_type.elem_type) == ("images", TensorProto.FLOAT)
    assert dims(images) == ["B", "S", 3, "H", "W"]
    asked = {
        "fp16 merged": (),
        "fp32 merged": (*EXPERT_OUTPUTS, "world_points", "pose_enc"),
        "fp32 plain": (*EXPERT_OUTPUTS, *OF_POINT_HEAD),
    }[file]
    shapes: dict[str, list[str | int]] = {
        "depth": ["B", "S", "H", "W"],
        "depth_conf": ["B", "S", "H", "W"],
        "extrinsics": ["B", "S", 3, 4],
        "intrinsics": ["B", "S", 3, 3],
        "expert_weights": ["B", "S", 2, "H", "W"],
        "expert_entropy": ["B", "S", "H", "W"],
        "depth_variance": ["B", "S", "H", "W"],
        "world_points": ["B", "S", "H", "W", 3],
        "pose_enc": ["B", "S", 9],
        "point_map": ["B", "S", "H", "W", 3],
        "point_map_conf": ["B", "S", "H", "W"],
    }
    expected = [(name, shapes[name]) for name in ("depth", "depth_conf", "extrinsics", "intrinsics", *asked)]
    assert [(output.name, dims(output)) for output in exported.proto.graph.output] == expected
    assert {output.type.tensor_type.elem_type for output in exported.proto.graph.output} == {TensorProto.FLOAT}


def test_every_optional_output_was_exported_somewhere() -> None:
    found = {output.name for file in FILES for output in FILES[file]().proto.graph.output}
    assert found == set(OUTPUTS) == {*DEFAULT_OUTPUTS, *OPTIONAL_OUTPUTS}


def test_outputs_have_one_order_and_come_once() -> None:
    assert output_names(()) == ("depth", "depth_conf", "extrinsics", "intrinsics")
    assert output_names(("pose_enc", "depth", "pose_enc")) == (*DEFAULT_OUTPUTS, "pose_enc")
    assert output_shapes(("expert_weights",), MOE) == [("B", "S", 2, "H", "W")]


def test_the_metadata_holds_the_contract() -> None:
    exported = exports.bundle().exported
    metadata = {entry.key: entry.value for entry in exported.proto.metadata_props}

    assert set(metadata) == {
        "moe3d.version", "moe3d.precision", "moe3d.model_config", "moe3d.checkpoint", "moe3d.tensors",
        "moe3d.preprocessing",
    }  # fmt: skip
    assert metadata["moe3d.version"] == __version__
    assert metadata["moe3d.precision"] == "fp16"
    assert json.loads(metadata["moe3d.model_config"]) == exported.model.config.to_dict()
    assert json.loads(metadata["moe3d.checkpoint"]) == {
        "origin": "seeded:small seed 0",
        "licence": "seeded random weights, no licence",
        "sha256": hashlib.sha256((exports.checkpoint() / "model.safetensors").read_bytes()).hexdigest(),
    }
    tensors = json.loads(metadata["moe3d.tensors"])
    assert list(tensors) == sorted(["images", *DEFAULT_OUTPUTS])
    assert "not metres" in tensors["depth"]
    assert json.loads(metadata["moe3d.preprocessing"]) == {
        "mode": "crop", "size": 42, "patch_size": 14, "layout": "BS3HW",
        "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
    }  # fmt: skip


# ---- moe3d::ExpertMix


@pytest.mark.parametrize(("file", "outputs"), [("fp16 merged", 2), ("fp32 merged", 3)])
def test_the_expert_mix_is_one_node_with_the_attributes_a_plugin_needs(file: str, outputs: int) -> None:
    """The third output, the gate's weights, is there only for a file whose outputs need it."""
    (node,) = mix_nodes(FILES[file]())
    assert node.domain == "moe3d"
    attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
    assert attributes == {"num_experts": 2, "temperature": 0.5, "plugin_version": b"1", "plugin_namespace": b""}
    assert len(node.input) == 5
    assert len(node.output) == outputs


@pytest.mark.parametrize("file", ["fp16 merged", "fp32 merged"])
def test_the_function_is_in_the_file_with_its_names_prefixed_and_the_models_opset(file: str) -> None:
    exported = FILES[file]()
    (function,) = exported.proto.functions
    assert (function.domain, function.name) == ("moe3d", "ExpertMix")
    assert [(entry.domain, entry.version) for entry in function.opset_import] == [("", 20)]
    names = {
        *function.input,
        *function.output,
        *(name for node in function.node for name in (*node.input, *node.output)),
    }
    assert all(name.startswith("moe3d_mix_") for name in names)
    outer = {name for node in exported.proto.graph.node for name in (*node.input, *node.output)}
    assert not names & outer
    assert len(function.output) == len(mix_nodes(exported)[0].output)


def test_the_plain_form_has_neither_node_nor_function() -> None:
    exported = exports.unmerged()
    assert not mix_nodes(exported)
    assert not exported.proto.functions
    assert {node.domain for node in exported.proto.graph.node} == {""}
    assert any("experts.1.0.weight" in name for name in initializers(exported))


def test_the_merged_form_convolves_once_for_all_experts_and_the_gate() -> None:
    shapes = Counter(array.shape for name, array in initializers(exports.merged()).items() if "depth_head" in name)
    assert shapes[(2 * 4 + 4, 8, 3, 3)] == 1  # K Ce + Cg channels of features / 2
    assert not any("experts" in name for name in initializers(exports.merged()))


@pytest.mark.parametrize(
    ("outputs", "weights", "candidates"),
    [
        ((), False, False),
        (("pose_enc", "world_points"), False, False),
        (("expert_weights",), True, False),
        (("expert_entropy",), True, False),
        (("depth_variance",), True, True),
    ],
)
def test_the_node_hands_out_what_the_outputs_need(outputs: tuple[str, ...], weights: bool, candidates: bool) -> None:
    module = graph.prepare(exports.load(), merge=True, outputs=outputs)

    mix = module.model.depth_head.merged
    assert isinstance(mix, SymbolicExpertMix)
    assert (mix.shape.with_weights, mix.with_candidates) == (weights, candidates)
    attentions = [layer for layer in module.modules() if isinstance(layer, Attention)]
    assert attentions
    assert all(layer.attend is explicit_attention for layer in attentions)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (("expert_depths",), "output 'expert_depths' exists in PyTorch only; export expert_weights or depth_variance"),
        (("normals",), "output 'normals' is unknown; choose from depth, "),
        (("point_map",), "output 'point_map' needs the point head; this model has none"),
    ],
)
def test_an_output_that_cannot_be_exported_is_refused(outputs: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError) as caught:
        graph.prepare(exports.load(), merge=True, outputs=outputs)
    assert str(caught.value).startswith(message)


# ---- weights


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


# ---- what is not in it


@IN_EACH
def test_nothing_of_the_exporting_machine_is_in_the_file(file: str) -> None:
    data = FILES[file]().path.read_bytes()
    traces = {str(Path.home()), str(Path.cwd()), str(Path(torch.__file__).parent), str(Path(graph.__file__).parent)}
    for text in {*traces, str(FILES[file]().path.parent), platform.node(), "site-packages", ".py", "/tmp", "forward("}:
        assert text.encode() not in data, text
    if len(user := getpass.getuser()) > 4:
        assert user.encode() not in data


@IN_EACH
def test_no_part_carries_notes_of_the_exporter(file: str) -> None:
    exported = FILES[file]()
    proto = exported.proto
    nodes = list(all_nodes(exported))
    assert len(nodes) > 300
    values = [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]
    for part in [proto.graph, *proto.graph.initializer, *values, *nodes, *proto.functions]:
        assert not part.metadata_props
        assert not part.doc_string
    assert not proto.doc_string
    assert (proto.producer_name, proto.producer_version) == ("moe3d-deploy", "")
    assert proto.graph.name == "moe3d"


@IN_EACH
def test_tensorrt_can_read_every_operator(file: str) -> None:
    """No antialiased Resize (its parser refuses it), no control flow, one attention form of plain matrix products."""
    nodes = list(all_nodes(FILES[file]()))
    kinds = Counter(node.op_type for node in nodes)
    assert not {"If", "Loop", "Scan", "SequenceAt", "Attention", "NonZero"} & set(kinds)
    assert {node.domain for node in nodes} <= {"", "moe3d"}
    resizes = [node for node in nodes if node.op_type == "Resize"]
    assert resizes
    for node in resizes:
        attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert not attributes.get("antialias", 0)
        assert attributes["mode"] == b"linear"


@IN_EACH
def test_no_name_of_the_tracers_symbols_is_left_in_a_shape(file: str) -> None:
    proto = FILES[file]().proto
    values = [*proto.graph.input, *proto.graph.output, *proto.graph.value_info]
    assert {dim for value in values for dim in dims(value) if isinstance(dim, str)} <= {"B", "S", "H", "W", ""}


# ---- what it computes

# B, S, rows and columns in patches; none of them is what the tracer saw (2, 3, 4, 5).
SHAPES = [(1, 1, 1, 1), (2, 1, 3, 2), (1, 3, 2, 5), (2, 2, 1, 7), (1, 9, 2, 2), (3, 4, 5, 4)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("file", ["fp32 merged", "fp32 plain"])
def test_the_file_computes_what_the_trained_form_does_in_pytorch(file: str, shape: tuple[int, int, int, int]) -> None:
    """5e-5 is the project's limit: float32 noise of this model is below 1e-5, a wrong operation above 1e-4."""
    exported = FILES[file]()
    images = images_for(shape, MOE.patch_size)

    found, expected = exported.run(images), exported.reference(images)

    require_within(file, errors(found, expected), Limits.of("fp32"), "")
    assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}
    assert np.isfinite(found["depth"]).all()
    assert found["depth"].std() > 0.01 * found["depth"].mean()  # a flat map would hide faults


@pytest.mark.parametrize("shape", [(2, 1, 3, 2), (1, 3, 2, 5)], ids=str)
def test_the_half_file_is_within_the_limits_of_half(shape: tuple[int, int, int, int]) -> None:
    exported = exports.bundle().exported
    images = images_for(shape, MOE.patch_size)
    error = errors(exported.run(images), exported.reference(images))
    require_within("fp16", error, Limits.of("fp16"), "")
    assert error["depth"]["max"] > 5e-5  # it is in half indeed


def test_scenes_of_a_batch_do_not_mix() -> None:
    """Float32 sums of a larger batch may be blocked in another way, no more."""
    images = images_for((3, 2, 2, 3), MOE.patch_size)
    together = exports.merged().run(images)
    for scene in range(3):
        alone = exports.merged().run(images[scene : scene + 1])
        for name, values in alone.items():
            np.testing.assert_allclose(together[name][scene], values[0], rtol=1e-4, atol=1e-5, err_msg=name)


def test_the_weights_sum_to_one_and_the_optional_maps_agree_with_them() -> None:
    result = exports.merged().run(images_for((1, 2, 3, 4), MOE.patch_size))
    weights = result["expert_weights"]
    np.testing.assert_allclose(weights.sum(axis=2), 1, rtol=1e-6)
    np.testing.assert_allclose(result["expert_entropy"], -(weights * np.log(weights)).sum(axis=2), rtol=1e-4, atol=1e-6)
    assert (result["depth_variance"] >= 0).all()


# ---- the gate


def module_of(forward: Callable[[Tensor], Tensor]) -> nn.Module:
    class Module(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            return forward(images)

    return Module()


def doubled(x: Tensor, height: int) -> Tensor:
    return F.interpolate(x.flatten(0, 1), size=(height, x.shape[-1]))


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: x * (1.0 if x.shape[1] <= 8 else 1.5),
        lambda x: x * (1.0 if x.shape[1] % 2 else 1.5),
        lambda x: x * (1.0 if (x.shape[0] * x.shape[1]) % 2 else 1.5),
        lambda x: x * (1.0 if x.shape[-2] <= 100 else 1.5),
        lambda x: x * (1.0 if x.shape[-2] <= x.shape[-1] else 1.5),
        lambda x: x * (1.0 if x.shape[-2] == x.shape[-1] else 1.5),
        lambda x: x * (1.0 if x.shape[-2] * x.shape[-1] <= 518 * 518 else 1.5),
        lambda x: x * (1.0 if x.shape[1] / x.shape[-2] < 0.2 else 1.5),
        lambda x: x * int(2.5 * x.shape[-2]),
        lambda x: x * float(x.shape[-1]),
        lambda x: x[..., : int(x.shape[-2] / 3), :],
        lambda x: doubled(x, int(2.5 * x.shape[-2])),
        lambda x: F.interpolate(x.flatten(0, 1), scale_factor=x.shape[-1] / x.shape[-2]),
        lambda x: x + torch.linspace(0, 1, x.shape[-1]),
    ],
    ids=[
        "S <= 8", "S % 2", "B S % 2", "H <= 100", "H <= W", "H == W", "H W <= 518^2", "S / H", "int(2.5 H)", "float(W)",
        "int(H / 3)", "resize to int(2.5 H)", "resize by W / H", "linspace(W)",
    ],
)  # fmt: skip
def test_the_gate_refuses_what_holds_for_some_sizes_only(forward: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ExportError) as caught:
        graph.trace(module_of(forward), 14)

    assert str(caught.value).startswith("the model depends on a concrete shape, so one file cannot serve all: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: x.flatten(0, 1).mean(0),
        lambda x: doubled(x, 2 * x.shape[-2]),
        lambda x: doubled(x, x.shape[-2] // 14 * 4),
        lambda x: x.reshape(-1, x.shape[-1]) + torch.arange(x.shape[-1]),
        lambda x: x if x.shape[-2] % 14 == 0 else x * 0,
    ],
    ids=["mean", "resize to 2 H", "resize to 4 rows", "arange(W)", "H % 14 == 0"],
)
def test_the_gate_lets_pass_what_holds_for_every_size(forward: Callable[[Tensor], Tensor]) -> None:
    assert graph.trace(module_of(forward), 14) is not None


def test_the_refusal_says_what_was_assumed_and_where_it_fails() -> None:
    with pytest.raises(ExportError) as caught:
        graph.trace(module_of(lambda x: x * (1.0 if x.shape[-2] <= x.shape[-1] else 1.5)), 14)
    assert str(caught.value).endswith("it takes for granted that H <= W, which fails at B=3 S=5 H=70 W=56")


# ---- faults of the exporter


def test_a_file_that_onnx_refuses_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    proto = onnx.load(exports.merged().path, load_external_data=False)
    proto.graph.node[0].input[0] = "nowhere"
    path.write_bytes(proto.SerializeToString())
    (tmp_path / "model.onnx.data").write_bytes((exports.merged().path.parent / "model.onnx.data").read_bytes())
    with pytest.raises(ExportError, match=r"^the written model\.onnx is not valid ONNX: "):
        graph._check(path)

"""The written ONNX file: its contract, its operators, and what is not in it."""

import getpass
import hashlib
import json
import platform
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import exports
import onnx
import pytest
import torch
from exports import EXPERT_OUTPUTS, FILES, IN_EACH, MOE, Exported, initializers
from onnx import TensorProto

from moe3d_deploy import __version__
from moe3d_deploy.errors import ExportError, InputError
from moe3d_deploy.export import graph
from moe3d_deploy.export.attention import operator_attention
from moe3d_deploy.export.contract import DEFAULT_OUTPUTS, OPTIONAL_OUTPUTS, OUTPUTS, output_names, output_shapes
from moe3d_deploy.export.expert_mix import SymbolicExpertMix
from moe3d_deploy.model.moe3d import OF_POINT_HEAD
from moe3d_deploy.model.transformer import Attention
from moe3d_deploy.runtime.onnx_operators import DOMAIN as ATTENTION_DOMAIN
from moe3d_deploy.runtime.onnx_operators import NAME as ATTENTION


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
    assert imports == {"": 20, ATTENTION_DOMAIN: 1} | ({"moe3d": 1} if mix_nodes(exported) else {})
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
        "moe3d.preprocessing", "moe3d.shape_ranges",
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
    plugin = {"plugin_version": b"1", "plugin_namespace": b"", "with_weights": int(outputs == 3)}
    assert attributes == {"num_experts": 2, "temperature": 0.5, **plugin}
    assert len(node.input) == 5
    assert len(node.output) == outputs


@pytest.mark.parametrize("file", ["fp16 merged", "fp32 merged"])
def test_the_function_is_in_the_file_with_its_names_prefixed_and_the_models_opset(file: str) -> None:
    exported = FILES[file]()
    (function,) = (function for function in exported.proto.functions if function.name == "ExpertMix")
    assert function.domain == "moe3d"
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
    assert [function.name for function in exported.proto.functions] == [ATTENTION]
    assert {node.domain for node in exported.proto.graph.node} == {"", ATTENTION_DOMAIN}
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
    assert all(layer.attend is operator_attention for layer in attentions)


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
    assert {node.domain for node in nodes} <= {"", "moe3d", ATTENTION_DOMAIN}
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


# ---- faults of the exporter


def test_a_file_that_onnx_refuses_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    proto = onnx.load(exports.merged().path, load_external_data=False)
    proto.graph.node[0].input[0] = "nowhere"
    path.write_bytes(proto.SerializeToString())
    (tmp_path / "model.onnx.data").write_bytes((exports.merged().path.parent / "model.onnx.data").read_bytes())
    with pytest.raises(ExportError, match=r"^the written model\.onnx is not valid ONNX: "):
        graph._check(path)

"""Where an ONNX file has its weights is found wherever a tensor can be, and what is no ONNX file is one error."""

import contextlib
from pathlib import Path

import exports
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, NodeProto, SparseTensorProto, TensorProto

from moe3d_deploy.errors import BundleError
from moe3d_deploy.external_data import external_locations


def tensor(location: str = "found.data") -> TensorProto:
    value = TensorProto(name="w", dims=[1], data_type=1, data_location=1)
    value.external_data.add(key="offset", value="0")
    value.external_data.add(key="location", value=location)
    return value


def sparse() -> SparseTensorProto:
    return SparseTensorProto(values=TensorProto(raw_data=b"1234"), indices=tensor(), dims=[1])


def graph_with(attribute: AttributeProto) -> GraphProto:
    return GraphProto(node=[NodeProto(op_type="Relu", input=["x"]), NodeProto(op_type="If", attribute=[attribute])])


def model(graph: GraphProto) -> ModelProto:
    return ModelProto(ir_version=10, producer_name="test", graph=graph)


INNER = GraphProto(initializer=[tensor()])
PLACES = {
    "initializer": model(INNER),
    "sparse initializer": model(GraphProto(sparse_initializer=[sparse()])),
    "attribute": model(graph_with(AttributeProto(t=tensor()))),
    "list in an attribute": model(graph_with(AttributeProto(tensors=[TensorProto(), tensor()]))),
    "sparse attribute": model(graph_with(AttributeProto(sparse_tensor=sparse()))),
    "list of sparse": model(graph_with(AttributeProto(sparse_tensors=[sparse()]))),
    "branch": model(graph_with(AttributeProto(g=INNER))),
    "list of graphs": model(graph_with(AttributeProto(graphs=[GraphProto(), INNER]))),
    "branch in a branch": model(graph_with(AttributeProto(g=graph_with(AttributeProto(g=INNER))))),
    "function": ModelProto(functions=[FunctionProto(node=[NodeProto(attribute=[AttributeProto(t=tensor())])])]),
    "default of a function": ModelProto(functions=[FunctionProto(attribute_proto=[AttributeProto(t=tensor())])]),
    "training": ModelProto(training_info=[onnx.TrainingInfoProto(algorithm=INNER)]),
    "initialization": ModelProto(training_info=[onnx.TrainingInfoProto(initialization=INNER)]),
}


def scan(path: Path, data: bytes) -> set[str]:
    (path / "model.onnx").write_bytes(data)
    return external_locations(path / "model.onnx")


@pytest.mark.parametrize("place", PLACES)
def test_a_location_is_found_wherever_a_tensor_can_be(tmp_path: Path, place: str) -> None:
    assert scan(tmp_path, PLACES[place].SerializeToString()) == {"found.data"}


def test_every_message_of_onnx_that_leads_to_a_tensor_is_known() -> None:
    """A later onnx may put tensors into new places: walk its descriptors and compare."""
    from moe3d_deploy.external_data import _FIELDS

    names = {"SparseTensor": "SparseTensorProto", "Training": "TrainingInfoProto", "Entry": "StringStringEntryProto"}
    types = {names.get(ours, f"{ours}Proto"): ours for ours in (*_FIELDS, "Entry")}
    leads = {"TensorProto"}
    messages = {m.name: m for m in onnx.ModelProto.DESCRIPTOR.file.message_types_by_name.values()}
    while more := {
        name
        for name, message in messages.items()
        if name not in leads and any(f.message_type and f.message_type.name in leads for f in message.fields)
    }:
        leads |= more
    for name in leads - {"TensorProto"}:
        fields = {f.number: types[f.message_type.name] for f in messages[name].fields
                  if f.message_type and f.message_type.name in leads}  # fmt: skip
        assert _FIELDS[types[name]] == fields, name


def test_two_locations_of_one_tensor_are_both_found(tmp_path: Path) -> None:
    value = tensor("first")
    value.external_data.add(key="location", value="second")
    assert scan(tmp_path, model(GraphProto(initializer=[value])).SerializeToString()) == {"first", "second"}


def test_an_exported_file_has_its_weights_beside_it(tmp_path: Path) -> None:
    assert external_locations(exports.merged().path) == {"model.onnx.data"}


def test_a_file_without_external_weights_has_no_location(tmp_path: Path) -> None:
    assert scan(tmp_path, model(GraphProto(initializer=[TensorProto(raw_data=b"1234")])).SerializeToString()) == set()
    assert scan(tmp_path, b"") == set()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x3a\x05\x2a", "it ends too early"),
        (b"\x3a", "it ends too early"),
        (b"\x0d\x01", "it ends too early"),
        (b"\x3b", "wire type 3"),
        (b"\x02\x00", "field number 0"),
        (b"\xff" * 11, "a number is too long"),
        (b"\xba\x80\x80\x80\x80\x02\x00", "field number"),  # 32-bit readers see field 7, the graph
    ],
)
def test_what_is_no_onnx_file_is_one_line(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(BundleError) as caught:
        scan(tmp_path, data)
    assert str(caught.value).startswith(f"{tmp_path / 'model.onnx'} is not an ONNX file: {message}")
    assert str(caught.value).endswith("; copy the bundle again or export it again")


def test_endless_nesting_is_refused(tmp_path: Path) -> None:
    def field(number: int, content: bytes) -> bytes:
        size = bytes([len(content) & 0x7F | 0x80, len(content) >> 7])
        return bytes([number << 3 | 2]) + size + content

    graph = INNER.SerializeToString()
    for _ in range(40):  # graph, node, attribute
        graph = field(1, field(5, field(6, graph)))
    with pytest.raises(BundleError, match="nested more than 100 deep"):
        scan(tmp_path, field(7, graph))


@settings(max_examples=200, deadline=None)
@given(data=st.binary(max_size=60), tail=st.integers(0, 200))
def test_any_bytes_give_locations_or_a_bundle_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, tail: int
) -> None:
    folder = tmp_path_factory.getbasetemp()
    for mixed in (data, PLACES["branch"].SerializeToString()[:tail] + data):
        with contextlib.suppress(BundleError):
            assert all(isinstance(location, str) for location in scan(folder, mixed))

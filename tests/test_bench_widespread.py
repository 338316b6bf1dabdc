"""The widespread form of export: a file as it was described, that computes what the model does."""

import dataclasses
import functools
from pathlib import Path

import exports
import numpy as np
import onnx
import pytest
import torch
from models import random_images, relative_error

from moe3d_deploy.benchmarks.bench import widespread
from moe3d_deploy.benchmarks.bench.nodes import count_nodes
from moe3d_deploy.benchmarks.bench.widespread import OPSET, TRACED_VIEWS, export_widespread
from moe3d_deploy.checkpoint import load_model, seeded_source
from moe3d_deploy.errors import ExportError, InputError
from moe3d_deploy.export.contract import DEFAULT_OUTPUTS
from moe3d_deploy.model import MoE3D

HEIGHT, WIDTH = 28, 42
LIMIT = 1e-4  # of the largest value: rounding in another order is 5e-6, the smallest known mistake 1e-4


def single_head() -> MoE3D:
    """The smallest model with VGGT's head."""
    return load_model(seeded_source("small", dataclasses.replace(exports.MOE, moe=None, point_head=False)))


@functools.cache
def made(head: str = "experts") -> exports.Exported:
    model = exports.load() if head == "experts" else single_head()
    path = export_widespread(model, exports.new_folder("widespread"), HEIGHT, WIDTH)
    return exports.Exported(path, model)


def operators() -> set[str]:
    return {node.op_type for node in made().proto.graph.node}


def test_the_file_is_valid_and_whole() -> None:
    path = made().path
    onnx.checker.check_model(str(path), full_check=True)
    assert sorted(item.name for item in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    proto = made().proto
    assert [(item.domain, item.version) for item in proto.opset_import if item.domain in ("", "ai.onnx")] == [
        ("", OPSET)
    ]
    assert OPSET == 18


def test_only_the_number_of_views_is_free() -> None:
    graph = made().proto.graph
    (images,) = graph.input
    sizes = [item.dim_param or item.dim_value for item in images.type.tensor_type.shape.dim]
    assert sizes == [1, "S", 3, HEIGHT, WIDTH]
    assert tuple(output.name for output in graph.output) == DEFAULT_OUTPUTS
    for output in graph.output:
        assert output.type.tensor_type.shape.dim[1].dim_param == "S"


@pytest.mark.parametrize("head", ["experts", "single"])
@pytest.mark.parametrize("views", [1, 3, 5])
def test_it_computes_what_the_model_does_at_views_that_were_not_traced(head: str, views: int) -> None:
    assert views != TRACED_VIEWS
    images = random_images(1, views, 3, HEIGHT, WIDTH, seed=views).numpy()
    found, expected = made(head).run(images), made(head).reference(images)
    assert found.keys() == set(DEFAULT_OUTPUTS)
    for name, values in expected.items():
        assert relative_error(found[name], values) < LIMIT, name


def test_everything_is_decomposed_in_float32() -> None:
    """Attention of two products and a softmax, norms of means and roots or the operator of opset 17, experts as a 3x3
    convolution each: no function, and no operator of any other domain."""
    proto = made().proto
    assert not proto.functions
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}
    assert {"MatMul", "Softmax", "Conv"} <= operators()
    assert "Attention" not in operators()
    floats = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE}
    assert not floats & {tensor.data_type for tensor in proto.graph.initializer}


def test_experts_are_branches_of_their_own() -> None:
    """Two experts and a gate begin with a convolution of 3x3 each, where VGGT's head has one."""

    def convolutions(head: str) -> int:
        return sum(node.op_type == "Conv" for node in made(head).proto.graph.node)

    per_branch = 2  # 3x3, ReLU, 1x1
    assert convolutions("experts") - convolutions("single") == 2 * per_branch


def test_it_has_more_than_twice_the_nodes_of_this_projects_export() -> None:
    """Of one model, whose export here has three outputs more and with them more nodes. There is one block of a kind:
    the dense head, which has as many nodes in both, is most of the smaller file."""
    assert count_nodes(made().path) > 2 * count_nodes(exports.merged().path)


def test_a_block_is_two_hundred_nodes_and_more() -> None:
    """What makes the file of a large model so large: of a depth more in the aggregator, two blocks."""
    aggregator = dataclasses.replace(exports.MOE.aggregator, depth=2)
    config = dataclasses.replace(exports.MOE, aggregator=aggregator, point_head=False)
    deeper = load_model(seeded_source("small", config))
    path = export_widespread(deeper, exports.new_folder("deeper"), HEIGHT, WIDTH)
    assert count_nodes(path) - count_nodes(made().path) > 2 * 200


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model, images = exports.load(), random_images(1, 2, 3, HEIGHT, WIDTH)
    with torch.inference_mode():
        before = model(images)
        export_widespread(model, tmp_path, HEIGHT, WIDTH)
        after = model(images)
    for name, values in before.items():
        np.testing.assert_array_equal(after[name].numpy(), values.numpy(), err_msg=name)


def test_a_size_that_does_not_fit_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="height 30 is not a multiple of the patch size 14"):
        export_widespread(exports.load(), tmp_path, 30, WIDTH)
    assert not list(tmp_path.iterdir())


def test_what_the_exporter_cannot_do_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("no such operator\nat some line")

    monkeypatch.setattr(widespread.torch.onnx, "export", fail)
    with pytest.raises(ExportError) as caught:
        export_widespread(exports.load(), tmp_path, HEIGHT, WIDTH)
    assert str(caught.value) == f"torch {torch.__version__} does not export the widespread form: no such operator"
    assert not list(tmp_path.iterdir())

"""Products in 8 bits: what they compute, which of them a file has, and what their verification would find."""

import functools
import shutil
from pathlib import Path
from typing import Any

import exports
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from exports import MOE
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from moe3d_deploy.bundle import Bundle
from moe3d_deploy.costs import parameters_by_type
from moe3d_deploy.errors import BundleError, ExportError, InputError, Moe3dError
from moe3d_deploy.export import eight_bit, verify
from moe3d_deploy.export.compare import Limits, beyond, errors
from moe3d_deploy.export.eight_bit import Columns
from moe3d_deploy.export.pipeline import ExportOptions, export_bundle
from moe3d_deploy.export.precision import PrecisionPolicy
from moe3d_deploy.export.source import SourceSpec
from moe3d_deploy.export.twin import float32_twin
from moe3d_deploy.runtime import onnx_backend
from moe3d_deploy.runtime.onnx_backend import OnnxBackend
from moe3d_deploy.runtime.onnx_operators import for_onnxruntime
from moe3d_deploy.runtime.session import Session

PRODUCTS = 3 * 4  # of MOE: three blocks, of four products each
SHAPE = (1, 2, 3, 2)  # B, S, rows, columns


@functools.cache
def bundle(**changes: Any) -> Bundle:
    path = exports.new_folder("bundle") / "small"
    options = ExportOptions(PrecisionPolicy("int8"), shapes=(SHAPE, (2, 1, 1, 1)), **changes)
    return export_bundle(SourceSpec(str(exports.checkpoint())), path, options).bundle


def product(weight: NDArray[np.float32], opset: int = 20) -> onnx.ModelProto:
    """y = x @ weight in 8 bits, as a file has it."""
    values, scale = Columns.of(weight)
    nodes = [helper.make_node(eight_bit.NAME, ["x", "values", "scale"], ["y"], domain=eight_bit.DOMAIN)]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", "T", width])
        for name, width in zip("xy", weight.shape, strict=True)
    ]
    tensors = [numpy_helper.from_array(values, "values"), numpy_helper.from_array(scale, "scale")]
    imports = [helper.make_opsetid(*item) for item in {"": opset, **eight_bit.IMPORTS}.items()]
    graph = helper.make_graph(nodes, "product", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=imports, functions=eight_bit.functions(opset), ir_version=10)


def run(model: bytes, x: NDArray[np.float32], saved: Path | None = None) -> NDArray[np.float32]:
    options = ort.SessionOptions()
    if saved:
        options.optimized_model_filepath = str(saved)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def in_the_runtime(model: onnx.ModelProto, x: NDArray[np.float32]) -> NDArray[np.float32]:
    return run(for_onnxruntime(model.SerializeToString()), x)


def by_hand(x: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float64]:
    """The definition, in float64."""
    scale_of_token = np.abs(x).max(-1, keepdims=True).astype(np.float64) / 127
    scale_of_column = np.abs(weight).max(0).astype(np.float64) / 127
    tokens, columns = np.rint(x / scale_of_token), np.rint(weight / scale_of_column)
    return (tokens @ columns) * scale_of_token * scale_of_column


# ---- the weights


def test_columns_reach_from_end_to_end_and_stand_for_what_they_were() -> None:
    weight = np.random.default_rng().standard_normal((50, 7)).astype(np.float32)
    columns = Columns.of(weight)
    assert columns.values.dtype == np.int8
    assert (np.abs(columns.values).max(0) == 127).all()
    assert (np.abs(columns.rounded() - weight) <= np.abs(weight).max(0) / 127 / 2 * 1.0001).all()
    assert Columns.of(columns.rounded()).values.tolist() == columns.values.tolist()


def test_a_column_of_zeros_stays_one() -> None:
    columns = Columns.of(np.zeros((4, 2), np.float32))
    assert (columns.rounded() == 0).all()
    assert (columns.scale == 1).all()


# ---- the product


@pytest.mark.parametrize("opset", [20, 23])
def test_the_kernel_and_the_operations_of_the_file_compute_the_definition(opset: int, tmp_path: Path) -> None:
    rng = np.random.default_rng()
    x, weight = rng.standard_normal((2, 9, 64), np.float32), rng.standard_normal((64, 24), np.float32)
    model = product(weight, opset)
    onnx.checker.check_model(model, full_check=True)

    plain = run(model.SerializeToString(), x, tmp_path / "plain.onnx")
    fused = run(for_onnxruntime(model.SerializeToString()), x, tmp_path / "fused.onnx")

    # A value on the border of two steps may fall to either side in float32: one step of one value.
    step = np.abs(x).max(-1, keepdims=True) / 127 * np.abs(weight).max()
    for found in (plain, fused):
        off = np.abs(found - by_hand(x, weight))
        assert (off <= step * 1.001).all()
        assert np.median(off) < 1e-5
    np.testing.assert_allclose(plain, fused, rtol=1e-5, atol=1e-5)
    kinds = [[node.op_type for node in onnx.load(tmp_path / f"{name}.onnx").graph.node] for name in ("plain", "fused")]
    assert [("MatMulInteger" in each, "MatMulIntegerToFloat" in each) for each in kinds] == [
        (True, False), (False, True),
    ]  # fmt: skip


def test_whole_numbers_from_end_to_end_are_exact() -> None:
    rng = np.random.default_rng()
    x, weight = (rng.integers(-127, 128, shape).astype(np.float32) for shape in ((1, 5, 32), (32, 8)))
    x[..., 0], x[..., 1], weight[0] = 127, -127, 127
    np.testing.assert_allclose(in_the_runtime(product(weight), x), x @ weight, rtol=1e-6, atol=1e-3)


def test_a_token_far_from_the_others_changes_none_of_them() -> None:
    rng = np.random.default_rng()
    x, weight = rng.standard_normal((1, 6, 32), np.float32), rng.standard_normal((32, 8), np.float32)
    before = in_the_runtime(product(weight), x)
    x[0, 2] *= 1e6
    after = in_the_runtime(product(weight), x)
    np.testing.assert_array_equal(np.delete(after, 2, 1), np.delete(before, 2, 1))


def test_a_token_of_zeros_and_one_with_an_infinite_value() -> None:
    x = np.ones((1, 3, 32), np.float32)
    x[0, 1], x[0, 2, 5] = 0, np.inf
    y = in_the_runtime(product(np.ones((32, 3), np.float32)), x)
    np.testing.assert_allclose(y[0, :2], [[32] * 3, [0] * 3], rtol=1e-5)
    assert not np.isfinite(y[0, 2]).any()


# ---- which products of a file


def test_a_bias_without_a_product_is_refused() -> None:
    text = '<ir_version: 10, opset_import: ["": 20]> f (float[N, 2] x) => (float[N, 2] y) <float[2] bias = {1, 2}> {'
    model = ir.serde.deserialize_model(onnx.parser.parse_model(text + " y = Add(x, bias) }"))
    with pytest.raises(ExportError, match="no matrix product with constant weights has the bias bias: it cannot be"):
        eight_bit.quantize_products(model.graph, lambda name: name == "bias")
    assert eight_bit.quantize_products(model.graph, lambda name: False) == 0


def test_which_parameters_have_8_bits() -> None:
    policy = PrecisionPolicy("int8")
    assert policy.eight_bit
    assert policy.has_twin
    assert not policy.sixteen_bit
    trunk = ("aggregator.patch_embed.blocks.0.attn.qkv", "aggregator.global_blocks.7.mlp.fc2")
    assert [policy.type_of(f"{name}.weight") for name in trunk] == ["int8"] * 2
    others = [f"{name}.bias" for name in trunk] + [
        "aggregator.patch_embed.patch_embed.proj.weight",
        "camera_head.trunk.0.attn.qkv.weight",
        "depth_head.projects.0.weight",
        "aggregator.frame_blocks.0.norm1.weight",
    ]
    assert {policy.type_of(name) for name in others} == {"float32"}
    assert {policy.dtype_of()(name) for name in (*others, f"{trunk[0]}.weight")} == {torch.float32}


@pytest.mark.parametrize("split", [None, "heads", "encoder"])
def test_a_file_has_every_weight_of_the_trunk_in_8_bits_and_no_other(split: str | None) -> None:
    whole = bundle(split=split) if split else bundle()
    paths = list(whole.part_paths.values()) or [whole.model_path]
    protos = [onnx.load(path) for path in paths]
    nodes = [node for proto in protos for node in proto.graph.node]
    assert sum(node.op_type == eight_bit.NAME for node in nodes) == PRODUCTS
    bytes_ = [t for proto in protos for t in proto.graph.initializer if t.data_type == TensorProto.INT8]
    in_8_bits = parameters_by_type(MOE, PrecisionPolicy("int8").type_of, point_head=False)["int8"]
    assert sum(numpy_helper.to_array(tensor).size for tensor in bytes_) == in_8_bits
    for proto in protos:
        read = {name for node in proto.graph.node for name in node.input}
        assert {tensor.name for tensor in proto.graph.initializer} <= read


@pytest.mark.parametrize(
    "changes", [{}, {"split": "encoder"}, {"opset": 23, "input": "uint8", "merge": False}], ids=["", "split", "others"]
)
def test_the_bundle_was_verified_itself_and_by_its_twin(changes: dict[str, Any]) -> None:
    verification = bundle(**changes).manifest.verification
    assert verification.status == "passed"
    assert verification.limits == {**Limits.of("int8").errors, "twin": Limits.of("fp32").errors}
    assert verification.headroom == {}
    for case in verification.cases:
        assert set(case["errors"]) == {"executed", "twin"}
        assert case["errors"]["twin"]["depth"]["max"] < 1e-5 < case["errors"]["executed"]["depth"]["max"]


def test_a_session_runs_it() -> None:
    images = verify.images_for(SHAPE, MOE.patch_size)
    found = Session.open(bundle().path).run(images)
    expected = exports.merged().in_the_runtime(images)
    off = errors(found, {name: expected[name] for name in found})
    assert list(beyond(off, Limits.of("int8"))) == []
    assert off["depth"]["max"] > 1e-5


# ---- what a fault would look like


def test_the_twin_shows_a_wrong_scale_that_the_file_itself_would_hide(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(bundle().path, folder)
    images = verify.images_for(SHAPE, MOE.patch_size)
    (tmp_path / "right").mkdir()
    right = {"file": OnnxBackend(folder / "model.onnx").run(images)}
    right["twin"] = OnnxBackend(float32_twin(folder / "model.onnx", tmp_path / "right")).run(images)

    model = onnx.load(folder / "model.onnx")
    scale = next(t for t in model.graph.initializer if "fc1" in t.name and t.name.endswith(".scale"))
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * np.float32(1.003), scale.name))
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    onnx.save(model, wrong / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    found = {"file": OnnxBackend(wrong / "model.onnx").run(images)}
    found["twin"] = OnnxBackend(float32_twin(wrong / "model.onnx", wrong)).run(images)

    assert list(beyond(errors(found["file"], right["file"]), Limits.of("int8"))) == []
    assert list(beyond(errors(found["twin"], right["twin"]), Limits.of("fp32"))) != []


# ---- where it does not run


def test_a_processor_that_would_overflow_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_backend, "multiplies_bytes_exactly", lambda: False)
    with pytest.raises(Moe3dError, match=r"model\.onnx: .* overflow on this processor, which has no VNNI; take a bun"):
        OnnxBackend(bundle().model_path)
    assert OnnxBackend(exports.bundle().path / "model.onnx").output_names  # has none of these products


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"model\.onnx: No such file or directory; copy the bundle or export it"):
        OnnxBackend(tmp_path / "model.onnx")


def test_no_engine_is_built_of_it() -> None:
    from moe3d_deploy.engines.build import resolve_builder

    with pytest.raises(InputError, match="int8 is for ONNX Runtime on a CPU, and no TensorRT has a kernel for its pro"):
        resolve_builder("tensorrt-rtx", precision="int8")


def test_the_command_says_so_before_it_works(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from moe3d_deploy.cli.main import export_main

    assert export_main(["moe3d-tiny", "-o", str(tmp_path / "bundle"), "--precision", "int8"]) == 2
    err: Any = capsys.readouterr().err
    assert "int8 is for ONNX Runtime on a CPU" in err
    assert err.rstrip().endswith("or export without an engine: --builder none")
    assert not (tmp_path / "bundle").exists()


def test_inspect_says_where_it_runs(capsys: pytest.CaptureFixture[str]) -> None:
    from moe3d_deploy.cli.main import main

    assert main(["inspect", str(bundle().path)]) == 0
    assert "int8, opset 20; runs in ONNX Runtime on a CPU only" in capsys.readouterr().out

"""Matrix products in 8 bits: the forms on weights with a known answer, the rewriting of a file, the command."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import exports
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from numpy.typing import NDArray
from onnx import numpy_helper

from moe3d_deploy.benchmarks import eight_bit
from moe3d_deploy.benchmarks.eight_bit_products import FLOAT32, FORMS, PER_TENSOR, PER_TOKEN, chain, in_eight_bits
from moe3d_deploy.errors import InputError
from moe3d_deploy.export.pipeline import ExportOptions, export_bundle
from moe3d_deploy.export.precision import PrecisionPolicy
from moe3d_deploy.export.source import SourceSpec
from moe3d_deploy.runtime.onnx_operators import for_onnxruntime

BLOCK = 32
OF_32 = f"blocks of {BLOCK}"


def run(model: onnx.ModelProto, **inputs: NDArray[Any]) -> list[NDArray[Any]]:
    session = ort.InferenceSession(for_onnxruntime(model.SerializeToString()), providers=["CPUExecutionProvider"])
    return [np.asarray(array) for array in session.run(None, inputs)]


@pytest.mark.parametrize("form", FORMS)
def test_whole_numbers_up_to_127_are_kept(form: str) -> None:
    """Weights and activations that 8 bits hold exactly: the activations reach from 0 to 255 and from -127 to 127."""
    rng = np.random.default_rng()
    weight = rng.integers(-127, 128, (128, 16)).astype(np.float32)
    weight[::32] = 127  # the largest of every column and block
    whole = rng.integers(0, 256, (5, 128)) if form == PER_TENSOR else rng.integers(-127, 128, (5, 128))
    whole[:, ::32], whole[:, 1::32] = (255, 0) if form == PER_TENSOR else (127, -127)
    x = whole.astype(np.float32)
    (y,) = run(chain(form, [("x", "y", weight)], {"x": 128}), x=x)
    np.testing.assert_allclose(y, x @ weight, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("form", FORMS)
def test_other_numbers_are_off_by_what_rounding_can_do(form: str) -> None:
    """Below half a step of a weight and one of an activation in every term, and not by nothing."""
    rng = np.random.default_rng()
    x, weight = rng.standard_normal((7, 128), np.float32), rng.standard_normal((128, 24), np.float32)
    (y,) = run(chain(form, [("x", "y", weight)], {"x": 128}), x=x)
    spread = 2 * np.abs(x).max() / 255 if form == PER_TENSOR else np.abs(x).max() / 127
    of_weights, of_x = np.abs(weight).max() / 127 / 2, spread
    bound = np.abs(x).sum(1, keepdims=True) * of_weights + np.abs(weight).sum(0) * of_x + 128 * of_weights * of_x
    assert (np.abs(y - x @ weight) < bound).all()
    assert np.abs(y - x @ weight).max() > 1e-4


def test_a_value_far_from_the_others_spoils_a_whole_tensor_but_no_other_token_in_the_other_forms() -> None:
    rng = np.random.default_rng()
    x, weight = rng.standard_normal((64, 128), np.float32), rng.standard_normal((128, 24), np.float32)
    x[0, 0] = 1000
    errors = {}
    for form in FORMS:
        (y,) = run(chain(form, [("x", "y", weight)], {"x": 128}), x=x)
        errors[form] = float(np.sqrt(np.mean((y - x @ weight)[1:] ** 2)))  # of the other tokens
    assert errors[PER_TENSOR] > 10 * max(error for form, error in errors.items() if form != PER_TENSOR)


def test_a_column_of_zeros_stays_zero() -> None:
    weight = np.zeros((128, 2), np.float32)
    weight[:, 1] = 1
    for form in FORMS:
        (y,) = run(chain(form, [("x", "y", weight)], {"x": 128}), x=np.ones((3, 128), np.float32))
        np.testing.assert_allclose(y, [[0, 128]] * 3, rtol=0.01)


def test_a_token_of_zeros_stays_zero() -> None:
    x = np.zeros((2, 128), np.float32)
    x[1] = 1
    for form in FORMS:
        (y,) = run(chain(form, [("x", "y", np.ones((128, 3), np.float32))], {"x": 128}), x=x)
        np.testing.assert_allclose(y, [[0] * 3, [128] * 3], rtol=0.01)


def test_a_weight_that_no_block_divides_is_refused() -> None:
    with pytest.raises(InputError, match="a weight of 48 rows cannot be cut into blocks of 32"):
        chain(OF_32, [("x", "y", np.ones((48, 4), np.float32))], {"x": 48})


def test_the_chain_gives_what_no_product_reads() -> None:
    first, second = np.eye(32, 64, dtype=np.float32), np.eye(64, 8, dtype=np.float32)
    model = chain(FLOAT32, [("x", "middle", first), ("middle", "y", second), ("x", "z", first)], {"x": 32})
    assert [output.name for output in model.graph.output] == ["y", "z"]
    x = np.random.default_rng().standard_normal((3, 32), np.float32)
    np.testing.assert_array_equal(run(model, x=x)[0], x[:, :8])


@pytest.mark.parametrize(
    ("kind", "bias", "chosen"),
    [
        ("all", "model.aggregator.frame_blocks.3.attn.qkv.bias", True),
        ("qkv", "model.aggregator.patch_embed.blocks.0.attn.qkv.bias", True),
        ("qkv", "model.aggregator.global_blocks.23.attn.proj.bias", False),
        ("fc2", "model.aggregator.global_blocks.23.mlp.fc2.bias", True),
        ("all", "model.camera_head.trunk.0.attn.qkv.bias", False),
        ("all", "model.aggregator.patch_embed.norm.bias", False),
        ("all", "", False),
    ],
)
def test_the_products_of_encoder_and_aggregator_are_chosen_by_kind(kind: str, bias: str, chosen: bool) -> None:
    assert eight_bit._is_of(kind, bias) is chosen


def test_a_file_is_rewritten_where_chosen_and_loses_the_weights_that_it_no_longer_needs() -> None:
    whole = exports.merged().proto
    model = onnx.ModelProto()
    model.CopyFrom(whole)

    assert in_eight_bits(model, OF_32, partial(eight_bit._is_of, "fc1")) == 3  # encoder, frame, global

    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("MatMulNBits") == 3
    assert kinds.count("MatMul") == [node.op_type for node in whole.graph.node].count("MatMul") - 3
    read = {name for node in model.graph.node for name in node.input}
    assert {tensor.name for tensor in model.graph.initializer} <= read
    sizes = [sum(numpy_helper.to_array(t).nbytes for t in proto.graph.initializer) for proto in (whole, model)]
    saved = 3 * 32 * 64 * 4 - 3 * (32 * 64 + 64 * 4)  # float32 -> a byte a value and a scale a column
    assert sizes[0] - sizes[1] == saved


def test_the_command_writes_what_the_table_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eight_bit, "FORMS", (PER_TENSOR, PER_TOKEN, OF_32))  # the test model's blocks are 32 wide
    monkeypatch.setattr(eight_bit, "VIEW", (1, 1, 28, 42))
    out, bundle = tmp_path / "eight_bit.json", tmp_path / "bundle"
    export_bundle(SourceSpec(str(exports.checkpoint())), bundle, ExportOptions(PrecisionPolicy("fp32"), verify=False))
    arguments = ["--like", "moe3d-tiny", "--runs", "3", "--count", "1", "--views", "2", "--out", str(out)]
    ended = CliRunner().invoke(eight_bit.main, [str(bundle), *arguments], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output

    report = json.loads(out.read_text())
    rows = report["depth"]["rows"]
    assert [(row["form"], row["kind"]) for row in rows] == [
        (form, kind) for form in (PER_TENSOR, PER_TOKEN, OF_32) for kind in ("all", *eight_bit.KINDS)
    ]
    assert [row["products"] for row in rows] == [12, 3, 3, 3, 3] * 3
    assert all(0 < row["rms"] < 0.2 for row in rows)
    assert all(seconds > 0 for seconds in report["products"]["seconds"].values())
    shown = eight_bit.table(report)
    assert "| all (12) | per tensor |" in shown
    assert "| float32 |" in shown


def test_a_bundle_that_is_not_float32_is_refused(tmp_path: Path) -> None:
    arguments = [str(exports.bundle().path), "--out", str(tmp_path / "out.json")]
    with pytest.raises(InputError, match="is not one file in float32; export it with --precision fp32"):
        CliRunner().invoke(eight_bit.main, arguments, catch_exceptions=False)

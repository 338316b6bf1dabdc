"""The variants of a file: bf16, attention as an operator, 8-bit pixels, fixed axes, every output at once."""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import exports
import numpy as np
import onnx
import pytest
import variants
from exports import MOE, Exported
from onnx import TensorProto

from moe3d_deploy.bundle import Bundle
from moe3d_deploy.errors import InputError
from moe3d_deploy.export import pipeline, verify
from moe3d_deploy.export.compare import Limits, errors, require_within
from moe3d_deploy.export.contract import DEFAULT_OUTPUTS, OPTIONAL_OUTPUTS
from moe3d_deploy.export.pipeline import ExportOptions
from moe3d_deploy.export.source import SourceSpec
from moe3d_deploy.manifest import Range
from moe3d_deploy.runtime.onnx_operators import NAME as ATTENTION
from moe3d_deploy.runtime.pixels import to_floats

EVERY_OUTPUT = (*DEFAULT_OUTPUTS, *OPTIONAL_OUTPUTS)
BLOCKS = 3  # of MOE: one in the encoder, two in the aggregator


def proto_of(bundle: Bundle) -> onnx.ModelProto:
    return onnx.load(bundle.model_path)


def dims(value: onnx.ValueInfoProto) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def metadata(bundle: Bundle, key: str) -> Any:
    return next(json.loads(e.value) for e in proto_of(bundle).metadata_props if e.key == f"moe3d.{key}")


# ---- what the manifest and the file say


@pytest.mark.parametrize(
    ("of", "precision", "opset", "images", "layout", "depth"),
    [
        (variants.brain, "bf16", 23, ("uint8", (1, "S", 28, 42, 3)), "BSHW3", (1, "S", 28, 42)),
        (variants.pixels, "fp32", 20, ("uint8", ("B", "S", "H", "W", 3)), "BSHW3", ("B", "S", "H", "W")),
        pytest.param(
            variants.operator,
            "fp16",
            23,
            ("float32", ("B", 2, 3, "H", "W")),
            "BS3HW",
            ("B", 2, "H", "W"),
            marks=pytest.mark.full,
        ),
    ],
)
def test_manifest_and_file_agree_on_what_was_asked_for(
    of: Any, precision: str, opset: int, images: tuple[str, Any], layout: str, depth: Any
) -> None:
    manifest, proto = of().manifest, proto_of(of())
    assert (manifest.precision, manifest.opset, manifest.preprocessing.layout) == (precision, opset, layout)
    assert [(t.name, t.dtype, t.shape) for t in manifest.inputs] == [("images", *images)]
    assert manifest.outputs[0].shape == depth
    assert {entry.domain: entry.version for entry in proto.opset_import}[""] == opset
    assert {entry.domain: entry.version for entry in proto.functions[0].opset_import} == {"": opset}
    (found,) = proto.graph.input
    kind = {"uint8": TensorProto.UINT8, "float32": TensorProto.FLOAT}[images[0]]
    assert (tuple(dims(found)), found.type.tensor_type.elem_type) == (images[1], kind)
    assert [(o.name, tuple(dims(o))) for o in proto.graph.output] == [(t.name, t.shape) for t in manifest.outputs]
    assert {o.type.tensor_type.elem_type for o in proto.graph.output} == {TensorProto.FLOAT}
    assert metadata(of(), "shape_ranges") == dataclasses.asdict(manifest.shape_ranges)
    assert metadata(of(), "preprocessing") == json.loads(json.dumps(dataclasses.asdict(manifest.preprocessing)))
    assert manifest.verification.status == "passed"


def test_fixed_axes_have_one_value_and_free_ones_all() -> None:
    brain = variants.brain().manifest
    ranges = brain.shape_ranges
    assert (ranges.batch, ranges.views, ranges.height, ranges.width) == (
        Range(1, 1), Range(1, None), Range(28, 28), Range(42, 42),
    )  # fmt: skip
    assert brain.preprocessing.size == 42
    # Verified where they accept something: the six shapes with the fixed sizes in them, each once.
    assert [case["shape_in_patches"] for case in brain.verification.cases] == [[1, s, 2, 3] for s in (1, 2, 5, 9)]


@pytest.mark.parametrize(
    ("of", "kind"),
    [
        (variants.brain, TensorProto.BFLOAT16),
        pytest.param(variants.operator, TensorProto.FLOAT16, marks=pytest.mark.full),
    ],
)
def test_attention_is_onnxs_operator_in_encoder_and_aggregator_and_a_function_in_the_camera_head(
    of: Any, kind: int
) -> None:
    """The camera head is float32 in every precision, and in float32 TensorRT has no kernel of the whole."""
    inferred = onnx.shape_inference.infer_shapes(onnx.load(of().model_path, load_external_data=False))
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    attentions = [node for node in inferred.graph.node if node.op_type == "Attention"]
    assert len(attentions) == BLOCKS
    assert {types[name] for node in attentions for name in (*node.input, *node.output)} == {kind}
    functions = [node for node in inferred.graph.node if node.op_type == ATTENTION]
    assert len(functions) == MOE.camera_head.num_iterations * MOE.camera_head.trunk_depth
    assert not [node for node in proto_of(variants.pixels()).graph.node if node.op_type == "Attention"]


def test_bf16_files_hold_bfloat16_products_and_float32_elsewhere() -> None:
    kinds = Counter(t.data_type for t in proto_of(variants.brain()).graph.initializer)
    # 4 linear layers of every block; a weight each, and a bias each.
    assert kinds[TensorProto.BFLOAT16] == BLOCKS * 4 * 2
    assert not kinds[TensorProto.FLOAT16]


# ---- what they compute


def test_pixels_and_floats_give_the_same_bits() -> None:
    """The same weights and operators: a pixel is divided by 255 in float32 here and there."""
    every = variants.exported(variants.pixels(), OPTIONAL_OUTPUTS)
    levels = np.random.default_rng(0).integers(0, 256, (2, 3, 42, 28, 3), dtype=np.uint8)
    assert len(np.unique(levels)) == 256
    found, expected = every.run(levels), exports.merged().run(to_floats(levels))
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


@pytest.mark.parametrize("precision", ["fp32", pytest.param("fp16", marks=pytest.mark.full)])
def test_every_output_at_once_is_what_pytorch_gives(precision: str) -> None:
    bundle = variants.pixels() if precision == "fp32" else variants.operator()
    file: Exported = variants.exported(bundle, OPTIONAL_OUTPUTS)
    levels = verify.pixels_for((2, 2, 3, 4), MOE.patch_size)
    floats = to_floats(levels)
    found, expected = file.run(levels if precision == "fp32" else floats), file.reference(floats)
    assert set(found) == set(EVERY_OUTPUT)
    require_within(precision, errors(found, expected), Limits.of(precision), "")
    for case in bundle.manifest.verification.cases:
        assert set(case["errors"]["executed"]) == set(EVERY_OUTPUT)


def test_a_bf16_file_is_verified_by_its_twin_and_by_rounding_in_pytorch() -> None:
    verification = variants.brain().manifest.verification
    assert verification.limits == {**Limits.of("bf16").errors, "twin": Limits.of("fp32").errors}
    for case in verification.cases:
        assert set(case["errors"]) == {"twin", "rounded"}
        for output in DEFAULT_OUTPUTS:
            assert case["errors"]["twin"][output]["max"] < 5e-5
            assert case["errors"]["rounded"][output]["max"] < 8e-2
        assert case["errors"]["rounded"]["depth"]["mean"] > 5e-5  # it is in bfloat16 indeed
    assert 0 < max(verification.headroom["largest"].values()) < 1e-30  # of 3.4e38


def test_the_same_checkpoint_gives_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    """Of bf16, 8-bit pixels, opset 23 and fixed axes in one: the bundle's were written by a child."""
    options = variants.BRAIN
    request = {
        "source": dataclasses.asdict(SourceSpec(str(exports.checkpoint()))),
        "policy": dataclasses.asdict(options.policy),
        "merge": True,
        "outputs": [],
        "opset": options.opset,
        "input": options.input,
        "static": dataclasses.asdict(options.static),
        "split": options.split,
        "folder": str(tmp_path),
    }
    pipeline.export_stage(request, lambda event: None)
    for name in ("model.onnx", "model.onnx.data"):
        assert (tmp_path / name).read_bytes() == (variants.brain().path / name).read_bytes(), name


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 21}, "opset 21 cannot be exported; choose from 20, 23"),
        ({"input": "float16"}, "input 'float16' cannot be exported; choose from float32, uint8"),
    ],
)
def test_a_variant_that_does_not_exist_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        ExportOptions(**options)
    assert str(caught.value) == message


# ---- each output alone


@pytest.mark.full
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("output", OPTIONAL_OUTPUTS)
def test_each_output_alone_is_what_pytorch_gives(output: str, precision: str) -> None:
    options = ExportOptions(pipeline.PrecisionPolicy(precision), outputs=(output,), shapes=((1, 3, 2, 3),))
    manifest = variants.export_here(options).manifest
    assert [tensor.name for tensor in manifest.outputs] == [*DEFAULT_OUTPUTS, output]
    (case,) = manifest.verification.cases
    assert set(case["errors"]["executed"]) == {*DEFAULT_OUTPUTS, output}

"""What is compared with a checkpoint, and which bundles are refused; no model is run."""

from pathlib import Path

import pytest
from bundles import edit_manifest, write_bundle

from moe3d_deploy import trt
from moe3d_deploy.benchmarks.bench.parity import COMPARED, NOT_RUN
from moe3d_deploy.benchmarks.bench.parity_plan import ParityPlan, plan_parity
from moe3d_deploy.config import PRESETS
from moe3d_deploy.errors import InputError
from moe3d_deploy.export.source import SourceSpec

pytest_plugins = ["bundle_fixtures"]

TINY = SourceSpec("moe3d-tiny")


def a_plan(*bundles: Path) -> ParityPlan:
    return plan_parity(TINY, [str(bundle) for bundle in bundles])


def with_digest(bundle: Path, digest: str | None) -> Path:
    edit_manifest(bundle, checkpoint={"origin": "preset:moe3d-tiny seed 7", "sha256": digest, "licence": "none"})
    return bundle


def test_a_checkpoint_alone_is_compared_in_both_sixteen_bit_precisions() -> None:
    plan = a_plan()
    assert [(variant.backend, variant.precision) for variant in plan.variants] == [
        ("pytorch", "fp32"), ("pytorch", "fp16"), ("pytorch", "bf16")
    ]  # fmt: skip
    assert plan.names == ("depth", "depth_conf", "extrinsics", "intrinsics")
    assert plan.reference_model["outputs"] == ["expert_weights"]
    assert len(plan.shapes) >= 30


def test_a_bundle_of_another_precision_has_its_rounding_in_pytorch_beside_it(bundle: Path) -> None:
    edit_manifest(bundle, precision="fp16-fp32heads")
    plan = a_plan(bundle)
    assert [variant.precision for variant in plan.variants] == [
        "fp32", "fp16", "bf16", "fp16-fp32heads", "fp16-fp32heads", "fp16-fp32heads", "fp16-fp32heads"
    ]  # fmt: skip


def test_products_in_8_bits_have_no_form_in_pytorch(bundle: Path) -> None:
    edit_manifest(bundle, precision="int8")
    found = [(variant.backend, variant.precision, variant.arithmetic) for variant in a_plan(bundle).variants[3:]]
    assert found[0] == ("onnxruntime", "int8", "ONNX Runtime's own, products in 8 bits")
    assert [backend for backend, *_ in found[1:]] == ["tensorrt", "tensorrt-rtx"]  # which it has no engine of


def test_a_bundle_of_the_same_weights_is_known_by_their_digest(bundle: Path) -> None:
    digest = TINY.open().sha256()
    plan = a_plan(with_digest(bundle, digest))
    assert plan.variants[3].weights == "the bundle names the checkpoint's SHA-256"
    assert plan.sha256 == digest


def test_a_bundle_of_other_weights_is_refused(bundle: Path) -> None:
    with pytest.raises(InputError) as caught:
        a_plan(with_digest(bundle, "ab" * 32))
    digest = TINY.open().sha256()[:12]
    assert str(caught.value) == (
        f"bundle {bundle} was not made of moe3d-tiny: it is of preset:moe3d-tiny seed 7, weights of SHA-256 "
        f"abababababab..., the checkpoint's is {digest}...; name the checkpoint that it was made of, or export it again"
    )


def test_a_bundle_that_names_no_digest_is_compared_by_its_config_and_the_report_says_so(bundle: Path) -> None:
    (variant,) = [variant for variant in a_plan(bundle).variants if variant.backend == "onnxruntime"]
    assert variant.weights == "the bundle names no digest of its weights: its config alone was compared"
    config = PRESETS["moe3d-tiny"].to_dict()
    edit_manifest(bundle, model_config={**config, "moe": {**config["moe"], "num_experts": 3}})
    with pytest.raises(
        InputError, match="was not made of moe3d-tiny: its model config is another; name the checkpoint"
    ):
        a_plan(bundle)


def test_a_bundle_without_a_point_head_is_of_the_checkpoint_that_has_one(bundle: Path) -> None:
    edit_manifest(bundle, model_config={**PRESETS["moe3d-tiny"].to_dict(), "point_head": False})
    assert len(a_plan(bundle).variants) == 6


def test_what_cannot_run_here_is_an_entry_with_the_reason(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt, "visible_gpus", list)
    *_, in_runtime, none, engine = a_plan(bundle).variants
    assert in_runtime.status == COMPARED
    assert (none.backend, none.status, none.reason) == ("tensorrt", NOT_RUN, "the bundle has no such engine")
    assert engine.variant().label == (
        "tensorrt-rtx fp16 bundle/moe3d-tiny_1-4-8x392x518_fp16_sm89_rtx1.6.1.plan"
    )  # fmt: skip
    assert (engine.status, engine.reason) == (NOT_RUN, "no NVIDIA GPU is visible here")
    assert engine.model == {}


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "TensorRT-RTX is not installed here"),
        ("1.7.1.116", "built by TensorRT-RTX 1.6.1, here is 1.7.1.116; it needs a plugin library"),
    ],
)
def test_an_engine_of_another_machine_says_why(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, version: str | None, reason: str
) -> None:
    monkeypatch.setattr(trt, "visible_gpus", lambda: [(8, 9)])
    monkeypatch.setattr(trt, "available", lambda: {"tensorrt-rtx": version} if version else {})
    assert str(a_plan(bundle).variants[-1].reason).startswith(reason)


def test_a_bf16_bundle_is_not_run_in_onnx_runtime(bundle: Path) -> None:
    edit_manifest(bundle, precision="bf16")
    variant = a_plan(bundle).variants[3]
    assert (variant.backend, variant.status) == ("onnxruntime", NOT_RUN)
    assert str(variant.reason).startswith("ONNX Runtime has no bf16 kernels on a CPU")


def test_two_bundles_of_one_name_are_refused(bundle: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "bundle"
    other.parent.mkdir()
    write_bundle(other)
    with pytest.raises(InputError, match="are both called bundle in a report; rename one of them"):
        a_plan(bundle, other)
    renamed = other.rename(tmp_path / "second")
    assert len(a_plan(bundle, renamed).variants) == 9


def test_a_shape_that_the_model_does_not_take_is_refused() -> None:
    with pytest.raises(InputError, match="height 30 is not a multiple of the patch size 7; nearest: 28 and 35"):
        plan_parity(TINY, [], [(1, 1, 30, 42)])

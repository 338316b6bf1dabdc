"""The GPU checks of the PyTorch model, on the CPU: what they compare, and what they call wrong.

Not run here: CUDA's times and memory, and a real torch.compile.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import GOLDEN_TINY, random_images, small_model
from recorder import Recorder

from moe3d_deploy.benchmarks import checks_experts, checks_torch, torch_device
from moe3d_deploy.benchmarks.timing import Effort
from moe3d_deploy.config import (
    PRESETS,
    AggregatorConfig,
    CameraHeadConfig,
    DptHeadConfig,
    ModelConfig,
    MoeConfig,
    VitConfig,
)
from moe3d_deploy.model import MoE3D

CPU = torch.device("cpu")
QUICK = Effort(min_runs=2, max_runs=2, budget_ms=1, warmup_budget_ms=1)
# torch's half convolutions on a CPU take most of the time of these tests
SMALLEST = ModelConfig(
    img_size=28,
    vit=VitConfig(embed_dim=32, depth=1, num_heads=2),
    aggregator=AggregatorConfig(embed_dim=32, depth=2, num_heads=2),
    camera_head=CameraHeadConfig(dim_in=64, trunk_depth=1, num_heads=2),
    dpt_head=DptHeadConfig(dim_in=64, features=16, out_channels=(8, 8, 8, 8), intermediate_layer_idx=(0, 0, 1, 1)),
    point_head=False,
)


@pytest.fixture
def run(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path)


def golden_files(data_dir: Path) -> list[Path]:
    return [data_dir / f"golden_tiny_{name}.npz" for name in GOLDEN_TINY]


def test_golden_errors_of_every_output_and_both_attentions_are_within_the_limit(run: Recorder, data_dir: Path) -> None:
    checks_torch.golden_errors(run, golden_files(data_dir), CPU)
    assert run.failures == []
    assert set(run.figures["errors"]) == {f"golden_tiny_{name}" for name in GOLDEN_TINY}
    for forms in run.figures["errors"].values():
        assert set(forms) == {"fused", "explicit"}
        assert {"depth", "pose_enc", "point_map", "world_points"} < set(forms["fused"])


def test_a_golden_error_above_the_limit_fails_and_names_the_output(
    run: Recorder, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TF32 or a wrong kernel would show like this change of one weight."""
    unchanged = checks_torch.seeded_tensor

    def changed(name: str, shape: Any) -> np.ndarray:
        return unchanged(name, shape) * (1.001 if name == "depth_head.scratch.output_conv1.weight" else 1)

    monkeypatch.setattr(checks_torch, "seeded_tensor", changed)
    checks_torch.golden_errors(run, golden_files(data_dir)[:1], CPU)
    assert run.failures
    assert all(": depth" in line or ": world_points" in line for line in run.failures)
    assert run.failures[0].startswith("golden_tiny_1x2x3x56x56, fused attention: depth is off by ")


CEILINGS = {name: {"tflops": 1e3} for name in ("fp32", "fp16", "bf16")}


def run_forms(
    run: Recorder,
    ceilings: dict[str, dict[str, float]] | None = None,
    views: tuple[int, ...] = (2,),
    **options: Any,
) -> None:
    checks_torch.run_forms(
        run,
        dataclasses.replace(SMALLEST, moe=MoeConfig()),
        "smallest",
        CPU,
        ceilings or CEILINGS,
        shapes=[(count, 14, 28) for count in views],
        compiler=lambda model: model,
        effort=QUICK,
        **options,
    )


def test_every_form_is_timed_and_compared_with_float32(run: Recorder) -> None:
    run_forms(run, views=(1, 2))
    assert run.failures == []
    cases = run.figures["cases"]
    forms = ["eager fp32", "autocast bf16", "eager fp16", "compiled fp16"]
    assert [(case["form"], case["views"]) for case in cases] == [(form, views) for form in forms for views in (1, 2)]
    assert {(case["height"], case["width"]) for case in cases} == {(14, 28)}
    for case in cases:
        assert case["finite"] is True
        assert 0 < case["p10_ms"] <= case["median_ms"] <= case["p90_ms"]
        assert case["tflops"] == pytest.approx(case["gflop"] / case["median_ms"])
        assert case["peak_allocated_bytes"] is None  # known on a GPU only
    assert "errors" not in cases[0]
    # bf16 keeps 8 bits of a number and fp16 11, so both differ from float32, bf16 more; both stay small.
    bf16, fp16 = (cases[i]["errors"]["depth"]["mean"] for i in (3, 5))
    assert 1e-5 < fp16 < bf16 < 1e-2


def test_forms_and_what_is_compiled_can_be_fewer(run: Recorder) -> None:
    run_forms(run, views=(1, 2), forms=("eager fp32", "eager fp16"))
    assert [case["form"] for case in run.figures["cases"]] == ["eager fp32"] * 2 + ["eager fp16"] * 2
    run_forms(run, views=(1, 2), compiled=[(2, 14, 28)])
    assert [case["views"] for case in run.figures["cases"] if case["form"] == "compiled fp16"] == [2]


def test_the_fastest_16_bit_form_is_held_against_the_goal(run: Recorder) -> None:
    def case(form: str, views: int, **figures: Any) -> dict[str, Any]:
        return {"form": form, "views": views, "height": 14, "width": 28, **figures}

    cases = [
        case("eager fp32", 1, median_ms=1.0),
        case("eager fp16", 1, median_ms=9.0),
        case("compiled fp16", 1, median_ms=7.0),
        case("eager fp16", 8, median_ms=70.0),
        case("compiled fp16", 8, out_of_memory=True),
        case("eager fp32", 2, median_ms=1.0),
    ]
    checks_torch.judge_goals(run, cases, {(1, 14, 28): 8.0, (8, 14, 28): 60.0, (2, 14, 28): 5.0})
    assert run.figures["goals"] == [
        {"shape": [1, 14, 28], "goal_ms": 8.0, "median_ms": 7.0, "form": "compiled fp16", "reached": True},
        {"shape": [8, 14, 28], "goal_ms": 60.0, "median_ms": 70.0, "form": "eager fp16", "reached": False},
    ]
    assert run.notes == ["eager fp16, 8 views of 28x14: 70.0 ms, the goal is 60 ms"]


def test_many_views_are_on_both_sides_of_what_fp16_can_count() -> None:
    tokens = [views * ((height // 14) * (width // 14) + 5) for views, height, width in checks_torch.MANY_VIEWS]
    assert tokens[0] < torch.finfo(torch.float16).max < tokens[1] < tokens[2]


def test_a_rate_above_the_measured_ceiling_is_marked_as_wrong(run: Recorder) -> None:
    run_forms(run, {**CEILINGS, "bf16": {"tflops": 1e-9}})
    assert len(run.failures) == 1
    assert run.failures[0].startswith("autocast bf16, 2 views of 28x14: ")
    assert "above the measured ceiling, so one of the two is wrong" in run.failures[0]


def test_values_that_are_not_finite_fail(run: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    def spoilt(*args: Any) -> tuple[MoE3D, float]:
        model, seconds = load(*args)
        if args[-1].precision == "fp16":
            model.depth_head.merged.expert_bias.fill_(100)  # exp(100) is beyond float32
        return model, seconds

    load = checks_torch._load
    monkeypatch.setattr(checks_torch, "_load", spoilt)
    run_forms(run)
    assert "eager fp16, 2 views of 28x14: an output is not finite" in run.failures
    assert any(line.startswith("eager fp16, 2 views of 28x14: depth is off by inf") for line in run.failures)


def test_out_of_device_memory_is_a_note_and_the_other_cases_go_on(
    run: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(forward: Any, images: torch.Tensor, *args: Any) -> Any:
        if images.shape[1] == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return unchanged(forward, images, *args)

    unchanged = checks_torch._measure
    monkeypatch.setattr(checks_torch, "_measure", measure)
    run_forms(run, views=(1, 2))
    assert run.failures == []
    assert [case.get("out_of_memory", False) for case in run.figures["cases"]] == [False, True] * 4
    assert "eager fp32, 2 views of 28x14: out of device memory" in run.notes


def test_autocast_leaves_residual_stream_heads_and_position_embedding_in_float32() -> None:
    """The reference's recipe: 16-bit products and attention in the trunk, float32 between them and in the heads."""
    model = small_model(MoeConfig())
    types: dict[str, torch.dtype] = {}
    for name, module in model.named_modules():
        module.register_forward_hook(lambda m, i, out, name=name: types.update({name: getattr(out, "dtype", None)}))
    checks_torch.autocast_trunk(model, torch.bfloat16, "cpu")
    with torch.inference_mode():
        model(random_images(1, 2, 3, 28, 42))
    block = "aggregator.global_blocks.0"
    assert types[f"{block}.attn.qkv"] == types[f"{block}.mlp.fc2"] == torch.bfloat16
    assert types[f"{block}.norm1"] == types[f"{block}.ls1"] == torch.float32
    assert types["depth_head.projects.0"] == types["camera_head.pose_branch.fc1"] == torch.float32
    assert types["aggregator.patch_embed.patch_embed.proj"] == torch.bfloat16
    assert types["aggregator.patch_embed"] == torch.float32


def test_flop_count_is_that_of_the_specification() -> None:
    """2,434.5 GFLOP: VGGT-1B without its point head, 1 view of 518x392, from closed formulas. The model adds 0.16 GFLOP
    for resampling the position embedding by matrix products, which the formulas leave out: 7e-5."""
    with torch.device("meta"):
        model = MoE3D(dataclasses.replace(PRESETS["vggt-1b"], point_head=False)).eval().requires_grad_(False)
    assert torch_device.count_flop(model, 1, 1, 3, 392, 518) == pytest.approx(2434.5e9, rel=1e-4)


def test_ceiling_is_the_best_of_its_sizes() -> None:
    found = torch_device.matmul_ceiling(torch.float32, CPU, sides=(8, 128), effort=QUICK)
    assert found["side"] == 128  # 8x8 is all overhead
    assert found["tflops"] == pytest.approx(2 * 128**3 / found["median_ms"] / 1e9)


def test_expert_head_is_compared_with_the_single_one_part_by_part(run: Recorder) -> None:
    checks_experts.compare_heads(run, SMALLEST, MoeConfig(), CPU, views=(1, 2), size=(14, 28), effort=QUICK)
    assert run.failures == []
    cases = run.figures["cases"]
    found = [(case["precision"], case["views"], case["part"]) for case in cases]
    assert found == [(p, v, part) for p in ("fp32", "fp16") for v in (1, 2) for part in ("last stage", "head")]
    for case in cases:
        assert 0 < case["ratio"]["p10"] <= case["ratio"]["median"] <= case["ratio"]["p90"]
        assert case["single"]["runs"] == case["experts"]["runs"] == 2


def test_heads_of_the_comparison_share_all_weights_before_the_last_stage() -> None:
    single, mixed = (
        checks_experts._head(dataclasses.replace(SMALLEST, moe=moe), "fp32") for moe in (None, MoeConfig())
    )
    common = {name for name in single.state_dict() if "output_conv2" not in name}
    assert common == {name for name in mixed.state_dict() if not name.startswith("merged")}
    assert all(torch.equal(single.state_dict()[name], mixed.state_dict()[name]) for name in common)

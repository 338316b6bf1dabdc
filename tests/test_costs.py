"""The cost model against published figures, torch's FLOP counter over the real model, and hand computation."""

import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from cost_models import ODD, configs, grids, in_pixels, meta_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moe3d_deploy import costs
from moe3d_deploy.config import PRESETS, ModelConfig, MoeConfig
from moe3d_deploy.costs import Shape4
from moe3d_deploy.errors import InputError
from moe3d_deploy.export.precision import PrecisionPolicy
from moe3d_deploy.model.moe3d import OF_POINT_HEAD
from moe3d_deploy.parameter_shapes import parameter_shapes

VGGT = PRESETS["vggt-1b"]
MOE3D = PRESETS["moe3d-1b"]

# Upstream VGGT-1B under torch's FlopCounterMode: views, width, height -> FLOPs.
TOTALS = {
    (1, 518, 518): 3_646_817_039_872,
    (2, 518, 518): 7_664_805_866_496,
    (8, 518, 518): 39_567_346_348_032,
    (1, 518, 392): 2_660_265_109_504,
    (2, 518, 392): 5_533_590_835_200,
    (8, 518, 392): 27_247_818_129_408,
}

# The same per component, in GFLOP to one decimal, in the columns of TOTALS.
COMPONENTS = {
    "encoder patch conv": (1.6, 3.3, 13.2, 1.2, 2.5, 10.0),
    "encoder linear": (829.9, 1659.7, 6638.9, 628.7, 1257.5, 5029.9),
    "encoder attention": (185.6, 371.2, 1484.7, 106.5, 213.1, 852.2),
    "frame linear": (829.9, 1659.7, 6638.9, 628.7, 1257.5, 5029.9),
    "frame attention": (185.6, 371.2, 1484.7, 106.5, 213.1, 852.2),
    "global linear": (829.9, 1659.7, 6638.9, 628.7, 1257.5, 5029.9),
    "global attention": (185.6, 742.3, 11877.5, 106.5, 426.1, 6817.9),
    "camera head": (1.7, 3.5, 13.8, 1.7, 3.5, 13.8),
    "depth head projects": (15.8, 31.6, 126.3, 11.9, 23.9, 95.6),
    "depth head resize_layers": (12.6, 25.1, 100.4, 9.4, 18.7, 74.9),
    "depth head layer_rn": (46.9, 93.8, 375.4, 35.5, 70.9, 283.8),
    "depth head refinenet4": (1.0, 2.1, 8.2, 0.8, 1.5, 6.1),
    "depth head refinenet3": (7.2, 14.4, 57.4, 5.4, 10.9, 43.5),
    "depth head refinenet2": (28.7, 57.4, 229.7, 21.7, 43.5, 173.8),
    "depth head refinenet1": (114.8, 229.7, 918.7, 86.9, 173.8, 695.2),
    "depth head output_conv1": (51.7, 103.4, 413.4, 39.1, 78.2, 312.9),
    "depth head output_conv2": (19.8, 39.6, 158.5, 15.0, 30.0, 120.0),
}
POINT_HEAD = (298.6, 597.1, 2388.4, 225.7, 451.5, 1806.0)
WITHOUT_POINT_HEAD = (3348.3, 7067.7, 37178.9, 2434.5, 5082.1, 25441.8)


def counted(model: nn.Module, shape: Shape4) -> FlopCounterMode:
    """torch's count of one run without data; the point head runs if the model has one."""
    batch, views, height, width = shape
    outputs = OF_POINT_HEAD if hasattr(model, "point_head") else ()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(torch.empty(batch, views, 3, height, width, device="meta"), outputs=outputs)
    return counter


def seen_by_a_counter(config: ModelConfig, shape: Shape4) -> int:
    """What a counter over the PyTorch model gives: the total, and the resampling of the position embedding."""
    batch, views, height, width = shape
    total = costs.total_flops(config, views, height, width, batch=batch)
    return total + costs.position_embedding_flops(config, height, width)


@pytest.mark.parametrize(("case", "expected"), TOTALS.items(), ids=str)
def test_totals_are_the_published_integers(case: tuple[int, int, int], expected: int) -> None:
    views, width, height = case
    assert costs.total_flops(VGGT, views, height, width) == expected


@pytest.mark.parametrize("column", range(6), ids=[str(case) for case in TOTALS])
def test_components_are_the_published_figures(column: int) -> None:
    views, width, height = list(TOTALS)[column]
    found = costs.flops(VGGT, 1, views, height, width)
    points = [value for name, value in found.items() if name.startswith("point head")]
    rounded = {name: round(value / 1e9, 1) for name, value in found.items() if not name.startswith("point head")}
    assert rounded == {name: figures[column] for name, figures in COMPONENTS.items()}
    assert round(sum(points) / 1e9, 1) == POINT_HEAD[column]
    without = costs.total_flops(VGGT, views, height, width, point_head=False)
    assert round(without / 1e9, 1) == WITHOUT_POINT_HEAD[column]


def test_modules_are_the_published_counts() -> None:
    """GFLOP that a counter gave for modules of the upstream model at one view of 518x518."""
    found = costs.flops(VGGT, 1, 1, 518, 518)

    def of(*starts: str) -> float:
        return round(sum(value for name, value in found.items() if name.startswith(starts)) / 1e9, 3)

    assert of("encoder") == 1017.103
    assert of("encoder", "frame", "global") == 3048.011
    assert of("camera head") == 1.728
    assert of("depth head") == 298.522
    assert of("depth head refinenet1") == 114.840
    assert of("depth head output_conv1") == 51.678
    assert of("depth head output_conv2") == 19.817


# ODD at 2 scenes of 3 views of 5x4 patches of 7x7: the component, the parameter whose type computes it, and its FLOPs
# by the formulas of docs/costs.md with N = 6, P = 20, Q = 3 x 2 = 6, C = 24, D = 48, f = 40. T is 1 + 3 + 20 in the
# encoder and 1 + 1 + 20 after it; the MLPs are int(2.3 x 24) = 55 and int(3.1 x 24) = 74 wide.
ODD_TRUNK = [
    ("encoder patch conv", "aggregator.patch_embed.patch_embed.proj.weight", 2 * 6 * 20 * 3 * 49 * 24),
    ("encoder linear", "aggregator.patch_embed.blocks.0.attn.qkv.weight", 2 * 2 * 6 * 24 * (4 * 576 + 2 * 24 * 55)),
    ("encoder attention", "aggregator.patch_embed.blocks.0.attn.qkv.bias", 2 * 4 * 6 * 24 * 24 * 24),
    ("frame linear", "aggregator.frame_blocks.0.attn.qkv.weight", 3 * 2 * 6 * 22 * (4 * 576 + 2 * 24 * 74)),
    ("frame attention", "aggregator.frame_blocks.0.attn.qkv.bias", 3 * 4 * 6 * 22 * 22 * 24),
    ("global linear", "aggregator.global_blocks.0.attn.qkv.weight", 3 * 2 * 6 * 22 * (4 * 576 + 2 * 24 * 74)),
    ("global attention", "aggregator.global_blocks.0.attn.qkv.bias", 3 * 4 * 2 * (3 * 22) ** 2 * 24),
    # an iteration: 2 x 6 x (9 x 48 + 3 x 2304), 5 x (24 x 6 x 2304 + 4 x 2 x 9 x 48) and 2 x 6 x (48 x 24 + 24 x 9)
    ("camera head", "camera_head.trunk.0.attn.qkv.weight", 3 * (88_128 + 5 * (331_776 + 3_456) + 16_416)),
]
ODD_DENSE = [
    ("projects", "projects.0", 6 * 2 * 20 * 48 * (4 + 12 + 20 + 28)),
    ("resize_layers", "resize_layers.0", 6 * (2 * 20 * 16 * 16 + 2 * 20 * 4 * 144 + 2 * 6 * 9 * 784)),
    ("layer_rn", "scratch.layer1_rn", 6 * 2 * 9 * 40 * (320 * 4 + 80 * 12 + 20 * 20 + 6 * 28)),
    ("refinenet4", "scratch.refinenet4.out_conv", 6 * (4 * 6 * 9 * 1600 + 2 * 20 * 1600)),
    ("refinenet3", "scratch.refinenet3.out_conv", 6 * (8 * 20 * 9 * 1600 + 8 * 20 * 1600)),
    ("refinenet2", "scratch.refinenet2.out_conv", 6 * (8 * 80 * 9 * 1600 + 8 * 80 * 1600)),
    ("refinenet1", "scratch.refinenet1.out_conv", 6 * (8 * 320 * 9 * 1600 + 8 * 320 * 1600)),
    ("output_conv1", "scratch.output_conv1", 6 * 2 * 1280 * 9 * 40 * 20),
]
ODD_EXPERTS = [  # 3 of 20 -> 5 -> 2 channels and a gate of 20 -> 9 -> 3 on 5 x 4 x 49 = 980 pixels
    ("depth head experts", "depth_head.experts.0.0.weight", 3 * 2 * 6 * 980 * 9 * 20 * 5),
    ("depth head experts", "depth_head.experts.0.2.weight", 3 * 2 * 6 * 980 * 5 * 2),
    ("depth head gate", "depth_head.gate.0.weight", 2 * 6 * 980 * 9 * 20 * 9),
    ("depth head gate", "depth_head.gate.2.weight", 2 * 6 * 980 * 9 * 3),
]


def of_a_dense_head(head: str) -> list[tuple[str, str, int]]:
    label = head.replace("_", " ")
    return [(f"{label} {part}", f"{head}.{name}.weight", flops) for part, name, flops in ODD_DENSE]


def without_experts(head: str, channels: int) -> list[tuple[str, str, int]]:
    """20 -> 32 -> `channels`, on 980 pixels of 6 views."""
    component, name = f"{head.replace('_', ' ')} output_conv2", f"{head}.scratch.output_conv2"
    return [
        (component, f"{name}.0.weight", 2 * 6 * 980 * 9 * 20 * 32),
        (component, f"{name}.2.weight", 2 * 6 * 980 * 32 * channels),
    ]


@pytest.mark.parametrize("with_experts", [True, False])
@pytest.mark.parametrize("point_head", [True, False])
def test_layers_have_the_work_worked_out_by_hand(with_experts: bool, point_head: bool) -> None:
    config = ODD if with_experts else dataclasses.replace(ODD, moe=None)
    depth = of_a_dense_head("depth_head") + (ODD_EXPERTS if with_experts else without_experts("depth_head", 2))
    points = of_a_dense_head("point_head") + without_experts("point_head", 4) if point_head else []
    found = list(costs.work(config, (2, 3, 35, 28), point_head=point_head))
    assert found == ODD_TRUNK + depth + points
    shapes = parameter_shapes(config)
    assert {item.parameter for item in found} <= set(shapes)


def test_components_add_up_to_the_total() -> None:
    for config in (VGGT, MOE3D, ODD):
        size = config.patch_size * 4
        parts = costs.flops(config, 2, 3, size, size)
        assert sum(parts.values()) == costs.total_flops(config, 3, size, size, batch=2)
        assert all(isinstance(value, int) for value in parts.values())


@pytest.mark.parametrize(
    ("experts", "percent"),
    [(4, (2.37, 2.24, 2.03, 1.71, 1.29)), (8, (4.74, None, None, None, 2.59))],
)
def test_the_experts_share_is_the_defined_one(experts: int, percent: tuple[float | None, ...]) -> None:
    """Of VGGT with depth and camera heads at 1, 2, 4, 8 and 16 views of 518x518."""
    config = dataclasses.replace(MOE3D, moe=MoeConfig(num_experts=experts))
    for views, expected in zip((1, 2, 4, 8, 16), percent, strict=True):
        if expected is not None:
            assert round(100 * costs.expert_share(config, views, 518, 518), 2) == expected
    assert costs.expert_share(VGGT, 1, 518, 518) == 0


@pytest.mark.parametrize("name", ["moe3d-1b", "moe3d-tiny"])
def test_the_counter_over_a_preset_gives_the_same(name: str) -> None:
    config = PRESETS[name]
    shape = in_pixels(config, (2, 3, 5, 4))
    assert counted(meta_model(config), shape).get_total_flops() == seen_by_a_counter(config, shape)


@settings(max_examples=10, deadline=None)
@given(configs(), grids())
def test_the_counter_over_any_model_gives_the_same(config: ModelConfig, grid: tuple[int, int, int, int]) -> None:
    shape = in_pixels(config, grid)
    assert counted(meta_model(config), shape).get_total_flops() == seen_by_a_counter(config, shape)


def test_each_component_is_what_the_counter_gives_for_its_modules() -> None:
    shape = in_pixels(ODD, (2, 3, 5, 4))
    modules = counted(meta_model(ODD), shape).flop_counts
    counts = {name.removeprefix("MoE3D."): Counter(ops) for name, ops in modules.items()}
    found = costs.flops(ODD, *shape)

    def of(*names: str) -> int:
        return sum(sum(counts[name].values()) for name in names)

    def blocks(prefix: str, depth: int) -> tuple[int, int]:
        linear = sum(of(f"{prefix}.{i}.attn.qkv", f"{prefix}.{i}.attn.proj", f"{prefix}.{i}.mlp") for i in range(depth))
        return linear, of(*(f"{prefix}.{i}" for i in range(depth))) - linear

    assert found["encoder patch conv"] == of("aggregator.patch_embed.patch_embed")
    for name, prefix, depth in (
        ("encoder", "aggregator.patch_embed.blocks", 2),
        ("frame", "aggregator.frame_blocks", 3),
        ("global", "aggregator.global_blocks", 3),
    ):
        assert (found[f"{name} linear"], found[f"{name} attention"]) == blocks(prefix, depth)
    assert found["camera head"] == of("camera_head")
    for head, label in (("depth_head", "depth head"), ("point_head", "point head")):
        assert found[f"{label} projects"] == of(*(f"{head}.projects.{i}" for i in range(4)))
        assert found[f"{label} resize_layers"] == of(*(f"{head}.resize_layers.{i}" for i in (0, 1, 3)))
        assert found[f"{label} layer_rn"] == of(*(f"{head}.scratch.layer{i}_rn" for i in (1, 2, 3, 4)))
        for part in ("refinenet1", "refinenet2", "refinenet3", "refinenet4", "output_conv1"):
            assert found[f"{label} {part}"] == of(f"{head}.scratch.{part}"), part
    assert found["depth head experts"] == of(*(f"depth_head.experts.{k}" for k in range(3)))
    assert found["depth head gate"] == of("depth_head.gate")
    assert found["point head output_conv2"] == of("point_head.scratch.output_conv2")


@pytest.mark.parametrize("experts", [1, 8])
def test_merged_experts_do_as_much_work_as_plain_ones(experts: int) -> None:
    config = dataclasses.replace(ODD, moe=MoeConfig(experts, 5, 9), point_head=False)
    model, shape = meta_model(config), in_pixels(config, (1, 2, 3, 2))
    plain = counted(model, shape).get_total_flops()
    model.depth_head.merge_experts()
    assert counted(model, shape).get_total_flops() == plain == seen_by_a_counter(config, shape)


def test_the_point_head_is_counted_as_the_config_says_unless_told_otherwise() -> None:
    without = dataclasses.replace(VGGT, point_head=False)
    assert costs.total_flops(without, 1, 518, 518) == costs.total_flops(VGGT, 1, 518, 518, point_head=False)
    assert costs.total_flops(without, 1, 518, 518, point_head=True) == TOTALS[1, 518, 518]


@settings(max_examples=30, deadline=None)
@given(configs(), grids(), st.integers(2, 5))
def test_work_is_linear_in_scenes(config: ModelConfig, grid: tuple[int, int, int, int], times: int) -> None:
    batch, *rest = in_pixels(config, grid)
    once, more = costs.flops(config, batch, *rest), costs.flops(config, times * batch, *rest)
    assert more == {name: times * value for name, value in once.items()}


@settings(max_examples=30, deadline=None)
@given(configs(), grids())
def test_only_global_attention_and_the_camera_head_grow_faster_than_views(
    config: ModelConfig, grid: tuple[int, int, int, int]
) -> None:
    """Differences over S, 2S, 3S: none of second order but in those two; global attention is purely quadratic."""
    batch, views, height, width = in_pixels(config, grid)
    one, two, three = (costs.flops(config, batch, n * views, height, width) for n in (1, 2, 3))
    bent = {name for name in one if three[name] - two[name] != two[name] - one[name]}
    assert bent == {"global attention", "camera head"}
    assert two["global attention"] == 4 * one["global attention"]
    # 4 S^2 D for each block of each iteration, hence 8 S^2 D of second difference
    head = config.camera_head
    assert three["camera head"] - 2 * two["camera head"] + one["camera head"] == (
        8 * batch * views**2 * head.dim_in * head.trunk_depth * head.num_iterations
    )


@settings(max_examples=30, deadline=None)
@given(configs(), grids(), st.integers(0, 3))
def test_a_larger_run_costs_more_of_everything(config: ModelConfig, grid: tuple[int, int, int, int], axis: int) -> None:
    larger = tuple(size + (i == axis) for i, size in enumerate(grid))
    small, large = in_pixels(config, grid), in_pixels(config, larger)  # type: ignore[arg-type]
    before, after = costs.flops(config, *small), costs.flops(config, *large)
    assert all(after[name] > before[name] for name in before if axis < 2 or name != "camera head")
    assert costs.traffic_bytes(config, large) > costs.traffic_bytes(config, small)


def test_work_is_split_by_the_type_that_does_it() -> None:
    """fp16 leaves the camera head and the last 1x1 convolutions in float32: per pixel 4 x 32 x 2 and 32 x 4."""
    policy = PrecisionPolicy("fp16")
    split = costs.flops_by_type(MOE3D, (1, 2, 518, 518), policy.type_of, point_head=False)
    camera = costs.flops(MOE3D, 1, 2, 518, 518)["camera head"]
    assert split["float32"] == camera + 2 * 2 * 518 * 518 * (4 * 32 * 2 + 32 * 4)
    assert sum(split.values()) == costs.total_flops(MOE3D, 2, 518, 518, point_head=False)
    assert list(costs.flops_by_type(MOE3D, (1, 1, 14, 14), costs.all_float32)) == ["float32"]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 8, 390, 518), "height 390 is not a multiple of the patch size 14; nearest: 378 and 392"),
        ((1, 8, 392, 13), "width 13 is not a multiple of the patch size 14; nearest: 14"),
        ((0, 8, 392, 518), "expected 4 sizes of at least 1"),
        ((1, -1, 392, 518), "expected 4 sizes of at least 1"),
        ((1, 8, 392), "expected 4 sizes of at least 1"),
    ],
)
def test_a_shape_that_the_model_cannot_take_is_refused(shape: Shape4, message: str) -> None:
    with pytest.raises(InputError) as caught:
        costs.check_shape(VGGT, shape)
    assert f"shape {'x'.join(map(str, shape))}: {message}" in str(caught.value)


def test_every_figure_refuses_such_a_shape() -> None:
    for figure in (
        lambda: costs.total_flops(VGGT, 8, 390, 518),
        lambda: costs.flops(VGGT, 1, 8, 392, 500),
        lambda: costs.expert_share(MOE3D, 0, 392, 518),
        lambda: costs.position_embedding_flops(VGGT, 392, 0),
        lambda: costs.traffic_bytes(VGGT, (1, 8, 390, 518)),
        lambda: costs.flops_by_type(VGGT, (1, 8, 390, 518), costs.all_float32),
    ):
        with pytest.raises(InputError):
            figure()


def test_the_position_embedding_costs_two_matrix_products_whatever_the_views() -> None:
    """(gh, M) @ (M, M C), then (gw, M) @ (gh, M, C) for an M x M grid of C channels."""
    assert costs.position_embedding_flops(VGGT, 392, 518) == 2 * 28 * 37 * (37 * 1024) + 2 * 28 * 37 * (37 * 1024)
    assert costs.position_embedding_flops(VGGT, 14, 28) == 2 * 1 * 37 * (37 * 1024) + 2 * 1 * 2 * (37 * 1024)
    # 5 x 5 stored, 24 channels, 3x4 patches: 3 x 5 x 5 x 24 and 4 x 5 x 3 x 24 multiply-adds
    assert costs.position_embedding_flops(ODD, 21, 28) == 2 * (1800 + 1440)


def test_the_python_of_the_page_on_costs_runs() -> None:
    page = (Path(__file__).resolve().parent.parent / "docs" / "costs.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    scope: dict[str, Any] = {}
    exec(compile(block, "docs/costs.md", "exec"), scope)
    assert sum(scope["by_component"].values()) == scope["total"]
    assert round(100 * scope["share"], 2) == 1.89

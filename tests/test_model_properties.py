"""What must hold for the model whatever its weights: scenes, views, chunks, precision, what it gives and keeps."""

import copy
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models import DATA, ROUNDING, random_images, relative_error, small_model
from torch import Tensor

from moe3d_deploy.checkpoint import model_shapes
from moe3d_deploy.config import PRESETS, MoeConfig
from moe3d_deploy.model import MoE3D
from moe3d_deploy.model.moe3d import OF_EXPERTS, ON_REQUEST
from moe3d_deploy.model.transformer import explicit_attention, set_attention

EVERY_MAP = ("world_points", "point_map", "point_map_conf", *OF_EXPERTS)


@pytest.fixture(scope="module")
def model() -> MoE3D:
    """Four experts and a point head, so that it has every output; not to be changed."""
    return small_model(MoeConfig())


@pytest.fixture(scope="module")
def four_views() -> Tensor:
    return random_images(1, 4, 3, 42, 56)


@torch.inference_mode()
def run(model: MoE3D, images: Tensor, outputs: Sequence[str] = EVERY_MAP, **options: Any) -> dict[str, Tensor]:
    return model(images, outputs=outputs, **options)


def check_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], limit: float = ROUNDING) -> None:
    assert actual.keys() == expected.keys()
    errors = {name: relative_error(actual[name], expected[name]) for name in expected}
    assert max(errors.values()) < limit, errors


# Scenes and views


def test_scenes_of_a_batch_do_not_mix(model: MoE3D) -> None:
    scenes = random_images(3, 2, 3, 56, 42)

    apart = [run(model, scene[None]) for scene in scenes]

    check_equal(run(model, scenes), {name: torch.cat([out[name] for out in apart]) for name in apart[0]})


@pytest.mark.parametrize("view_chunk", [1, 3, 4, 100])
def test_dense_heads_in_chunks_of_views_equal_the_whole(model: MoE3D, four_views: Tensor, view_chunk: int) -> None:
    two_scenes = torch.cat([four_views, four_views.flip(1)])  # chunks of 3 cross from one to the other

    check_equal(run(model, two_scenes, view_chunk=view_chunk), run(model, two_scenes))


def test_only_the_first_view_is_special(model: MoE3D, four_views: Tensor) -> None:
    """Other views may come in any order and their outputs follow; the first view's place is not to be exchanged."""
    expected = run(model, four_views)
    later, first = [0, 3, 1, 2], [1, 0, 2, 3]

    check_equal(run(model, four_views[:, later]), {name: value[:, later] for name, value in expected.items()})

    exchanged = run(model, four_views[:, first])
    assert relative_error(exchanged["depth"], expected["depth"][:, first]) > 1e-3


def test_every_view_sees_every_other(model: MoE3D, four_views: Tensor) -> None:
    changed = four_views.clone()
    changed[:, 3] = 1 - changed[:, 3]

    before, after = run(model, four_views), run(model, changed)

    for view in range(4):
        assert relative_error(after["depth"][:, view], before["depth"][:, view]) > 1e-4


def test_views_without_a_batch_axis_are_one_scene(model: MoE3D, four_views: Tensor) -> None:
    expected, actual = run(model, four_views), run(model, four_views[0])

    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert torch.equal(
        model.features(four_views[0])["patch_tokens"],
        model.features(four_views)["patch_tokens"],
    )


# Precision and forms


def test_nine_views_not_square_in_float32_equal_float64(model: MoE3D) -> None:
    """Rotary, UV and position embeddings follow the dtype of the weights, so this checks those too."""
    images = random_images(1, 9, 3, 42, 98)

    exact = run(copy.deepcopy(model).double(), images.double())

    assert {value.dtype for value in exact.values()} == {torch.float64}
    check_equal(run(model, images), exact)


def test_fused_attention_equals_the_explicit_form(model: MoE3D, four_views: Tensor) -> None:
    explicit = copy.deepcopy(model)
    set_attention(explicit, explicit_attention)

    check_equal(run(explicit, four_views), run(model, four_views))


def test_outputs_have_the_documented_shapes_and_are_float32(model: MoE3D) -> None:
    outputs = run(model, random_images(2, 3, 3, 28, 42))

    map_shape = (2, 3, 28, 42)
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "depth": map_shape,
        "depth_conf": map_shape,
        "pose_enc": (2, 3, 9),
        "extrinsics": (2, 3, 3, 4),
        "intrinsics": (2, 3, 3, 3),
        "world_points": (*map_shape, 3),
        "point_map": (*map_shape, 3),
        "point_map_conf": map_shape,
        "expert_weights": (2, 3, 4, 28, 42),
        "expert_depths": (2, 3, 4, 28, 42),
        "expert_entropy": map_shape,
        "depth_variance": map_shape,
    }
    assert {value.dtype for value in outputs.values()} == {torch.float32}


@pytest.mark.parametrize("asked", [*((name,) for name in ON_REQUEST), ()], ids=str)
def test_what_is_asked_for_is_what_comes(model: MoE3D, asked: tuple[str, ...]) -> None:
    outputs = run(model, random_images(1, 1, 3, 14, 14), asked)

    assert set(outputs) == {"depth", "depth_conf", "pose_enc", "extrinsics", "intrinsics", *asked}


def test_features_that_no_head_reads_are_not_kept(model: MoE3D, four_views: Tensor) -> None:
    """Of six pairs of blocks the heads read four: 1, 2, 4 and 5; the camera head reads the last."""
    kept: list[dict[int, Tensor]] = []
    hook = model.aggregator.register_forward_hook(lambda module, args, out: kept.append(dict(out)))
    with hook, torch.inference_mode():
        model(four_views)
        features = model.features(four_views)
        some = model.aggregator(features["patch_tokens"], 3, 4, keep=[3])

    assert sorted(kept[0]) == [1, 2, 4, 5]
    assert sorted(some) == [3]
    assert torch.equal(some[3], features["aggregated"][3])


# Weights


def test_vggt_1b_has_exactly_the_tensors_of_the_released_checkpoint() -> None:
    released = json.loads((DATA / "vggt_1b_state_dict.json").read_text())["model"]

    shapes = model_shapes(PRESETS["vggt-1b"])

    assert len(shapes) == 1403
    assert shapes == {name: tuple(shape) for name, shape in released.items()}


def test_presets_have_the_documented_number_of_parameters() -> None:
    counts = {name: sum(map(math.prod, model_shapes(config).values())) for name, config in PRESETS.items()}

    assert counts["vggt-1b"] == 1_190_596_120
    # Three further experts and a gate of four, each 3x3 128 -> 32 and 1x1 32 -> 2 or 4, with biases.
    first, last = 128 * 32 * 9 + 32, 32 + 1
    assert counts["moe3d-1b"] - counts["vggt-1b"] == 3 * (first + 2 * last) + first + 4 * last == 147_914
    assert counts["moe3d-1b"] / counts["vggt-1b"] - 1 == pytest.approx(1.2e-4, abs=5e-6)  # "+0.012 %"
    assert 1e6 < counts["moe3d-tiny"] < 6e6

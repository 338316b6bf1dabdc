"""The aids of a training from scratch: true points and matches by hand, the attention they look at, their losses."""

import dataclasses
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from trainings import TINY, assert_same, run, short, state_of, tiny_checkpoint, weights_of

from moe3d_deploy.checkpoint import open_checkpoint
from moe3d_deploy.errors import InputError
from moe3d_deploy.model.dpt import Grid
from moe3d_deploy.model.transformer import explicit_attention
from moe3d_deploy.training import aids
from moe3d_deploy.training.initialise import new_model
from moe3d_deploy.training.logs import read_log
from moe3d_deploy.training.targets import Targets, normalised_targets

PATCH, FOCAL = 4, 20.0
HEIGHT, WIDTH = 8, 12  # 2 x 3 patches


def wall(depths: Tensor, shift: float) -> Targets:
    """Two views of `depths` (2, H, W); the second camera stands `shift` to the right, in units of the scene's scale."""
    extrinsics = torch.eye(3, 4).repeat(1, 2, 1, 1)
    extrinsics[0, 1, 0, 3] = -shift
    intrinsics = torch.tensor([[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]]).repeat(1, 2, 1, 1)
    return normalised_targets(depths[None], extrinsics, intrinsics)


def sideways() -> Targets:
    """A wall at depth 1 seen by a camera that stands one patch farther to the right."""
    return wall(torch.ones(2, HEIGHT, WIDTH), PATCH / FOCAL)


def matches_of(targets: Targets) -> Tensor:
    return aids.patch_matches(aids.scene_points(targets), targets, PATCH)


def test_points_are_in_the_first_cameras_frame() -> None:
    targets = sideways()
    points = aids.scene_points(targets) * targets.scale
    v, u = torch.meshgrid(torch.arange(HEIGHT), torch.arange(WIDTH), indexing="ij")
    first = torch.stack([(u - WIDTH / 2) / FOCAL, (v - HEIGHT / 2) / FOCAL, torch.ones(HEIGHT, WIDTH)], dim=-1)
    torch.testing.assert_close(points[0, 0], first)
    torch.testing.assert_close(points[0, 1], first + torch.tensor([PATCH / FOCAL, 0, 0]))


def test_a_point_one_patch_to_the_right_matches_the_patch_to_the_left() -> None:
    found = matches_of(sideways())
    assert found[0, 0, 1].tolist() == [-1, 0, 1, -1, 3, 4]
    assert found[0, 1, 0].tolist() == [1, 2, -1, 4, 5, -1]
    assert (found[0, [0, 1], [0, 1]] == -1).all(), "no view matches itself"


def test_what_is_hidden_or_not_known_has_no_match() -> None:
    depths = torch.ones(2, HEIGHT, WIDTH)
    depths[1, :PATCH, :PATCH] = 0.5  # something stands before patch 0 of the second view
    depths[0, PATCH:, 2 * PATCH :] = 0  # patch 5 of the first view is not known
    found = matches_of(wall(depths, PATCH / FOCAL))
    assert found[0, 0, 1].tolist() == [-1, -1, 1, -1, 3, -1]


def test_the_point_loss_is_the_mean_error_over_depth() -> None:
    """Off by 0.3 in one of three coordinates, at depth 1 in scaled units or below."""
    targets = sideways()
    points = aids.scene_points(targets)
    off = points + torch.tensor([0.3, 0, 0])
    expected = (0.1 / targets.depth).mean()
    found = aids.point_loss(off.movedim(-1, 2), points, targets)
    torch.testing.assert_close(found, expected[None])


def test_invalid_pixels_do_not_count_for_points() -> None:
    depths = torch.ones(2, HEIGHT, WIDTH)
    depths[:, 0] = 0
    targets = wall(depths, 0.1)
    points = aids.scene_points(targets)
    wrong = points.clone()
    wrong[:, :, 0] = 1e6
    assert aids.point_loss(wrong.movedim(-1, 2), points, targets).item() == 0


def test_even_attention_misses_by_the_logarithm_of_all_patches() -> None:
    matches = torch.tensor([[[[-1, -1], [1, -1]], [[-1, 0], [-1, -1]]]])  # (1, 2, 2, 2)
    missed, found = aids.match_loss([torch.zeros(1, 2, 2, 2, 2)], matches)
    assert missed.item() == pytest.approx(math.log(4))
    assert found.item() == pytest.approx(1 / 4)


def test_attention_to_itself_is_missing_at_the_match() -> None:
    """Logits log 3 at the match, log 5 at the patch itself, 0 at the other two: 3 / 10."""
    logits = torch.zeros(1, 2, 2, 2, 2)
    logits[0, 0, 1, 0, 1], logits[0, 0, 0, 0, 0] = math.log(3), math.log(5)
    matches = torch.full((1, 2, 2, 2), -1)
    matches[0, 0, 1, 0] = 1
    missed, found = aids.match_loss([torch.zeros_like(logits), logits], matches)
    assert found.item() == pytest.approx(0.3)
    assert missed.item() == pytest.approx((math.log(4) - math.log(0.3)) / 2)


def test_a_scene_without_matches_adds_nothing() -> None:
    logits = torch.randn(2, 2, 2, 2, 2, requires_grad=True)
    matches = torch.full((2, 2, 2, 2), -1)
    matches[1, 0, 1, 0] = 1
    missed, found = aids.match_loss([logits], matches)
    assert (missed[0].item(), found[0].item()) == (0, 0)
    missed.sum().backward()
    assert logits.grad is not None
    assert not logits.grad[0].any()
    assert logits.grad[1].isfinite().all()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny")


DEEP = dataclasses.replace(
    TINY,
    aggregator=dataclasses.replace(TINY.aggregator, depth=6),
    dpt_head=dataclasses.replace(TINY.dpt_head, intermediate_layer_idx=(0, 2, 3, 5)),
)


def test_matches_are_found_by_the_blocks_in_between() -> None:
    assert aids.matching_blocks(DEEP) == [(1, 2), (2, 3)]


@pytest.mark.parametrize("which", [0, 1])
def test_the_logits_are_those_of_the_models_own_attention(which: int) -> None:
    model = new_model(DEEP, 0)
    patch, views = model.config.patch_size, 3
    images = torch.rand(2, views, 3, 2 * patch, 3 * patch)
    place, block = aids.matching_blocks(model.config)[which]
    seen: list[Tensor] = []

    def spy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append(q[:, :, 0] @ k[:, :, 0].transpose(1, 2) / math.sqrt(q.shape[-1]))
        return explicit_attention(q, k, v)

    model.aggregator.global_blocks[block].attn.attend = spy  # type: ignore[union-attr,assignment]
    levels = model.backbone(images).levels
    frame = aids.frame_tokens(levels[place], model.config)
    found = aids.attention_logits(model, frame, block, Grid(2, 3), views)

    start = model.aggregator.patch_start
    of_views = seen[0].unflatten(1, (views, -1)).unflatten(3, (views, -1))[:, :, start:, :, start:]
    torch.testing.assert_close(found, of_views.transpose(2, 3), rtol=1e-4, atol=1e-5)
    others = [level for other, level in enumerate(levels) if other != place]
    for level in others:
        wrong = aids.attention_logits(model, aids.frame_tokens(level, model.config), block, Grid(2, 3), views)
        assert not torch.allclose(wrong, of_views.transpose(2, 3), rtol=1e-2, atol=1e-3)


def test_the_aids_alone_teach_points_and_matches(checkpoint: Path, tmp_path: Path) -> None:
    """The same two scenes again and again, with no other loss that reaches the backbone than theirs."""
    options = short(
        checkpoint, train="backbone", views=(2, 2), scenes=2, camera_weight=0.0, point_weight=1.0, match_weight=1.0,
        steps=60, jitter=False, mirror=False, camera_effects=False, shapes=((42, 42),),
    )  # fmt: skip
    run(options, tmp_path / "run")
    lines = read_log(tmp_path / "run" / "train.jsonl", "step")

    def mean(name: str, part: slice) -> float:
        return sum(line[name] for line in lines[part]) / len(lines[part])

    for name in ("point", "match"):
        first, last = mean(name, slice(0, 10)), mean(name, slice(-10, None))
        assert last < 0.9 * first, (name, first, last)


def test_a_run_with_aids_resumes_to_the_bit_and_keeps_them_to_itself(checkpoint: Path, tmp_path: Path) -> None:
    options = short(checkpoint, train="all", views=(2, 2), point_weight=0.5, match_weight=0.5, save_every=3, steps=6)
    run(options, tmp_path / "whole")
    lines = read_log(tmp_path / "whole" / "train.jsonl", "step")
    assert all({"point", "match", "matched"} <= line.keys() for line in lines)

    halfway = "state/step-00000003"
    shutil.copytree(tmp_path / "whole" / halfway, tmp_path / "run" / halfway)
    shutil.copy(tmp_path / "whole" / "options.json", tmp_path / "run")
    run(options, tmp_path / "run")

    assert_same(state_of(tmp_path / "run").tensors, state_of(tmp_path / "whole").tensors)
    assert any("aids.readout.linear" in name for name in state_of(tmp_path / "run").tensors)
    assert not any("readout" in name for name in weights_of(tmp_path / "run"))


def test_a_backbone_run_leaves_the_depth_head_as_it_was(checkpoint: Path, tmp_path: Path) -> None:
    options = short(
        checkpoint, train="backbone", from_scratch=False, views=(2, 2), point_weight=0.5, match_weight=0.5,
        validate_every=6, validation_scenes=1, amp="bf16",
    )  # fmt: skip
    run(options, tmp_path / "run")

    before, after = open_checkpoint(checkpoint), weights_of(tmp_path / "run")
    changed = {name for name in before.shapes() if not torch.equal(before.tensor(name), after[name])}
    assert {name.split(".")[0] for name in changed} == {"aggregator", "camera_head"}
    (line,) = read_log(tmp_path / "run" / "train.jsonl", "validation")
    assert line.keys() == {"kind", "step", "auc30"}
    step = read_log(tmp_path / "run" / "train.jsonl", "step")[-1]
    assert {"camera", "camera_translation", "point", "match"} <= step.keys()
    assert "depth" not in step


def test_a_backbone_learns_nothing_of_depth_without_points(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="train backbone has no depth head to learn depth from; give it a point"):
        short(checkpoint, train="backbone", from_scratch=False)


def test_aids_are_refused_where_the_backbone_does_not_change(checkpoint: Path) -> None:
    with pytest.raises(InputError, match="point_weight and match_weight teach the backbone"):
        short(checkpoint, train="head", from_scratch=False, match_weight=0.1)

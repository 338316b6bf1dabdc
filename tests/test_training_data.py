"""The samples of a training: functions of their number, in steps of one shape, mirrored without moving the camera."""

import dataclasses
import os
import tempfile

import pytest
import torch
from torch import Tensor
from trainings import SHORT

from moe3d_deploy.errors import InputError, Moe3dError
from moe3d_deploy.model.camera import unproject
from moe3d_deploy.training import data
from moe3d_deploy.training.data import Jitter, Plan, batches, make_sample, plan_sample, scene_store, step_numbers
from moe3d_deploy.training.options import TrainOptions
from moe3d_deploy.training.scene_cache import SceneStore, StoredScene

OPTIONS = TrainOptions("x", train="all", batch=4, shapes=((28, 42), (42, 28)), views=(1, 4), scenes=10, steps=5)
WIDE = dataclasses.replace(SHORT, shapes=((28, 42),))


def test_a_sample_does_not_depend_on_what_was_asked_before() -> None:
    forwards = [plan_sample(OPTIONS, n) for n in range(30)]
    data._order.cache_clear()
    assert [plan_sample(OPTIONS, n) for n in reversed(range(30))] == forwards[::-1]
    assert [plan_sample(dataclasses.replace(OPTIONS, seed=1), n) for n in range(30)] != forwards
    assert [plan.number for plan in forwards] == [plan.original for plan in forwards] == list(range(30))


def test_a_pass_sees_every_scene_once_and_the_next_in_another_order() -> None:
    seeds = [plan_sample(OPTIONS, n).seed for n in range(20)]
    assert sorted(seeds[:10]) == sorted(seeds[10:]) == list(range(10))
    assert seeds[:10] != seeds[10:]


def test_a_step_has_one_shape_and_one_number_of_views_and_steps_differ() -> None:
    steps = [[plan_sample(OPTIONS, n) for n in step_numbers(OPTIONS, step)] for step in range(200)]
    kinds = [{(plan.height, plan.width, len(plan.views)) for plan in plans} for plans in steps]
    assert {len(kind) for kind in kinds} == {1}
    flat = [kind.pop() for kind in kinds]
    assert {shape[:2] for shape in flat} == {(28, 42), (42, 28)}
    counts = [shape[2] for shape in flat]
    assert set(counts) == {1, 2, 3, 4}
    assert 2.7 < sum(counts) / len(counts) < 3.3, "as likely as it is many: mean (1 + 4 + 9 + 16) / 10 = 3"


def test_views_are_drawn_without_repetition_in_any_order() -> None:
    views = [plan_sample(OPTIONS, n).views for n in range(200)]
    assert all(len(set(chosen)) == len(chosen) for chosen in views)
    assert {view for chosen in views for view in chosen} == set(range(8))
    assert any(chosen != tuple(sorted(chosen)) for chosen in views)


def test_half_of_the_samples_are_mirrored_unless_that_is_off() -> None:
    mirrored = [plan_sample(OPTIONS, n).mirrored for n in range(400)]
    assert 150 < sum(mirrored) < 250
    off = dataclasses.replace(OPTIONS, mirror=False, jitter=False)
    assert not any(plan_sample(off, n).mirrored for n in range(50))
    assert plan_sample(off, 0).jitter is None


def test_colours_vary_within_their_ranges() -> None:
    """A gamma of 4/5 to 5/4, 20 % of exposure and contrast, half to 1.3 of the saturation: all of it is used."""
    drawn = [plan_sample(OPTIONS, n).jitter for n in range(400)]
    assert None not in drawn
    for name, low, high in (("gamma", 0.8, 1.25), ("gain", 0.8, 1.2), ("contrast", 0.8, 1.2), ("saturation", 0.5, 1.3)):
        values = [getattr(jitter, name) for jitter in drawn]
        assert low <= min(values) < low + 0.02 * (high - low)
        assert high - 0.02 * (high - low) < max(values) <= high


def test_processes_share_a_step_without_overlap() -> None:
    assert list(step_numbers(OPTIONS, 3)) == [12, 13, 14, 15]
    assert [list(step_numbers(OPTIONS, 3, rank, 2)) for rank in (0, 1)] == [[12, 13], [14, 15]]


def test_samples_that_repeat_come_as_whole_steps_in_another_order() -> None:
    """Ten scenes in steps of four make three steps, which every pass shows again."""
    options = dataclasses.replace(OPTIONS, train="head")
    plans = [plan_sample(options, n) for n in range(36)]
    steps = [[plan.original for plan in plans[i : i + 4]] for i in range(0, 36, 4)]
    first = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert steps[:3] == first
    assert sorted(steps[3:6]) == sorted(steps[6:]) == first
    assert len({str(steps[i : i + 3]) for i in (0, 3, 6)}) > 1
    for plan in plans:
        assert dataclasses.replace(plan, number=plan.original) == plans[plan.original]


# ---- what a sample is made of


def scene(width: int = 44) -> StoredScene:
    """A scene rendered for samples 42 wide."""
    stored, _ = scene_store(WIDE, 28, 42).get(3)
    assert stored.depth.shape == (2, 28, width)
    return stored


def sample(mirrored: bool, views: tuple[int, ...] = (1, 0), jitter: Jitter | None = None) -> StoredScene:
    return make_sample(Plan(0, 0, 3, 28, 42, views, mirrored, jitter), scene())


def points(made: StoredScene) -> Tensor:
    return unproject(made.depth[None], made.extrinsics[None], made.intrinsics[None])[0]


def test_the_principal_point_stays_where_the_pose_encoding_has_it() -> None:
    for mirrored in (False, True):
        intrinsics = sample(mirrored).intrinsics
        assert intrinsics[:, :2, 2].tolist() == [[21.0, 14.0]] * 2
        assert intrinsics[:, 0, 0].equal(scene().intrinsics[[1, 0], 0, 0]), "the focal length is the scene's"


def test_a_mirrored_sample_shows_the_mirrored_world() -> None:
    """Column u of the one is column W + 1 - u of the wide scene, column u' of the other is u' + 1 of it.

    So u = W - u', for u' = 1..W-1: there the same points are seen, with x and -x.
    """
    plain, mirrored = sample(False), sample(True)
    assert mirrored.images[..., 1:].equal(plain.images[..., 1:].flip(-1))
    assert mirrored.depth[..., 1:].equal(plain.depth[..., 1:].flip(-1))
    expected = points(plain)[:, :, 1:].flip(2) * torch.tensor([-1.0, 1.0, 1.0])
    scale = float(expected.abs().max())
    assert float((points(mirrored)[:, :, 1:] - expected).abs().max()) < 1e-5 * scale
    assert torch.linalg.det(mirrored.extrinsics[:, :, :3]).allclose(torch.ones(2)), "still a rotation"


def test_views_keep_their_own_cameras() -> None:
    whole = scene()
    made = sample(False, views=(1,))
    assert made.extrinsics.equal(whole.extrinsics[1:])
    assert made.depth.equal(whole.depth[1:, :, 1:43])
    assert made.images.equal(whole.images[1:, ..., 1:43].float() / 255)


def test_jitter_is_the_formula_and_stays_in_range() -> None:
    jitter = Jitter(gamma=1.1, gain=1.2, contrast=0.9, saturation=0.5)
    plain, made = sample(False), sample(False, jitter=jitter)
    value = (((plain.images.double() ** 1.1) * 1.2 - 0.5) * 0.9 + 0.5).clamp(0, 1)
    grey = (value * torch.tensor([0.299, 0.587, 0.114]).double()[:, None, None]).sum(1, keepdim=True)
    expected = ((value - grey) * 0.5 + grey).clamp(0, 1)
    assert float((made.images - expected).abs().max()) < 1e-6
    assert made.depth.equal(plain.depth)


def test_batches_are_the_samples_of_their_steps_from_any_step_on() -> None:
    options = dataclasses.replace(WIDE, steps=3, batch=2, accumulate=2)
    made = list(batches(options, 1))
    assert [[plan.number for plan in batch.plans] for batch in made] == [[2], [3], [4], [5]]
    batch = made[1]
    plan = plan_sample(options, 3)
    stored, _ = scene_store(options, 28, 42).get(plan.seed)
    for got, expected in zip(batch[:4], make_sample(plan, stored), strict=True):
        assert got[0].equal(expected)
    assert batch.images.shape == (1, len(plan.views), 3, 28, 42)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_goes_wrong_with_a_scene_arrives_as_it_was_raised(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: SceneStore, seed: int) -> None:
        raise PermissionError(13, "Permission denied", "scenes/x")

    monkeypatch.setattr(SceneStore, "get", full)
    with pytest.raises(PermissionError) as caught:
        next(batches(dataclasses.replace(WIDE, workers=workers), 0))
    assert (caught.value.errno, caught.value.filename) == (13, "scenes/x")


def test_a_temporary_folder_with_too_long_a_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the processes cannot hand their samples over, and the training waits for ever."""
    monkeypatch.setattr(tempfile, "tempdir", "/" + 80 * "x")
    with pytest.raises(InputError, match=r"xx has too long a name for the sockets .*, or use --workers 0$"):
        batches(dataclasses.replace(WIDE, workers=1), 0)
    batches(WIDE, 0)


def test_a_worker_that_dies_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def die(self: SceneStore, seed: int) -> None:
        os._exit(9)

    monkeypatch.setattr(SceneStore, "get", die)
    with pytest.raises(Moe3dError, match=r"^a process that makes samples has died \(.*\); use fewer --workers$"):
        next(batches(dataclasses.replace(WIDE, workers=1), 0))

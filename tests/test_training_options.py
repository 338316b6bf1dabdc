"""The options of a training: JSON and back, what is refused, and what may change when a run goes on."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from moe3d_deploy.errors import CheckpointError, InputError
from moe3d_deploy.training import options
from moe3d_deploy.training.losses import DEPTH_LOSSES
from moe3d_deploy.training.options import TrainOptions

FULL = TrainOptions(
    source="my-moe3d", train="all", from_scratch=True, warmup=7, amp="bf16", temperature=(2.0, 0.5),
    shapes=((126, 168), (168, 126)), views=(2, 3), scenes=50, scene_cache="scenes", minutes=2.5, mirror=False,
)  # fmt: skip


@pytest.mark.parametrize("given", [TrainOptions("moe3d-tiny"), FULL])
def test_json_and_back_gives_equal_options(given: TrainOptions, tmp_path: Path) -> None:
    path = tmp_path / "options.json"
    path.write_text(given.to_json())
    assert TrainOptions.read(path) == given


def test_an_integer_is_as_good_as_the_float_it_is() -> None:
    assert TrainOptions.from_dict({"source": "x", "clip": 2}) == TrainOptions("x", clip=2.0)


@pytest.mark.parametrize(("values", "text"), [
    ({"source": "x", "sorce": 1}, "unknown key 'sorce'; known are source, train,"),
    ({}, "'source' is missing; name a preset or a checkpoint"),
    ({"source": 3}, "source: expected str, got 3"),
    ({"source": "x", "steps": 2.5}, "steps: expected int, got 2.5"),
    ({"source": "x", "steps": True}, "steps: expected int, got True"),
    ({"source": "x", "mirror": 1}, "mirror: expected bool, got 1"),
    ({"source": "x", "views": [1]}, "views: expected a list, got a list"),
    ({"source": "x", "shapes": [[1, 2], 3]}, "shapes: expected a list, got 3"),
    ([], "expected an object, got a list"),
])  # fmt: skip
def test_json_of_something_else_is_refused(values: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        TrainOptions.from_dict(values)
    assert str(caught.value).startswith(f"training options: {text}")
    path = tmp_path / "options.json"
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"options.json: training options: .*it is not this version's"):
        TrainOptions.read(path)


@pytest.mark.parametrize(("changes", "text"), [
    ({"train": "tail"}, "train must be one of head, backbone, all, got 'tail'"),
    ({"amp": "bf16-heads"}, "amp bf16-heads: --train head leaves the depth head's body alone; use bf16"),
    ({"amp": "fp16"}, "amp must be one of off, bf16, bf16-heads, got 'fp16'"),
    ({"workers": -1}, "workers must not be negative, got -1"),
    ({"steps": 0}, "steps must be positive, got 0"),
    ({"seed": -1}, "seed must not be negative, got -1"),
    ({"batch": 5, "accumulate": 2}, "batch 5 cannot be split into 2 equal micro-batches"),
    ({"ema": 1.0}, "ema must be in [0, 1), got 1.0"),
    ({"warmup": 1000}, "warmup must be in 0..999, got 1000"),
    ({"clip": float("nan")}, "clip must be a finite number, got nan"),
    ({"temperature": (1.0, 0.0)}, "temperature must be positive, got 1:0"),
    ({"shapes": ()}, "shapes is empty; give at least one HEIGHTxWIDTH"),
    ({"shapes": ((0, 14),)}, "shape 0x14 holds no pixel"),
    ({"views": (3, 2)}, "views 3:2 must be from few to many, at least 1"),
    ({"views": (1, 4), "scene_views": 3}, "views 1:4 needs more than the 3 views of a scene"),
    ({"scene_views": 9}, "scene_views must be in 1..8, got 9"),
    ({"scenes": 0}, "scenes must be in 1..10000000, got 0"),
    ({"minutes": 0.0}, "minutes must be positive, got 0.0"),
    ({"from_scratch": True}, "a head on a backbone from scratch learns nothing that lasts; use --train all"),
])  # fmt: skip
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InputError) as caught:
        TrainOptions("x", **changes)
    assert str(caught.value) == f"training options: {text}"


def test_the_warm_up_is_a_twentieth_unless_given() -> None:
    assert TrainOptions("x", steps=1000).warmup_steps == 50
    assert TrainOptions("x", steps=1000, warmup=3).warmup_steps == 3
    assert TrainOptions("x", steps=1).warmup_steps == 0


def test_a_gpu_gets_all_cores_but_one_to_make_its_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "usable_cores", lambda: 16)
    base = TrainOptions("x")
    assert [base.workers_for(*where) for where in (("cpu", 1), ("cuda", 1), ("cuda", 2), ("cuda", 99))] == [1, 15, 7, 1]
    for given in (0, 3):
        assert dataclasses.replace(base, workers=given).workers_for("cuda", 1) == given


def test_the_losses_offered_are_those_there_are() -> None:
    assert set(options.DEPTH_LOSSES) == set(DEPTH_LOSSES)


def test_samples_repeat_for_a_head_whose_features_are_kept() -> None:
    assert TrainOptions("x").repeats_samples
    assert not TrainOptions("x", feature_cache="off").repeats_samples
    assert not TrainOptions("x", train="all").repeats_samples
    assert (TrainOptions("x").scene_count, TrainOptions("x", train="all").scene_count) == (1000, 100_000)


def test_a_run_goes_on_with_other_machinery_but_with_no_other_training() -> None:
    machinery = {"workers": 3, "device": "cpu", "save_every": 1, "scene_cache": "s", "minutes": 1.0, "licence": "MIT"}
    base = TrainOptions("x")
    assert base.first_difference(dataclasses.replace(base, **machinery)) is None  # type: ignore[arg-type]
    assert base.first_difference(dataclasses.replace(base, steps=5)) == "steps"
    assert base.first_difference(dataclasses.replace(base, clip=2.0, seed=4)) == "seed", "the first in their order"

"""The training loop: it learns, resumes to the bit, stops when asked and when the loss is no number."""

import dataclasses
import itertools
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from trainings import TINY, assert_same, run, short, state_of, tiny_checkpoint, weights_of

from moe3d_deploy.checkpoint import load_model, open_checkpoint, save_checkpoint, seeded_source
from moe3d_deploy.errors import CheckpointError, InputError, Moe3dError
from moe3d_deploy.training import scene_loss
from moe3d_deploy.training.logs import read_log
from moe3d_deploy.training.loop import TrainingError
from moe3d_deploy.training.state import State, save_state


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps in one go."""
    path = tmp_path_factory.mktemp("whole") / "run"
    run(short(checkpoint), path)
    return path


def losses(path: Path) -> list[float]:
    return [line["loss"] for line in read_log(path / "train.jsonl", "step")]


def interrupt_at(step: int, monkeypatch: pytest.MonkeyPatch, number: signal.Signals = signal.SIGINT) -> None:
    """Send this process a signal while step `step` (from 1) is computed."""
    forward = scene_loss.SceneLoss.forward
    calls = itertools.count(1)

    def counting(self, *arguments):  # type: ignore[no-untyped-def]
        if next(calls) == step:
            os.kill(os.getpid(), number)
        return forward(self, *arguments)

    monkeypatch.setattr(scene_loss.SceneLoss, "forward", counting)


def test_the_loss_falls(checkpoint: Path, tmp_path: Path) -> None:
    """Two scenes, seen 30 times: the last losses are well below the first ones."""
    run(short(checkpoint, steps=30, scenes=2, views=(2, 2), mirror=False, jitter=False), tmp_path / "run")
    seen = losses(tmp_path / "run")
    assert len(seen) == 30
    assert sum(seen[-5:]) < 0.7 * sum(seen[:5])


@pytest.mark.parametrize("train", ["all", "head"])
def test_an_interrupted_run_goes_on_to_the_bit(
    train: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = short(checkpoint, train=train, from_scratch=train == "all")
    run(options, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(3, patch)
        result, _ = run(options, tmp_path / "run")
    assert (result.step, result.stopped_by) == (3, signal.SIGINT)
    result, lines = run(options, tmp_path / "run")
    assert (result.step, result.stopped_by) == (6, None)
    assert lines[0] == f"resumed: {tmp_path / 'run'} at step 3 of 6"
    assert_same(state_of(tmp_path / "run").tensors, state_of(tmp_path / "whole").tensors)
    one, other = (state_of(tmp_path / name).values for name in ("run", "whole"))
    assert one == other
    assert_same(weights_of(tmp_path / "run"), weights_of(tmp_path / "whole"))
    assert losses(tmp_path / "run") == losses(tmp_path / "whole"), "no step twice, none missing"


def test_muon_resumes_to_the_bit_too(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = short(checkpoint, optimizer="muon")
    run(options, tmp_path / "whole")
    with monkeypatch.context() as patch:
        interrupt_at(3, patch)
        run(options, tmp_path / "run")
    run(options, tmp_path / "run")
    assert_same(state_of(tmp_path / "run").tensors, state_of(tmp_path / "whole").tensors)


def test_from_scratch_other_weights_of_the_source_are_no_matter(checkpoint: Path, tmp_path: Path) -> None:
    """Of the source only the sizes count: a preset that has got trained weights since must not end a run."""
    source = tmp_path / "source"
    shutil.copytree(checkpoint, source)
    options = short(source, steps=2)
    run(dataclasses.replace(options, minutes=1e-6), tmp_path / "run")
    save_checkpoint(seeded_source("other", TINY, 5), source, overwrite=True)
    result, lines = run(options, tmp_path / "run")
    assert lines[0] == f"resumed: {tmp_path / 'run'} at step 1 of 2"
    assert result.step == 2


def test_from_scratch_other_sizes_of_the_source_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    """Heads are cut from the same tensors, whatever their number: their shapes would not tell."""
    source = tmp_path / "source"
    shutil.copytree(checkpoint, source)
    options = short(source, steps=2)
    run(dataclasses.replace(options, minutes=1e-6), tmp_path / "run")
    more_heads = dataclasses.replace(TINY, camera_head=dataclasses.replace(TINY.camera_head, num_heads=4))
    save_checkpoint(seeded_source("other", more_heads), source, overwrite=True)
    with pytest.raises(CheckpointError, match="step-00000001 was trained from other sizes than source now holds"):
        run(options, tmp_path / "run")


def test_torchs_random_numbers_go_on_too(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing draws from the global stream now; a dropout would."""
    forward, drawn = scene_loss.SceneLoss.forward, []

    def drawing(self, *arguments):  # type: ignore[no-untyped-def]
        drawn.append(float(torch.rand(())))
        return forward(self, *arguments)

    monkeypatch.setattr(scene_loss.SceneLoss, "forward", drawing)
    options = short(checkpoint, steps=2)
    run(options, tmp_path / "whole")
    for minutes in (1e-6, None):
        run(dataclasses.replace(options, minutes=minutes), tmp_path / "run")
    assert drawn[:2] == drawn[2:]
    assert drawn[0] != drawn[1]


def test_the_state_holds_weights_average_moments_and_random_numbers(whole: Path) -> None:
    kinds = {name.split(".")[0] for name in state_of(whole).tensors}
    assert kinds == {"model", "ema", "optimizer", "random"}


def test_the_number_of_workers_changes_no_bit(checkpoint: Path, whole: Path, tmp_path: Path) -> None:
    run(short(checkpoint, workers=2), tmp_path / "run")
    assert_same(state_of(tmp_path / "run").tensors, state_of(whole).tensors)


def test_a_scene_cache_changes_no_bit(checkpoint: Path, whole: Path, tmp_path: Path) -> None:
    for name in ("cold", "warm"):
        run(short(checkpoint, scene_cache=str(tmp_path / "scenes")), tmp_path / name)
        assert_same(state_of(tmp_path / name).tensors, state_of(whole).tensors)
    assert len(list((tmp_path / "scenes").rglob("*.safetensors"))) == 6


def test_micro_batches_are_the_step_up_to_rounding(checkpoint: Path, tmp_path: Path) -> None:
    """The first step's loss and gradient; later ones grow the rounding."""
    for name, accumulate in (("one", 1), ("four", 4)):
        run(short(checkpoint, steps=1, batch=4, accumulate=accumulate), tmp_path / name)
    first, second = (read_log(tmp_path / name / "train.jsonl", "step")[0] for name in ("one", "four"))
    for key in ("loss", "depth", "camera", "gradient_norm"):
        assert first[key] == pytest.approx(second[key], rel=1e-5)


def test_the_checkpoint_holds_the_averaged_weights(whole: Path) -> None:
    averages = {n.removeprefix("ema."): t for n, t in state_of(whole).tensors.items() if n.startswith("ema.")}
    stored = weights_of(whole)
    assert averages
    assert [name for name, tensor in averages.items() if not stored[name].equal(tensor)] == []
    source = open_checkpoint(whole / "checkpoint")
    assert source.config == TINY
    assert source.origin == "tiny, from scratch; trained all 6 steps seed 0"
    assert source.licence == "trained from scratch on procedural scenes, licence not said"
    load_model(source)(torch.rand(1, 2, 3, 28, 28))


def test_the_checkpoint_has_the_temperature_that_was_reached(checkpoint: Path, tmp_path: Path) -> None:
    run(short(checkpoint, steps=2, temperature=(2.0, 0.5), licence="Apache-2.0"), tmp_path / "run")
    source = open_checkpoint(tmp_path / "run" / "checkpoint")
    assert source.config.moe is not None
    assert source.config.moe.temperature == 0.5
    assert source.licence == "Apache-2.0"


def test_a_head_run_changes_the_head_alone(checkpoint: Path, tmp_path: Path) -> None:
    run(short(checkpoint, train="head", from_scratch=False), tmp_path / "run")
    before, after = open_checkpoint(checkpoint), weights_of(tmp_path / "run")
    changed = {name for name in after if not after[name].equal(before.tensor(name))}
    head = {name for name in after if name.startswith(("depth_head.experts.", "depth_head.gate."))}
    assert changed == head
    assert "camera" not in read_log(tmp_path / "run" / "train.jsonl", "step")[0]


def test_without_experts_the_last_convolutions_are_the_head(tmp_path: Path) -> None:
    """32 x 36 + 32 weights and biases of the first, 2 x 32 + 2 of the second."""
    config = dataclasses.replace(TINY, moe=None)
    save_checkpoint(seeded_source("single", config), tmp_path / "single")
    _, lines = run(short(tmp_path / "single", train="head", from_scratch=False, steps=1), tmp_path / "run")
    assert lines[0].startswith("training: the last two convolutions of the depth head, 0.00125 M parameters, 1 steps")


def test_a_run_from_a_runs_checkpoint_starts_where_that_ended(checkpoint: Path, whole: Path, tmp_path: Path) -> None:
    options = short(whole / "checkpoint", from_scratch=False, steps=1, shapes=((28, 42), (42, 28)), learning_rate=1e-9)
    run(options, tmp_path / "second")
    before, after = weights_of(whole), weights_of(tmp_path / "second")
    assert max(float((before[name] - after[name]).abs().max()) for name in before) < 1e-6
    origin = open_checkpoint(tmp_path / "second" / "checkpoint").origin
    assert origin == "tiny, from scratch; trained all 6 steps seed 0; trained all 1 steps seed 0"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_after_its_step_and_saves(
    number: signal.Signals, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    interrupt_at(2, monkeypatch, number)
    result, _ = run(short(checkpoint), tmp_path / "run")
    assert result.stopped_by == number
    assert state_of(tmp_path / "run").step == 2
    assert result.resume_command == f"moe3d train --resume -o {tmp_path / 'run'}"
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_second_ctrl_c_ends_at_once(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(self, *arguments):  # type: ignore[no-untyped-def]
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the second one ends the step")

    monkeypatch.setattr(scene_loss.SceneLoss, "forward", twice)
    with pytest.raises(KeyboardInterrupt):
        run(short(checkpoint), tmp_path / "run")
    assert not (tmp_path / "run" / "state").exists()


def test_time_that_is_over_ends_the_run_after_a_step(checkpoint: Path, whole: Path, tmp_path: Path) -> None:
    result, _ = run(short(checkpoint, minutes=1e-6), tmp_path / "run")
    assert (result.step, result.stopped_by) == (1, None)
    run(short(checkpoint), tmp_path / "run")
    assert_same(state_of(tmp_path / "run").tensors, state_of(whole).tensors)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_state(checkpoint: Path, tmp_path: Path) -> None:
    options = short(checkpoint, learning_rate=1e30, warmup=0, weight_decay=0.0, save_every=1)
    with pytest.raises(TrainingError) as caught:
        run(options, tmp_path / "run")
    assert caught.value.exit_code == 1
    text = str(caught.value)
    assert text.startswith("step 2: the loss is ")
    assert "samples 2 (scene " in text
    assert ", 3 (scene " in text
    assert "Step 1 is saved; start a new phase with a smaller --learning-rate" in text
    assert state_of(tmp_path / "run").step == 1


def test_only_the_sample_with_the_bad_loss_is_named(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_second_step(monkeypatch)
    with pytest.raises(TrainingError, match=r"^step 2: the loss is nan; sample 3 \(scene \d\)\. Nothing is saved yet"):
        run(short(checkpoint), tmp_path / "run")


def spoil_second_step(monkeypatch: pytest.MonkeyPatch) -> "itertools.count[int]":
    """The second sample of step 2 gets a loss of NaN; the counter says how many steps there were."""
    objectives, calls = scene_loss.scene_objectives, itertools.count(1)

    def spoiled(*arguments):  # type: ignore[no-untyped-def]
        total, parts = objectives(*arguments)
        return (total * torch.tensor([1.0, float("nan")]) if next(calls) == 2 else total), parts

    monkeypatch.setattr(scene_loss, "scene_objectives", spoiled)
    return calls


@pytest.mark.parametrize(("every", "steps"), [
    ({"log_every": 100, "save_every": 100}, 3), ({"log_every": 100, "save_every": 2}, 2),
])  # fmt: skip
def test_a_loss_that_is_no_number_is_seen_a_step_later_but_before_a_save(
    every: dict[str, int], steps: int, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look at a step has to wait for a GPU: without need only the step before the one that is queued is looked at."""
    calls = spoil_second_step(monkeypatch)
    with pytest.raises(TrainingError, match=r"^step 2: the loss is nan; sample 3 "):
        run(short(checkpoint, **every), tmp_path / "run")
    assert next(calls) == steps + 1
    assert not (tmp_path / "run" / "state").exists()


def test_a_process_that_dies_during_a_step_is_one_line(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch raises this from a signal handler, wherever the training is."""

    def died(self, *arguments):  # type: ignore[no-untyped-def]
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")

    monkeypatch.setattr(scene_loss.SceneLoss, "forward", died)
    with pytest.raises(Moe3dError, match=r"^a process that makes samples has died \(.*: Killed.*\); use fewer --work"):
        run(short(checkpoint), tmp_path / "run")


@pytest.mark.parametrize(("name", "value", "there", "here"), [
    ("learning_rate", 1e-4, "0.003", "0.0001"), ("shapes", ((28, 42),), "[[28, 28]]", "[[28, 42]]"),
    ("depth_loss", "l2", "'log'", "'l2'"),
])  # fmt: skip
def test_other_options_are_refused_by_the_first_that_differs(
    name: str, value: object, there: str, here: str, whole: Path, checkpoint: Path
) -> None:
    with pytest.raises(InputError) as caught:
        run(short(checkpoint, **{name: value}), whole)
    assert str(caught.value) == (
        f"{whole} is a run with {name} {there}, here it is {here}. Resume it as it is: "
        f"moe3d train --resume -o {whole}; or start a new phase from it: moe3d train {whole}/checkpoint -o OTHER ..."
    )


def test_more_steps_are_a_new_phase(whole: Path, checkpoint: Path) -> None:
    with pytest.raises(InputError, match="with steps 6, here it is 7; the learning rate is planned for all of them"):
        run(short(checkpoint, steps=7), whole)


def test_a_finished_run_takes_no_more_steps_and_mends_its_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    run(short(checkpoint), tmp_path / "run")
    before = weights_of(tmp_path / "run")
    (tmp_path / "run" / "checkpoint" / "config.json").unlink()  # killed between a save's two files
    result, _ = run(short(checkpoint), tmp_path / "run")
    assert result.step == 6
    assert open_checkpoint(tmp_path / "run" / "checkpoint").config == TINY
    assert_same(weights_of(tmp_path / "run"), before)
    assert len(losses(tmp_path / "run")) == 6


def test_a_run_from_other_weights_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "source")
    run(short(source, steps=1, from_scratch=False), tmp_path / "run")
    weights = source / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="step-00000001 was trained from other weights than source now holds"):
        run(short(source, steps=1, from_scratch=False), tmp_path / "run")


def test_a_run_from_equal_weights_of_other_sizes_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """Not even the weights' file tells the number of heads."""
    source = tmp_path / "source"
    shutil.copytree(checkpoint, source)
    run(short(source, steps=2, from_scratch=False, minutes=1e-6), tmp_path / "run")
    text = (source / "config.json").read_text()
    assert text.count('"num_heads": 2') == 3
    (source / "config.json").write_text(text.replace('"num_heads": 2', '"num_heads": 4', 1))
    with pytest.raises(CheckpointError, match="step-00000001 was trained from other sizes than source now holds"):
        run(short(source, steps=2, from_scratch=False), tmp_path / "run")


@pytest.mark.parametrize("name", ["optimizer.exp_avg.camera_head.embed_pose.bias", "random.cpu", "ema_updates"])
def test_a_state_that_lacks_something_is_one_line(name: str, checkpoint: Path, tmp_path: Path) -> None:
    options = short(checkpoint, steps=2)
    run(dataclasses.replace(options, minutes=1e-6), tmp_path / "run")
    state = state_of(tmp_path / "run")
    tensors = {key: tensor for key, tensor in state.tensors.items() if key != name}
    values = {key: value for key, value in state.values.items() if key != name}
    save_state(tmp_path / "run" / "state", State(state.step, tensors, values))
    missing = name.removeprefix("optimizer.")
    with pytest.raises(CheckpointError, match=rf"step-00000001 is not of this version \(no '{missing}'\); remove it"):
        run(options, tmp_path / "run")


def test_a_state_of_another_run_is_refused(checkpoint: Path, whole: Path, tmp_path: Path) -> None:
    options = short(checkpoint, seed=1)
    run(dataclasses.replace(options, minutes=1e-6), tmp_path / "run")
    (tmp_path / "run" / "state").rename(tmp_path / "own")
    (tmp_path / "run" / "state").symlink_to(whole / "state")
    with pytest.raises(CheckpointError, match="step-00000006 is of a run with another seed; remove it"):
        run(options, tmp_path / "run")


def test_a_folder_of_something_else_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "photo.png").touch()
    with pytest.raises(InputError, match=r"holds 'photo.png' and no options.json, so it is no run; choose another"):
        run(short(checkpoint), tmp_path)
    with pytest.raises(InputError, match=r"photo.png is a file; name the folder of the run"):
        run(short(checkpoint), tmp_path / "photo.png")


def test_16_bits_train_in_the_backbone_or_in_the_depth_head_too(checkpoint: Path, whole: Path, tmp_path: Path) -> None:
    """bfloat16 has 8 bits: the first loss, of the same samples and weights, within 5 %, and equal in no two."""
    found = {"off": losses(whole)[0]}
    for amp in ("bf16", "bf16-heads"):
        run(short(checkpoint, steps=1, warmup=0, amp=amp), tmp_path / amp)
        found[amp] = losses(tmp_path / amp)[0]
        assert found[amp] == pytest.approx(found["off"], rel=0.05)
    assert len(set(found.values())) == 3


def test_a_shape_off_the_patches_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="shape 28x30 is not a multiple of 14 on both sides; change --shapes"):
        run(short(checkpoint, shapes=((28, 30),)), tmp_path / "run")


def test_held_out_scenes_are_looked_at(checkpoint: Path, tmp_path: Path) -> None:
    _, lines = run(short(checkpoint, validate_every=4, validation_scenes=2), tmp_path / "run")
    logged = read_log(tmp_path / "run" / "train.jsonl", "validation")
    assert [line["step"] for line in logged] == [4, 6]
    assert all(line["abs_rel"] > 0 and 0 <= line["delta1"] <= 1 for line in logged)
    assert [line for line in lines if line.startswith("validation: step 4: AbsRel ")]

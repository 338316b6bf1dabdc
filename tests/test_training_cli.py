"""`moe3d train`: its flags are the options, its errors one line, and a kill costs the steps since a save alone."""

import dataclasses
import signal
import sys
from pathlib import Path

import pytest
from survival import MOE3D, TESTS, assert_one_line, content, hidden, largest_file, run_program, start
from trainings import FLAGS, SHORT, TINY, assert_same, run, short, state_of, tiny_checkpoint, weights_of

from moe3d_deploy.checkpoint import open_checkpoint
from moe3d_deploy.cli.main import load_command, main
from moe3d_deploy.training.logs import read_log
from moe3d_deploy.training.options import TrainOptions


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("t") / "f"  # short, as sockets lie beside it
    path.mkdir()
    return path


def test_every_option_has_a_flag_that_shows_its_default() -> None:
    command = load_command("train")
    names = {parameter.name for parameter in command.params} - {"output", "resume", "debug"}
    assert names == {field.name for field in dataclasses.fields(TrainOptions)}
    helps = {parameter.name: getattr(parameter, "help", "") or "" for parameter in command.params}
    for field in dataclasses.fields(TrainOptions):
        if isinstance(field.default, (int, float)) and not isinstance(field.default, bool):
            assert f"[default: {field.default}]" in helps[field.name]


def test_flags_become_the_options(checkpoint: Path, tmp_path: Path) -> None:
    flags = [*FLAGS, "--steps=1", "--temperature=2:0.5", "--shapes=28x42, 42x28", "--no-mirror", "--views=2"]
    assert main(["train", str(checkpoint), *flags, "-o", str(tmp_path / "run")]) == 0
    expected = dataclasses.replace(
        SHORT, source=str(checkpoint), steps=1, temperature=(2.0, 0.5), shapes=((28, 42), (42, 28)), mirror=False,
        views=(2, 2), save_every=500,
    )  # fmt: skip
    assert TrainOptions.read(tmp_path / "run" / "options.json") == expected


def test_a_run_ends_with_what_comes_next(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", str(checkpoint), *FLAGS, "--steps=6", "-o", str(tmp_path / "run")]
    assert main([*arguments, "--minutes=0.000001"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    last = err.splitlines()[-1]
    assert last == f"stopped      after step 1 of 6, saved; go on: moe3d train --resume -o {tmp_path / 'run'}"
    assert main(["train", "--resume", "-o", str(tmp_path / "run"), "--minutes=60", "--workers=1"]) == 0
    out, err = capsys.readouterr()
    assert out == f"moe3d-export {tmp_path / 'run' / 'checkpoint'} -o bundle\n"
    assert err.splitlines()[0] == f"resumed      {tmp_path / 'run'} at step 1 of 6"
    assert open_checkpoint(tmp_path / "run" / "checkpoint").config == TINY
    run(short(checkpoint), tmp_path / "whole")
    assert_same(state_of(tmp_path / "run").tensors, state_of(tmp_path / "whole").tensors)
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.is_dir() or path.suffix) == [
        "checkpoint", "options.json", "state", "tensorboard", "train.jsonl",
    ]  # fmt: skip


@pytest.mark.parametrize(("flags", "text"), [
    ([], "SOURCE is missing: name a preset or a checkpoint, or --resume the run in RUN"),
    (["--resume"], "run: no run to resume here (no options.json); start one: moe3d train SOURCE -o run"),
    (["moe3d-tiny", "--resume"], "--resume goes on with the run's own source; leave 'moe3d-tiny' out"),
    (["--resume", "--steps=4"],
     "--steps is settled for a run that is resumed; leave it out, or start a new phase"),
    (["moe3d-tiny", "--views=a:b"], "--views 'a:b': expected one number or two, such as 1:4"),
    (["moe3d-tiny", "--temperature=1:2:3"], "--temperature '1:2:3': expected one number or two, such as 2:1"),
    (["moe3d-tiny", "--shapes=126"], "--shapes '126': expected HEIGHTxWIDTH, such as 126x168"),
    (["moe3d-tiny", "--shapes=126x169"], "shape 126x169 is not a multiple of 7 on both sides; change --shapes"),
    (["moe3d-tiny", "--batch=0"], "training options: batch must be positive, got 0"),
])  # fmt: skip
def test_bad_input_is_one_line_and_code_2(
    flags: list[str], text: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    assert main(["train", *flags, "-o", "run"]) == 2
    assert capsys.readouterr() == ("", f"moe3d: {text}\n")
    assert list(folder.iterdir()) == []


def test_a_terminated_run_saves_and_says_how_to_go_on(checkpoint: Path, folder: Path) -> None:
    arguments = ["train", checkpoint, *FLAGS, "--steps=100000", "--workers=1", "-o", "run"]
    with start(MOE3D, arguments, folder, terminal=True, environment={"OMP_NUM_THREADS": "1"}) as command:
        assert command.wait_for(r"loss \d")
        command.send(signal.SIGTERM)
        ended = command.wait()
    assert_one_line(ended, 128 + signal.SIGTERM, names="moe3d: terminated")
    step = state_of(folder / "run").step
    said = [line for line in ended.errors if "stopped" in line]
    assert f"after step {step} of 100000, saved; go on: moe3d train --resume -o run" in said[-1]
    assert hidden(folder) == []


def test_a_second_training_of_a_run_is_refused(checkpoint: Path, folder: Path) -> None:
    from moe3d_deploy.files import exclusive_lock

    (folder / "run").mkdir()
    with exclusive_lock(folder / "run" / ".train.lock"), pytest.raises(Exception, match="is being trained by another"):
        run(short(checkpoint), folder / "run")


def test_killed_runs_go_on_and_end_as_if_nothing_had_been(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    program = [sys.executable, str(TESTS / "killed_trainings.py")]
    ended = run_program(program, [checkpoint, tmp_path / "runs"], tmp_path / "runs", OMP_NUM_THREADS="1")
    assert ended.code == 0, ended.errors
    steps = [int(line) for line in ended.stdout.split()]
    assert steps == sorted(steps), "a step that was saved is never lost"
    assert steps[-1] == 12
    assert steps[-2] > 0, "the kills came too early to show anything"
    killed, whole = tmp_path / "runs" / "killed", tmp_path / "runs" / "whole"
    assert_same(state_of(killed).tensors, state_of(whole).tensors)
    assert_same(weights_of(killed), weights_of(whole))
    losses = [[line["loss"] for line in read_log(path / "train.jsonl", "step")] for path in (killed, whole)]
    assert losses[0] == losses[1]
    assert hidden(killed) == []


def test_a_full_disk_is_one_line_and_the_last_state_stays(checkpoint: Path, folder: Path) -> None:
    run(short(checkpoint, minutes=1e-6), folder / "run")
    before = content(folder / "run" / "state")
    size = max(len(data) for data in before.values()) - 1
    arguments = ["train", "--resume", "--minutes=60", "-o", "run"]
    ended = run_program(MOE3D, arguments, folder, setup=largest_file(size))
    line = assert_one_line(ended, 1, names="run/state/step-00000006: File too large")
    assert "make room or choose another place" in line
    assert content(folder / "run" / "state") == before
    assert hidden(folder) == []
    run(short(checkpoint), folder / "run")
    assert state_of(folder / "run").step == 6

"""Signals that reach a training and all the processes that make its samples at once: `pkill`, a terminal, systemd."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from survival import MOE3D, assert_one_line, hidden, start
from trainings import FLAGS, state_of, tiny_checkpoint

from moe3d_deploy.benchmarks.commands import Command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny")


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("t") / "f"  # short, as sockets lie beside it
    path.mkdir()
    return path


def training(checkpoint: Path, folder: Path) -> Command:
    """With two processes for samples; it leads a process group of its own."""
    arguments = ["train", checkpoint, *FLAGS, "--steps=100000", "--workers=2", "-o", "run"]
    return start(MOE3D, arguments, folder, terminal=True, environment={"OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize(("number", "said"), [
    (signal.SIGTERM, "terminated"), (signal.SIGHUP, "terminated"), (signal.SIGINT, "interrupted"),
])  # fmt: skip
def test_a_signal_to_the_whole_group_saves_and_ends(
    number: signal.Signals, said: str, checkpoint: Path, folder: Path
) -> None:
    with training(checkpoint, folder) as command:
        assert command.wait_for(r"loss \d")
        assert len(command.processes()) == 3
        os.killpg(command.pid, number)
        ended = command.wait()
    assert_one_line(ended, 128 + number, names=f"moe3d: {said}")
    step = state_of(folder / "run").step
    stopped = [line for line in ended.errors if "stopped" in line]
    assert f"after step {step} of 100000, saved; go on: moe3d train --resume -o run" in stopped[-1]
    assert hidden(folder) == []


def test_processes_that_make_samples_ignore_what_they_are_sent_alone(checkpoint: Path, folder: Path) -> None:
    with training(checkpoint, folder) as command:
        assert command.wait_for(r"loss \d")
        others = [pid for pid in command.processes() if pid != command.pid]
        for pid in others:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                os.kill(pid, number)
        step = len(command.said)
        assert command.wait_for(rf"(?s)^.{{{step + 2000}}}"), "some steps more"
        assert set(others) < set(command.processes())
        command.send(signal.SIGTERM)
        assert_one_line(command.wait(), 128 + signal.SIGTERM)


def test_they_follow_a_killed_training(checkpoint: Path, folder: Path) -> None:
    with training(checkpoint, folder) as command:
        assert command.wait_for(r"loss \d")
        command.send(signal.SIGKILL)
        ended = command.wait()
        deadline = time.monotonic() + 20
        while command.processes() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert command.processes() == []
    assert ended.code == 128 + signal.SIGKILL


LEFT = """
import dataclasses, sys
from trainings import SHORT
from moe3d_deploy.training.data import SceneStore, batches

def fails(self, seed):
    raise PermissionError

if sys.argv[1] == "an error":
    SceneStore.get = fails
made = batches(dataclasses.replace(SHORT, workers=2, steps=1000), 0)
try:
    next(made)
    sys.kept = made
except PermissionError as error:
    sys.kept = error
"""


@pytest.mark.parametrize("left", ["a batch", "an error"])
def test_a_program_that_keeps_its_samples_to_its_end_ends(left: str, folder: Path) -> None:
    """Python terminates and awaits the processes that are left at its exit, and these ignore that they are to end."""
    with start([sys.executable, "-c", LEFT], [left], folder, environment={"OMP_NUM_THREADS": "1"}) as command:
        ended = command.wait(60)
    assert (ended.code, ended.errors, ended.processes) == (0, [], [])

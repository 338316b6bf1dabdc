"""Trains in processes that are killed at random moments, then to the end: python killed_trainings.py CHECKPOINT FOLDER.

The libraries are loaded once, so that a kill hits the training; every step is saved, so that it often hits a save.
Prints the step of the newest state after each kill.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from trainings import run, short, state_of

from moe3d_deploy.training.state import load_state

KILLS = 6
STEPS = 12


def train(checkpoint: Path, path: Path, seconds: float | None) -> int:
    """In a process of its own, killed after some time; how it ended, 0 if well."""
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        run(short(checkpoint, steps=STEPS, save_every=1), path)
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def main() -> None:
    checkpoint, folder = Path(sys.argv[1]), Path(sys.argv[2])
    run(short(checkpoint, steps=STEPS, save_every=1), folder / "whole")  # here, so that all is loaded
    started = time.monotonic()
    train(checkpoint, folder / "timed", None)
    seconds = time.monotonic() - started
    stream = random.Random(4)
    for _ in range(KILLS):
        train(checkpoint, folder / "killed", stream.uniform(0.1, 0.6) * seconds)
        state = load_state(folder / "killed" / "state")
        sys.stdout.write(f"{state.step if state else 0}\n")
    if train(checkpoint, folder / "killed", None) == 0:
        sys.stdout.write(f"{state_of(folder / 'killed').step}\n")


main()

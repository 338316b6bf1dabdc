"""The resumable state: whole or not there, the newest two kept, and nothing else taken for one."""

import errno
import itertools
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from moe3d_deploy.errors import CheckpointError
from moe3d_deploy.training import state as state_module
from moe3d_deploy.training.state import State, load_state, part, remove_partial_states, save_state, states


def state(step: int) -> State:
    tensors = {
        "model.a": torch.full((2, 3), float(step)),
        "random": torch.arange(9, dtype=torch.uint8),
        "count": torch.tensor(float(step)),
        "strided": torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
    }
    return State(step, tensors, {"text": "x", "number": 0.1 + 0.2})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    saved = state(7)
    assert save_state(tmp_path / "state", saved) == tmp_path / "state" / "step-00000007"
    loaded = load_state(tmp_path / "state")
    assert loaded is not None
    assert (loaded.step, loaded.values) == (7, saved.values)
    assert {n: t.dtype for n, t in loaded.tensors.items()} == {n: t.dtype for n, t in saved.tensors.items()}
    assert all(tensor.equal(saved.tensors[name]) for name, tensor in loaded.tensors.items())
    assert part(loaded.tensors, "model.").keys() == {"a"}


def test_a_state_is_safetensors_and_json(tmp_path: Path) -> None:
    path = save_state(tmp_path, state(1))
    assert names(path) == ["state.json", "tensors.safetensors"]
    safetensors.torch.load_file(path / "tensors.safetensors")
    assert json.loads((path / "state.json").read_text())["step"] == 1


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10, 100_000_000):
        save_state(tmp_path, state(step))
    assert names(tmp_path) == ["step-00000010", "step-100000000"]
    loaded = load_state(tmp_path)
    assert loaded is not None
    assert loaded.step == 100_000_000


def test_no_state_is_none(tmp_path: Path) -> None:
    assert load_state(tmp_path / "missing") is None
    assert load_state(tmp_path) is None


@pytest.mark.parametrize(("file", "written"), [("tensors.safetensors", 0), ("state.json", 1)])
def test_a_full_disk_leaves_the_states_that_were_there(
    file: str, written: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_state(tmp_path, state(1))

    def full(self: Path, *arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes" if file.startswith("tensors") else "write_text", full)
    with pytest.raises(OSError, match="No space left") as caught:
        save_state(tmp_path, state(2))
    assert caught.value.filename == str(tmp_path / "step-00000002")
    assert names(tmp_path) == ["step-00000001"]


def test_what_a_kill_leaves_is_no_state_and_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_state(tmp_path, state(1))
    monkeypatch.setattr(state_module.shutil, "rmtree", lambda *arguments, **options: None)
    monkeypatch.setattr(state_module.os, "replace", lambda *names: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_state(tmp_path, state(2))
    monkeypatch.undo()
    assert len(names(tmp_path)) == 2
    assert [path.name for path in states(tmp_path)] == ["step-00000001"]
    remove_partial_states(tmp_path)
    assert names(tmp_path) == ["step-00000001"]


def killed_at_line(number: int, folder: Path) -> bool:
    """Save in a process that is killed when it comes to its nth line of state.py; whether it came so far."""
    child = os.fork()
    if child == 0:
        lines = itertools.count(1)

        def trace(frame, event, argument):  # type: ignore[no-untyped-def]
            if frame.f_code.co_filename != state_module.__file__:
                return None
            if event == "line" and next(lines) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        save_state(folder, state(3))
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_a_kill_at_any_line_of_a_save_leaves_a_whole_state(tmp_path: Path) -> None:
    """The one before or the new one, once that has its name; and never fewer than two to go back to."""
    seen = []
    for number in itertools.count(1):
        folder = tmp_path / str(number)
        for step in (1, 2):
            save_state(folder, state(step))
        killed = killed_at_line(number, folder)
        loaded = load_state(folder)
        assert loaded is not None
        assert all(tensor.equal(state(loaded.step).tensors[name]) for name, tensor in loaded.tensors.items())
        assert len(states(folder)) >= 2
        seen.append(loaded.step)
        remove_partial_states(folder)
        assert all(path.name.startswith("step-") for path in folder.iterdir())
        if not killed:
            break
    assert len(seen) > 25, "lines of a save"
    assert seen == sorted(seen)
    assert set(seen) == {2, 3}


def foreign_format(path: Path) -> None:
    values = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(values | {"format": 2}))


def of_another_step(path: Path) -> None:
    values = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(values | {"step": 5}))


def cut(path: Path) -> None:
    data = (path / "tensors.safetensors").read_bytes()
    (path / "tensors.safetensors").write_bytes(data[:-1])


@pytest.mark.parametrize(("damage", "why"), [
    (lambda path: (path / "state.json").unlink(), "No such file or directory"),
    (lambda path: (path / "tensors.safetensors").unlink(), "No such file or directory"),
    (lambda path: (path / "state.json").write_text("{"), "is not JSON"),
    (lambda path: (path / "state.json").write_text("[1]"), "state.json is none of a training run"),
    (lambda path: (path / "state.json").write_text('{"a": NaN}'), "NaN, which JSON does not allow"),
    (foreign_format, "format 2, this version reads 1"),
    (of_another_step, "state.json is of another state"),
    (cut, "tensors.safetensors is not as it was written"),
])  # fmt: skip
def test_a_damaged_or_foreign_state_is_refused(damage, why: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    for step in (1, 2):
        save_state(tmp_path, state(step))
    damage(tmp_path / "step-00000002")
    with pytest.raises(CheckpointError) as caught:
        load_state(tmp_path)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path}/step-00000002: damaged or foreign state (")
    assert why in text
    assert text.endswith("; remove it to go on from step-00000001")


def test_the_only_state_damaged_means_to_start_again(tmp_path: Path) -> None:
    cut(save_state(tmp_path, state(1)))
    with pytest.raises(CheckpointError, match="remove it to start the run again$"):
        load_state(tmp_path)

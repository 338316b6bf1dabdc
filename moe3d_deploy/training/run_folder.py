"""The folder of a run: options.json, state/, checkpoint/, train.jsonl, tensorboard/; one process writes at a time."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moe3d_deploy import strict_json
from moe3d_deploy.errors import InputError
from moe3d_deploy.files import atomic_write, exclusive_lock, remove_partials
from moe3d_deploy.training.options import TrainOptions
from moe3d_deploy.training.state import remove_partial_states, states

OPTIONS_FILE = "options.json"
_LOCK_FILE = ".train.lock"


@dataclass(frozen=True)
class RunFolder:
    path: Path

    @property
    def state(self) -> Path:
        return self.path / "state"

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def resume_command(self) -> str:
        return f"moe3d train --resume -o {self.path}"


def stored_options(path: Path) -> TrainOptions:
    """The options of the run in a folder. Raises InputError where there is none, CheckpointError for a damaged one."""
    if not (path / OPTIONS_FILE).is_file():
        raise InputError(f"{path}: no run to resume here (no {OPTIONS_FILE}); start one: moe3d train SOURCE -o {path}")
    return TrainOptions.read(path / OPTIONS_FILE)


@contextmanager
def open_run(path: Path, options: TrainOptions) -> Iterator[RunFolder]:
    """Make or enter a run's folder and hold its lock; clear what a killed process left.

    A run that has saved nothing yet may be started with other options: what was wrong with them is how it ended.
    Raises InputError for a folder that holds something else, a run with other options, or one that another process
    trains.
    """
    if path.exists() and not path.is_dir():
        raise InputError(f"{path} is a file; name the folder of the run")
    path.mkdir(parents=True, exist_ok=True)
    busy = InputError(f"{path} is being trained by another process; wait until it has ended")
    with exclusive_lock(path / _LOCK_FILE, busy):
        remove_partials(path)
        _check_options(path, options)
        folder = RunFolder(path)
        remove_partial_states(folder.state)
        atomic_write(path / OPTIONS_FILE, options.to_json().encode())
        yield folder


def _check_options(path: Path, options: TrainOptions) -> None:
    if not (path / OPTIONS_FILE).exists():
        if others := sorted(entry.name for entry in path.iterdir() if not entry.name.startswith(".")):
            raise InputError(
                f"{path} holds {others[0]!r} and no {OPTIONS_FILE}, so it is no run; choose another folder"
            )
        return
    if not states(RunFolder(path).state):
        return
    stored = TrainOptions.read(path / OPTIONS_FILE)
    name = stored.first_difference(options)
    if name is None:
        return
    there, here = (
        str(v) if isinstance(v, list) else strict_json.show(v) for v in (o.to_dict()[name] for o in (stored, options))
    )
    why = "; the learning rate is planned for all of them" if name == "steps" else ""
    raise InputError(
        f"{path} is a run with {name} {there}, here it is {here}{why}. Resume it as it is: moe3d train --resume -o "
        f"{path}; or start a new phase from it: moe3d train {path}/checkpoint -o OTHER ..."
    )

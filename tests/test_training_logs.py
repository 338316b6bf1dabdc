"""train.jsonl: one object a line, strict JSON, and no step twice after a run goes on."""

import importlib.util
import json
from pathlib import Path

import pytest

from moe3d_deploy.training.logs import RunLog, read_log


def write(folder: Path, first: int, *steps: int) -> None:
    log = RunLog(folder, first)
    for step in steps:
        log.write("step", step, {"loss": step / 2})
    log.close()


def test_lines_are_there_as_soon_as_they_are_written(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log.write("step", 1, {"loss": 0.5, "expert_usage": [0.25, 0.75]})
    (line,) = (tmp_path / "train.jsonl").read_text().splitlines()
    assert json.loads(line) == {"kind": "step", "step": 1, "loss": 0.5, "expert_usage": [0.25, 0.75]}
    log.close()


def test_what_is_not_finite_becomes_null(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log.write("step", 1, {"loss": float("nan"), "parts": {"depth": float("inf")}, "usage": [float("-inf"), 1.0]})
    log.close()
    (line,) = read_log(tmp_path / "train.jsonl")
    assert (line["loss"], line["parts"], line["usage"]) == (None, {"depth": None}, [None, 1.0])
    assert "NaN" not in (tmp_path / "train.jsonl").read_text()


def test_a_run_that_goes_on_drops_the_steps_that_it_takes_again(tmp_path: Path) -> None:
    write(tmp_path, 0, 1, 2, 3)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"kind": "step", "st')  # cut off by a kill
    write(tmp_path, 2, 3, 4)
    assert [line["step"] for line in read_log(tmp_path / "train.jsonl")] == [1, 2, 3, 4]


def test_a_full_disk_is_told_with_the_name_of_the_file_also_at_the_end(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log._file.close()
    log._file = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115
    with pytest.raises(OSError, match="No space left") as caught:
        log.write("step", 1, {"loss": 0.5})
    assert caught.value.filename == "/dev/full"
    log.close()  # would flush once more what was not written


def test_kinds_can_be_told_apart(tmp_path: Path) -> None:
    log = RunLog(tmp_path, 0)
    log.write("step", 1, {})
    log.write("note", 1, {"text": "x"})
    log.close()
    assert [line["text"] for line in read_log(tmp_path / "train.jsonl", "note")] == ["x"]


def test_tensorboard_has_steps_and_validations_where_it_is_installed(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install 'moe3d-deploy[train]'")
    log = RunLog(tmp_path, 0)
    log.write("step", 1, {"loss": 0.5, "expert_usage": [0.25, 0.75]})
    log.write("validation", 1, {"abs_rel": 0.1})
    log.write("note", 1, {"count": 3})
    log.close()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    expected = {"train/loss", "train/expert_usage/0", "train/expert_usage/1", "validation/abs_rel"}
    assert set(events.Tags()["scalars"]) == expected
    (scalar,) = events.Scalars("train/loss")
    assert (scalar.step, scalar.value) == (1, 0.5)


def test_without_tensorboard_there_are_the_lines_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    log = RunLog(tmp_path, 0)
    assert not log.has_tensorboard
    log.write("step", 1, {"loss": 1.0})
    log.close()
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]

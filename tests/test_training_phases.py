"""What a training was, read from its runs' folders and told in a table."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from trained_weights import small_preset, trained_checkpoint

from moe3d_deploy.benchmarks.ship_weights import ship
from moe3d_deploy.benchmarks.training_phases import phase, phases_behind, phases_table
from moe3d_deploy.checkpoint import open_checkpoint
from moe3d_deploy.errors import InputError
from moe3d_deploy.training.options import TrainOptions

OPTIONS = TrainOptions(
    "moe3d-tiny", train="all", from_scratch=True, seed=4, steps=300, learning_rate=1.5e-3, shapes=((56, 77), (84, 112)),
    views=(2, 4), workers=1, scene_cache="pool", jitter=False,
)  # fmt: skip


LINE = {"step": 300, "samples": 1200, "samples_per_second": 8.0}


def run_folder(path: Path, *lines: dict[str, float], **options: Any) -> Path:
    path.mkdir()
    (path / "options.json").write_text(dataclasses.replace(OPTIONS, **options).to_json())
    (path / "train.jsonl").write_text("".join(json.dumps({"kind": "step", **line}) + "\n" for line in lines))
    return path


def test_time_is_the_samples_over_the_rate_of_each_part_of_the_log(tmp_path: Path) -> None:
    """400 samples at 4 a second, then 800 at 8: 200 s."""
    run = run_folder(
        tmp_path / "run",
        {"step": 100, "samples": 400, "samples_per_second": 4.0},
        {"step": 300, "samples": 1200, "samples_per_second": 8.0},
    )
    found = phase(run)
    assert (found["steps"], found["samples"], found["seconds"]) == (300, 1200, 200)
    assert TrainOptions.from_dict(found["options"]) == OPTIONS


def test_what_was_not_saved_does_not_count(tmp_path: Path) -> None:
    """The newest state is of step 200, batch 4: 400 samples at 4 a second, then 400 at 8."""
    run = run_folder(
        tmp_path / "run",
        {"step": 100, "samples": 400, "samples_per_second": 4.0},
        {"step": 200, "samples": 800, "samples_per_second": 8.0},
        {"step": 300, "samples": 1200, "samples_per_second": 8.0},
    )
    for step in (100, 200):
        (run / "state" / f"step-{step:08d}").mkdir(parents=True)
    found = phase(run)
    assert (found["steps"], found["samples"], found["seconds"]) == (200, 800, 150)


def test_what_was_saved_after_the_last_line_counts(tmp_path: Path) -> None:
    """Steps 300 to 350, at the pace of the line before: 200 samples at 8 a second."""
    run = run_folder(tmp_path / "run", LINE)
    (run / "state" / "step-00000350").mkdir(parents=True)
    found = phase(run)
    assert (found["steps"], found["samples"], found["seconds"]) == (350, 1400, 175)


def test_a_save_before_the_first_line_of_the_log_counts_alone(tmp_path: Path) -> None:
    """Killed after the line of step 300, saved at step 100: 400 samples at 8 a second."""
    run = run_folder(tmp_path / "run", LINE)
    (run / "state" / "step-00000100").mkdir(parents=True)
    found = phase(run)
    assert (found["steps"], found["samples"], found["seconds"]) == (100, 400, 50)


def test_the_table_has_the_flags_that_change_the_result_and_the_sum() -> None:
    found = {"options": OPTIONS.to_dict(), "steps": 300, "samples": 1200, "seconds": 5400}
    text = phases_table({"training": {"phases": [found, found], "machine": "2 cores of a test"}})
    assert text.splitlines()[2:] == [
        "| 1 | 300 | 1,200 | 1.5 | `--seed 4 --train all --from-scratch --learning-rate 0.0015 --shapes 56x77,84x112 "
        "--views 2:4 --no-jitter` |",
        "| 2 | 300 | 1,200 | 1.5 | `--seed 4 --train all --from-scratch --learning-rate 0.0015 --shapes 56x77,84x112 "
        "--views 2:4 --no-jitter` |",
        "| all | 600 | 2,400 | 3.0 | |",
        "",
        "On 2 cores of a test.",
    ]


def test_a_folder_of_something_else_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no run of moe3d train"):
        phase(tmp_path / "nowhere")


def test_a_run_without_a_step_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="its log has no step yet"):
        phase(run_folder(tmp_path / "run"))


def test_the_phases_behind_a_checkpoint_are_those_of_the_runs_that_it_started_from(tmp_path: Path) -> None:
    first = run_folder(tmp_path / "first", LINE, seed=1)
    second = run_folder(tmp_path / "second", LINE, seed=2, source=str(first / "checkpoint"), from_scratch=False)
    (first / "checkpoint").mkdir()
    found = phases_behind(second / "checkpoint")
    assert [each["options"]["seed"] for each in found] == [1, 2]
    assert found == [phase(first), phase(second)]
    assert str(tmp_path) not in json.dumps(found)
    (second / "checkpoint").mkdir()
    (second / "checkpoint" / "model.safetensors").touch()
    assert phases_behind(second / "checkpoint" / "model.safetensors") == found
    assert phases_behind(tmp_path / "of-no-run" / "checkpoint") == []

    again = run_folder(tmp_path / "again", LINE, seed=3, source=str(first / "checkpoint"))
    assert phases_behind(again / "checkpoint") == [phase(again)], "it gave up the weights that it started from"


def test_a_run_from_trained_weights_comes_after_their_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when what ships by now came of that run: its own phases do not count twice."""
    small_preset(tmp_path / "weights", monkeypatch)
    first = run_folder(tmp_path / "first", LINE, seed=1)
    run = run_folder(tmp_path / "run", LINE, seed=2, source="preset:moe3d-tiny", from_scratch=False)
    assert phases_behind("moe3d-tiny") == []
    assert phases_behind(run / "checkpoint") == [phase(run)]

    source = open_checkpoint(trained_checkpoint(tmp_path / "any" / "checkpoint"))
    for shipped in ([phase(first)], [phase(first), phase(run)], [phase(first), phase(run), phase(run)]):
        ship(source, {"phases": shipped})
        assert phases_behind("moe3d-tiny") == shipped
        assert phases_behind(run / "checkpoint") == [phase(first), phase(run)]

    ship(source, {"phases": [phase(first), {**phase(run), "steps": 100}]})  # and then it went on
    assert phases_behind(run / "checkpoint") == [phase(first), phase(run)]
    another = {**phase(run), "seconds": 7}  # the same command from the weights before
    ship(source, {"phases": [phase(first), another]})
    assert phases_behind(run / "checkpoint") == [phase(first), another, phase(run)]


def test_a_source_that_is_gone_is_named(tmp_path: Path) -> None:
    run = run_folder(tmp_path / "run", LINE, source=str(tmp_path / "first" / "checkpoint"), from_scratch=False)
    with pytest.raises(InputError, match=r"run: it started from .*first/checkpoint, which is gone; put it back, or"):
        phases_behind(run / "checkpoint")

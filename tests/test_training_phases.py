"""What a training was, read from its runs' folders and told in a table."""

import json
from pathlib import Path

import pytest

from moe3d_deploy.benchmarks.training_phases import phase, phases_table
from moe3d_deploy.errors import InputError
from moe3d_deploy.training.options import TrainOptions

OPTIONS = TrainOptions(
    "moe3d-tiny", train="all", from_scratch=True, seed=4, steps=300, learning_rate=1.5e-3, shapes=((56, 77), (84, 112)),
    views=(2, 4), workers=1, scene_cache="pool", jitter=False,
)  # fmt: skip


def run_folder(path: Path, *lines: dict[str, float]) -> Path:
    path.mkdir()
    (path / "options.json").write_text(OPTIONS.to_json())
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

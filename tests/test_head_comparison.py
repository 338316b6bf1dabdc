"""`benchmarks.head_comparison` as a command: its result, going on after a kill, pictures, and what it refuses."""

import dataclasses
import functools
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import write_bundle
from click.testing import CliRunner, Result
from judged_scenes import box_scene, itself
from PIL import Image
from trainings import TINY

from moe3d_deploy.benchmarks import head_comparison, head_pictures, head_training, head_work
from moe3d_deploy.benchmarks.environment import without_paths
from moe3d_deploy.benchmarks.head_variants import Plan
from moe3d_deploy.benchmarks.head_work import Key, WorkFolder
from moe3d_deploy.checkpoint import save_checkpoint, seeded_source
from moe3d_deploy.config import MoeConfig
from moe3d_deploy.errors import CheckpointError, InputError, Moe3dError
from moe3d_deploy.evaluation.scenes import HELD_OUT
from moe3d_deploy.training import scene_cache

PAGE = (Path(__file__).parent.parent / "docs" / "comparison.md").read_text(encoding="utf-8")
# C = 4: 76 FLOP per channel of a single head, 1840 for 4 experts of 5 channels and a gate of 4; 24 channels have 1824.
CONFIG = dataclasses.replace(TINY, moe=MoeConfig(num_experts=2, hidden_channels=5, gate_hidden_channels=4))
HEADS = ["single", "narrow", "wide", "moe4", "moe4-entropy"]
FLAGS = ["--steps=6", "--batch=2", "--scenes=2", "--views=2", "--count=2", "--height=28", "--width=42"]

_render = functools.cache(scene_cache.render_scene)


@pytest.fixture(autouse=True)
def rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe3d_deploy.training import scenes

    for module in (scene_cache, scenes):
        monkeypatch.setattr(module, "render_scene", _render)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights") / "small"
    save_checkpoint(seeded_source("small", CONFIG), folder)
    return folder


@pytest.fixture(scope="module")
def finished(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a comparison of two seeds, its work folder beside it; not to be changed."""
    out = tmp_path_factory.mktemp("finished") / "heads.json"
    result = compare(checkpoint, out)
    assert result.exception is None, result.output
    return out


def compare(checkpoint: Path | str, out: Path, *more: str) -> Result:
    return CliRunner().invoke(head_comparison.main, [str(checkpoint), "--out", str(out), "--seeds=2", *FLAGS, *more])


def refusal(result: Result) -> str:
    assert isinstance(result.exception, Moe3dError), result.exception
    text = str(result.exception)
    assert "\n" not in text
    return text


def measured(out: Path) -> dict[str, Any]:
    """A result without what tells one machine and moment from another."""
    report: dict[str, Any] = json.loads(out.read_text())
    return {key: value for key, value in report.items() if key != "environment"}


def copied(finished: Path, folder: Path) -> Path:
    shutil.copytree(finished.parent, folder)
    return folder / finished.name


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, list[str]]]:
    """(loss, seed, heads) of every pass over the data from now on."""
    seen: list[tuple[str, int, list[str]]] = []
    real = head_training.train_heads

    def train_heads(heads: Sequence[Any], pool: Any, plan: Any, loss: str, seed: int, on_step: Any) -> Any:
        seen.append((loss, seed, [head.name for head in heads]))
        return real(heads, pool, plan, loss, seed, on_step)

    monkeypatch.setattr(head_training, "train_heads", train_heads)
    return seen


def documented(start: str) -> set[str]:
    """The keys of the row of the page's last table that starts so."""
    (row,) = re.findall(rf"^\| `{start}` \| (.*) \|$", PAGE.partition("## The result")[2], re.MULTILINE)
    return set(re.findall(r"`(\w+)`", row))


def test_the_result_has_its_documented_form(finished: Path) -> None:
    report = json.loads(finished.read_text())
    rows = re.findall(r"^\| `(\w+)` \|", PAGE.partition("## The result")[2], re.MULTILINE)
    assert set(report) == set(rows)
    for key in ("model", "plan", "pictures"):
        assert report[key].keys() == documented(key)
    assert [head["name"] for head in report["variants"]] == HEADS
    assert all(head.keys() == documented("variants") for head in report["variants"])
    assert report["model"]["experts"] == 2
    assert report["plan"]["seeds"] == 2

    (found,) = report["comparisons"]
    assert found.keys() == documented("comparisons")
    assert found["loss"] == "l2"
    assert list(found["training"]) == HEADS
    assert found["training"]["single"].keys() == {"depth", "last_fifth"}
    assert found["training"]["moe4"].keys() == {"depth", "entropy", "last_fifth"}
    assert np.shape(found["training"]["moe4"]["entropy"]) == (2, 6)  # seeds, steps
    for split in HELD_OUT:
        quality = found["quality"][split]
        assert list(quality) == HEADS
        assert quality["moe4"]["abs_rel"].keys() == {"mean", "spread", "per_seed", "scenes"}
        assert (quality["moe4"]["abs_rel"]["scenes"], len(quality["moe4"]["abs_rel"]["per_seed"])) == (2, 2)
        assert sum(quality["moe4"]["expert_shares"]) == pytest.approx(1)
        assert quality["single"]["expert_shares"] is None
        differences = found["differences"][split]
        assert list(differences) == ["single", "wide"]
        assert list(differences["wide"]) == ["single", "narrow", "moe4", "moe4-entropy"]
        change = differences["single"]["moe4"]["abs_rel"]
        assert change.keys() == {"change", "low", "high", "per_seed", "verdict"}
        means = (quality[head]["abs_rel"]["mean"] for head in ("moe4", "single"))
        assert change["change"] == pytest.approx(next(means) - next(means))
    assert len(found["finding"]) == 9


def test_single_and_experts_cost_as_many_flops(finished: Path) -> None:
    flops = {head["name"]: head["flops_per_pixel"] for head in json.loads(finished.read_text())["variants"]}
    assert (flops["wide"], flops["moe4"], flops["moe4-entropy"]) == (1824, 1840, 1840)
    assert flops["single"] == 76 * 32


def test_the_result_names_no_folder_of_a_machine(finished: Path) -> None:
    text = finished.read_text()
    assert without_paths(text) == text


def test_pictures_lie_beside_the_result_and_are_small(finished: Path) -> None:
    for name in head_comparison.PICTURES:
        file = finished.parent / name
        assert file.stat().st_size < 300_000
        assert Image.open(file).width > 1000
    assert json.loads(finished.read_text())["pictures"]["files"] == list(head_comparison.PICTURES)


def test_a_finished_comparison_trains_nothing_again(
    finished: Path, checkpoint: Path, tmp_path: Path, trainings: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copied(finished, tmp_path / "again")
    out.unlink()
    result = compare(checkpoint, out)
    assert result.exception is None, result.output
    assert trainings == []
    assert measured(out) == measured(finished)
    assert "heads        10 of 10 are trained" in result.stderr


def test_a_killed_run_goes_on_with_the_heads_that_are_missing(
    finished: Path, checkpoint: Path, tmp_path: Path, trainings: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the heads of the second seed are saved: what comes out is equal to a run in one go."""
    out, saved = tmp_path / "heads.json", []
    real = WorkFolder.save

    def save(self: WorkFolder, key: Key, head: Any) -> None:
        if len(saved) == 7:
            raise KeyboardInterrupt
        saved.append(key)
        real(self, key, head)

    monkeypatch.setattr(WorkFolder, "save", save)
    assert compare(checkpoint, out).exit_code != 0
    assert not out.exists()
    monkeypatch.setattr(WorkFolder, "save", real)
    assert compare(checkpoint, out).exception is None
    assert trainings == [("l2", 0, HEADS), ("l2", 1, HEADS), ("l2", 1, HEADS[2:])]
    assert measured(out) == measured(finished)


def test_heads_without_figures_are_judged_alone(
    finished: Path, checkpoint: Path, tmp_path: Path, trainings: list[Any]
) -> None:
    out = copied(finished, tmp_path / "again")
    (out.with_suffix(".work") / f"{Key('l2', 1, 'moe4')}.json").unlink()
    result = compare(checkpoint, out)
    assert trainings == []
    assert "judged       1 heads on 2 scenes of each split" in result.stderr
    assert measured(out) == measured(finished)


def test_another_loss_is_added_to_what_is_there(
    finished: Path, checkpoint: Path, tmp_path: Path, trainings: list[Any]
) -> None:
    out = copied(finished, tmp_path / "again")
    assert compare(checkpoint, out, "--loss=l2", "--loss=log", "--loss=l2").exception is None
    assert trainings == [("log", 0, HEADS), ("log", 1, HEADS)]
    found = json.loads(out.read_text())["comparisons"]
    assert [comparison["loss"] for comparison in found] == ["l2", "log"]
    assert found[0] == json.loads(finished.read_text())["comparisons"][0]
    assert found[1]["training"]["single"]["depth"] != found[0]["training"]["single"]["depth"]


def test_a_folder_of_another_comparison_is_refused(finished: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = copied(finished, tmp_path / "again")
    work = out.with_suffix(".work")
    assert refusal(compare(checkpoint, out, "--learning-rate=0.1")) == (
        f"{work} is of a comparison with another learning_rate (0.002, not 0.1); choose another --workdir, or remove "
        "it to start anew"
    )
    other = tmp_path / "other"
    save_checkpoint(seeded_source("small", CONFIG, 5), other)
    assert refusal(compare(other, out)).startswith(f"{work} is of a comparison with another checkpoint; choose")
    (work / "plan.json").unlink()
    assert refusal(compare(checkpoint, out)).startswith(f"{work} holds something else than a comparison of heads")


def test_a_damaged_head_is_named(finished: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = copied(finished, tmp_path / "again")
    file = out.with_suffix(".work") / f"{Key('l2', 0, 'wide')}.safetensors"
    for data in (file.read_bytes()[:-9], (file.parent / "l2-seed0-moe4.safetensors").read_bytes()):
        file.write_bytes(data)
        result = compare(checkpoint, out)
        assert isinstance(result.exception, CheckpointError)
        assert refusal(result) == f"{file}: not a head of wide; remove it to train that again"
    figures = file.with_suffix(".json")
    figures.write_text("{")
    file.write_bytes((finished.with_suffix(".work") / file.name).read_bytes())
    assert refusal(compare(checkpoint, out)).startswith(f"{figures}: is not JSON")


def test_a_folder_that_another_process_works_in_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with head_work.open_work(tmp_path / "heads.work", Plan(), "0" * 64):
        text = refusal(compare(checkpoint, tmp_path / "heads.json"))
    assert text == f"{tmp_path / 'heads.work'}: another process works on this comparison; wait for it"


def test_the_work_folder_is_none_of_gits_business(finished: Path) -> None:
    assert (finished.with_suffix(".work") / ".gitignore").read_text() == "*\n"


def test_a_checkpoint_without_experts_is_taken(tmp_path: Path) -> None:
    """C = 4, experts of 32 channels: 4 x 76 x 32 + 2 (36 x 32 + 4 x 32) = 12288 FLOP, which 162 channels have."""
    save_checkpoint(seeded_source("plain", dataclasses.replace(CONFIG, moe=None)), tmp_path / "plain")
    out = tmp_path / "plain.json"
    result = compare(tmp_path / "plain", out, "--seeds=1")
    assert result.exception is None, result.output
    report = json.loads(out.read_text())
    assert {head["name"]: head["hidden"] for head in report["variants"]} == {
        "single": 32, "wide": 162, "moe4": 32, "moe4-entropy": 32,
    }  # fmt: skip
    assert report["model"]["experts"] is None
    assert report["comparisons"][0]["finding"][-1] == "Of a single seed no difference counts as clear."


def test_a_bundle_and_a_size_that_does_not_fit_are_refused_in_one_line(checkpoint: Path, tmp_path: Path) -> None:
    write_bundle(tmp_path / "bundle")
    result = compare(tmp_path / "bundle", tmp_path / "x.json")
    assert refusal(result) == (
        f"{tmp_path / 'bundle'} is a bundle, which holds no weights to train on; name its checkpoint instead"
    )
    assert isinstance(result.exception, InputError)
    text = refusal(compare(checkpoint, tmp_path / "x.json", "--height=30"))
    assert text == "shape 1x2x30x42: height 30 is not a multiple of the patch size 14; nearest: 28 and 42"
    assert refusal(compare(tmp_path / "none", tmp_path / "x.json")).startswith(f"{tmp_path / 'none'}: no such file")
    assert list(tmp_path.glob("x*")) == []


def test_an_entropy_weight_that_collapses_the_gate_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    result = compare(checkpoint, tmp_path / "x.json", "--entropy-weight=0.001")
    assert result.exit_code == 2
    assert "0.001 is not in the range 0<x<0.001" in result.stderr


def test_the_crop_is_where_most_steps_of_depth_are() -> None:
    """An 8 x 16 view has crops of 3 x 6. Steps: a column of 3 in view 1, fewer or too deep ones elsewhere."""
    depth = np.ones((2, 8, 16))
    depth[0, 2, 3] = 1.2  # too small a step
    depth[0, 5:, 10:] = 9  # more than 3 times as deep
    depth[1, 4:7, 12:] = 2
    depth[1, 0, 0] = 0  # not known
    view, rows, columns = head_pictures.most_edges(depth)
    assert view == 1
    assert (rows.start, rows.stop) in [(3, 6), (4, 7)]
    assert columns.start <= 11 < columns.stop


def test_pictures_show_the_crop_and_equal_clouds_alike() -> None:
    scene = box_scene(height=56, width=84)
    crop = head_pictures.most_edges(scene.truth["depth"])
    blurred = itself(scene)
    blurred["depth"] = blurred["depth"] + np.linspace(0, 1, 84, dtype=np.float32)
    weights = np.zeros((2, 4, 56, 84), np.float32)
    weights[:, 2] = 1
    predictions = {"same": itself(scene, 3.0), "blurred": {**blurred, "expert_weights": weights}}
    edges = head_pictures.edge_sheet(scene, predictions, crop)
    points = head_pictures.point_sheet(scene, predictions, crop)
    height, width = crop.rows.stop - crop.rows.start, crop.columns.stop - crop.columns.start
    factor = -(-220 // width)
    assert edges.shape == (28 + 3 * (height * factor + 6), 4 * (width * factor + 6) + 6, 3)
    expert = edges[-6 - height * factor // 2, -6 - width * factor // 2]
    assert expert.tolist() == [0, 158, 115]  # the third colour of the palette
    assert points.shape == (28 + 2 * 206, 3 * 306 + 6, 3)
    truth, same, other = (points[28:228, 6 + i * 306 : 306 + i * 306] for i in range(3))
    assert len(np.unique(truth.reshape(-1, 3), axis=0)) > 10
    drawn = np.mean(truth != truth[0, 0])
    assert np.mean(truth != same) < 0.1 * drawn
    assert np.mean(truth != other) > 0.3 * drawn

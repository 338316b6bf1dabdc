"""`benchmarks.heads` as a command: its result, going on after a kill, and what it refuses."""

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
from PIL import Image
from trainings import TINY

from moe3d_deploy.benchmarks.environment import without_paths
from moe3d_deploy.benchmarks.heads import __main__ as command
from moe3d_deploy.benchmarks.heads import comparison, work
from moe3d_deploy.benchmarks.heads.variants import Plan, Trial, Variant
from moe3d_deploy.benchmarks.heads.work import WorkFolder, open_work
from moe3d_deploy.checkpoint import save_checkpoint, seeded_source
from moe3d_deploy.config import MoeConfig
from moe3d_deploy.errors import CheckpointError, InputError, Moe3dError
from moe3d_deploy.evaluation.scenes import HELD_OUT
from moe3d_deploy.training import scene_cache

PAGE = (Path(__file__).parent.parent / "docs" / "comparison.md").read_text(encoding="utf-8")
# C = 4: 76 FLOP per channel of a single head, 1840 for 4 experts of 5 channels and a gate of 4; 24 channels have 1824.
CONFIG = dataclasses.replace(TINY, moe=MoeConfig(num_experts=2, hidden_channels=5, gate_hidden_channels=4))
HEADS = ["single", "narrow", "wide", "moe4", "moe4-entropy"]
RATES = (0.002, 0.02)
FLAGS = [
    "--steps=6", "--batch=2", "--scenes=2", "--views=2", "--count=2", "--height=28", "--width=42",
    "--validation-scenes=2", *(f"--learning-rate={rate}" for rate in RATES),
]  # fmt: skip

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
    return CliRunner().invoke(command.main, [str(checkpoint), "--out", str(out), "--seeds=2", *FLAGS, *more])


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
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[Trial]:
    """What is trained from now on."""
    seen: list[Trial] = []
    real = comparison.train_heads

    def train_heads(trials: Sequence[Trial], *rest: Any) -> None:
        seen.extend(trials)
        real(trials, *rest)

    monkeypatch.setattr(comparison, "train_heads", train_heads)
    return seen


def trial_of(finished: Path, seed: int, head: str) -> Trial:
    """One of a finished comparison that was judged on the held-out scenes."""
    report = json.loads(finished.read_text())
    (variant,) = (Variant(**{field.name: values[field.name] for field in dataclasses.fields(Variant)})
                  for values in report["variants"] if values["name"] == head)  # fmt: skip
    return Trial("l2", seed, variant, report["comparisons"][0]["rates"][head]["chosen"])


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def documented(start: str) -> set[str]:
    """The keys that the page names for this part of the result."""
    (row,) = re.findall(rf"^\| `{start}` \| (.*) \|$", PAGE.partition("## The result")[2], re.MULTILINE)
    return set(re.findall(r"`(\w+)`", row))


def test_the_result_has_its_documented_form(finished: Path) -> None:
    report = json.loads(finished.read_text())
    rows = re.findall(r"^\| `(\w+)` \|", PAGE.partition("## The result")[2].partition("Of a")[0], re.MULTILINE)
    assert set(report) == set(rows)
    for key in ("model", "plan", "pictures"):
        assert report[key].keys() == documented(key)
    assert [head["name"] for head in report["variants"]] == HEADS
    assert all(head.keys() == documented("variants") for head in report["variants"])
    assert report["model"]["experts"] == 2
    assert (report["plan"]["seeds"], report["plan"]["learning_rates"]) == (2, list(RATES))

    (found,) = report["comparisons"]
    assert found.keys() == documented("comparisons")
    assert found["loss"] == "l2"
    assert list(found["training"]) == list(found["rates"]) == HEADS
    for rates in found["rates"].values():
        assert [rate["learning_rate"] for rate in rates["tried"]] == list(RATES)
        assert rates["chosen"] == min(rates["tried"], key=lambda rate: rate["abs_rel"])["learning_rate"]
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
        assert {name: list(heads) for name, heads in differences.items()} == {
            name: HEADS[number + 1 :] for number, name in enumerate(HEADS[:-1])
        }
        change = differences["single"]["moe4"]["abs_rel"]
        assert change.keys() == documented("differences")
        means = (quality[head]["abs_rel"]["mean"] for head in ("moe4", "single"))
        assert change["change"] == pytest.approx(next(means) - next(means))
    assert len(found["finding"]) == 11


def test_single_and_experts_cost_as_many_flops(finished: Path) -> None:
    flops = {head["name"]: head["flops_per_pixel"] for head in json.loads(finished.read_text())["variants"]}
    assert (flops["wide"], flops["moe4"], flops["moe4-entropy"]) == (1824, 1840, 1840)
    assert flops["single"] == 76 * 32


def test_the_result_names_no_folder_of_a_machine(finished: Path) -> None:
    text = finished.read_text()
    assert without_paths(text) == text


def test_pictures_lie_beside_the_result_and_are_small(finished: Path) -> None:
    for name in comparison.PICTURES:
        file = finished.parent / name
        assert file.stat().st_size < 300_000
        assert Image.open(file).width > 1000
    assert json.loads(finished.read_text())["pictures"]["files"] == list(comparison.PICTURES)


def test_a_finished_comparison_trains_nothing_again(
    finished: Path, checkpoint: Path, tmp_path: Path, trainings: list[Trial]
) -> None:
    out = copied(finished, tmp_path / "again")
    out.unlink()
    result = compare(checkpoint, out)
    assert result.exception is None, result.output
    assert trainings == []
    assert measured(out) == measured(finished)
    assert "heads        10 of 10 are trained" in result.stderr


@pytest.mark.parametrize(("method", "calls"), [("save", 4), ("save", 12), ("save_scores", 13)])
def test_a_killed_run_goes_on_with_what_is_missing(
    finished: Path, checkpoint: Path, tmp_path: Path, trainings: list[Trial], monkeypatch: pytest.MonkeyPatch,
    method: str, calls: int,
) -> None:  # fmt: skip
    """Killed while learning rates are tried (10 heads), the second seed trained (5) and the first split saved (10 after
    10 of validation): what comes out is equal to a run in one go, and no head is trained twice.
    """
    out = tmp_path / "heads.json"
    done: list[Any] = []
    real = getattr(WorkFolder, method)

    def interrupted(self: WorkFolder, *what: Any) -> None:
        if len(done) == calls:
            raise KeyboardInterrupt
        done.append(what[0])
        real(self, *what)

    monkeypatch.setattr(WorkFolder, method, interrupted)
    assert compare(checkpoint, out).exit_code != 0
    assert not out.exists()
    kept = {path.stem for path in out.with_suffix(".work").glob("*.safetensors")}
    monkeypatch.setattr(WorkFolder, method, real)
    trainings.clear()
    assert compare(checkpoint, out).exception is None
    assert kept.isdisjoint(map(str, trainings))
    assert len(kept) + len(trainings) == 15
    assert measured(out) == measured(finished)
    assert files(out.with_suffix(".work")) == files(finished.with_suffix(".work"))


def test_figures_of_a_split_are_kept_before_the_next_is_judged(
    finished: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copied(finished, tmp_path / "again")
    for file in out.with_suffix(".work").glob("*.test-*.json"):
        file.unlink()
    real = comparison.rendered_scenes

    def rendered_scenes(seeds: Any, *, split: str, **options: Any) -> Any:
        if split == "test-kinds":
            raise KeyboardInterrupt
        return real(seeds, split=split, **options)

    monkeypatch.setattr(comparison, "rendered_scenes", rendered_scenes)
    assert compare(checkpoint, out).exit_code != 0
    assert len(list(out.with_suffix(".work").glob("*.test-seeds.json"))) == 10


def test_rates_are_chosen_on_scenes_that_are_not_judged(
    checkpoint: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copied(finished, tmp_path / "again")
    for file in out.with_suffix(".work").glob("*.json"):
        if file.name != "plan.json":
            file.unlink()
    seen: dict[tuple[str, int], int] = {}
    real = comparison.rendered_scenes

    def rendered_scenes(seeds: range, *, split: str, **options: Any) -> Any:
        seen[split, seeds.start] = len(seeds)
        return real(seeds, split=split, **options)

    monkeypatch.setattr(comparison, "rendered_scenes", rendered_scenes)
    assert compare(checkpoint, out).exception is None
    assert seen == {("test-seeds", 1_000_000): 2, ("test-seeds", 0): 2, ("test-kinds", 0): 2}
    assert measured(out) == measured(finished)


def test_a_further_rate_trains_the_first_seed_and_changes_the_choice_if_it_is_better(
    finished: Path, checkpoint: Path, tmp_path: Path, trainings: list[Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third rate is made the best of `wide` alone: only that head's other seed is trained anew."""
    out = copied(finished, tmp_path / "again")
    real = comparison.judge

    def judge(model: Any, heads: Any, *rest: Any) -> Any:
        found = real(model, heads, *rest)
        for name, scenes in found.items():
            if "rate0.006" in name:
                for scene in scenes.values():
                    scene["abs_rel"] = 1e-6 if "wide" in name else 9.0
        return found

    monkeypatch.setattr(comparison, "judge", judge)
    assert compare(checkpoint, out, "--learning-rate=0.006").exception is None
    assert [(trial.seed, trial.variant.name, trial.learning_rate) for trial in trainings] == [
        *((0, name, 0.006) for name in HEADS), (1, "wide", 0.006),
    ]  # fmt: skip
    before, after = (json.loads(file.read_text())["comparisons"][0] for file in (finished, out))
    assert {name for name in HEADS if before["rates"][name]["chosen"] != after["rates"][name]["chosen"]} == {"wide"}
    assert after["quality"]["test-seeds"]["moe4"] == before["quality"]["test-seeds"]["moe4"]


def test_heads_without_figures_are_judged_alone(
    finished: Path, checkpoint: Path, tmp_path: Path, trainings: list[Trial]
) -> None:
    out = copied(finished, tmp_path / "again")
    (out.with_suffix(".work") / f"{trial_of(finished, 1, 'moe4')}.test-kinds.json").unlink()
    result = compare(checkpoint, out)
    assert trainings == []
    assert re.findall("^judged .*heads on .* of ([^,]*)", result.stderr, re.MULTILINE) == ["test-kinds"]
    assert "judged       1 heads on 2 scenes of test-kinds" in result.stderr
    assert measured(out) == measured(finished)


def test_another_loss_is_added_to_what_is_there(
    finished: Path, checkpoint: Path, tmp_path: Path, trainings: list[Trial]
) -> None:
    out = copied(finished, tmp_path / "again")
    assert compare(checkpoint, out, "--loss=l2", "--loss=log", "--loss=l2").exception is None
    assert {trial.loss for trial in trainings} == {"log"}
    assert len(trainings) == 15
    found = json.loads(out.read_text())["comparisons"]
    assert [comparison["loss"] for comparison in found] == ["l2", "log"]
    assert found[0] == json.loads(finished.read_text())["comparisons"][0]
    assert found[1]["training"]["single"]["depth"] != found[0]["training"]["single"]["depth"]


def test_a_folder_of_another_comparison_is_refused(finished: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = copied(finished, tmp_path / "again")
    work = out.with_suffix(".work")
    assert refusal(compare(checkpoint, out, "--batch=1")) == (
        f"{work} is of a comparison with another batch (2, not 1); choose another --workdir, or remove it to start anew"
    )
    other = tmp_path / "other"
    save_checkpoint(seeded_source("small", CONFIG, 5), other)
    assert refusal(compare(other, out)).startswith(f"{work} is of a comparison with another checkpoint; choose")
    (work / "plan.json").unlink()
    assert refusal(compare(checkpoint, out)).startswith(f"{work} holds something else than a comparison of heads")


def test_a_damaged_head_is_named(finished: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = copied(finished, tmp_path / "again")
    file = out.with_suffix(".work") / f"{trial_of(finished, 0, 'wide')}.safetensors"
    other = file.with_name(f"{trial_of(finished, 0, 'moe4')}.safetensors")
    for data in (file.read_bytes()[:-9], other.read_bytes()):
        file.write_bytes(data)
        result = compare(checkpoint, out)
        assert isinstance(result.exception, CheckpointError)
        assert refusal(result) == f"{file}: not a head of wide; remove it to train that again"
    figures = file.with_suffix(".test-seeds.json")
    figures.write_text("{")
    file.write_bytes((finished.with_suffix(".work") / file.name).read_bytes())
    assert refusal(compare(checkpoint, out)).startswith(f"{figures}: is not JSON")


def test_a_folder_that_another_process_works_in_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with open_work(tmp_path / "heads.work", Plan(), "0" * 64):
        text = refusal(compare(checkpoint, tmp_path / "heads.json"))
    assert text == f"{tmp_path / 'heads.work'}: another process works on this comparison; wait for it"


def test_a_stream_that_would_block_is_not_taken_for_another_process(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError, match=r"^stderr$"), open_work(tmp_path / "heads.work", Plan(), "0" * 64):
        raise BlockingIOError("stderr")


def test_work_on_scenes_of_another_generator_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_work(tmp_path / "heads.work", Plan(), "0" * 64):
        pass
    monkeypatch.setattr(work, "GENERATOR_VERSION", 99)
    with (
        pytest.raises(InputError, match=r"of a comparison with another generator \(\d+, not 99\)"),
        open_work(tmp_path / "heads.work", Plan(), "0" * 64),
    ):
        pass


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
    finding = report["comparisons"][0]["finding"]
    assert "Of a single seed no difference counts as clear." in finding
    assert any("trained jointly with the model's own single head" in sentence for sentence in finding)


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

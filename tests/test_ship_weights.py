"""A trained checkpoint to package data: what is checked, what the JSON says, and that a failure changes nothing."""

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import LEAST, NORM, write_folder
from trained_weights import small_preset, trained_checkpoint

from moe3d_deploy import shipped_weights
from moe3d_deploy.benchmarks import ship_weights
from moe3d_deploy.checkpoint import open_checkpoint, save_checkpoint, seeded_source
from moe3d_deploy.cli.main import finish
from moe3d_deploy.config import PRESETS
from moe3d_deploy.errors import CheckpointError
from moe3d_deploy.evaluation import Change, Comparison, evaluate, rendered_scene
from moe3d_deploy.files import sha256_file
from moe3d_deploy.runtime.session import Session
from moe3d_deploy.training.options import TrainOptions
from moe3d_deploy.training.trainee import FROM_SCRATCH_LICENCE
from moe3d_deploy.weight_sources import VGGT_LICENCE


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package's folder of weights, which does not exist yet."""
    small_preset(tmp_path / "weights", monkeypatch)
    return tmp_path / "weights"


def ship(checkpoint: Path, *more: str | Path) -> int:
    return finish("ship-weights", lambda: ship_weights.main, [str(checkpoint), "--judge", "1", *map(str, more)])


def facts(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "moe3d-tiny.json").read_text())


def test_both_files_are_written_and_are_what_the_preset_means(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = trained_checkpoint(tmp_path / "run" / "checkpoint")

    assert ship(checkpoint) == 0

    assert sorted(path.name for path in folder.iterdir()) == ["moe3d-tiny.json", "moe3d-tiny.safetensors"]
    shipped, trained = open_checkpoint("moe3d-tiny"), open_checkpoint(checkpoint)
    assert {shipped.tensor(name).dtype for name in shipped.shapes()} == {torch.float16}
    assert shipped.shapes() == trained.shapes()
    told = facts(folder)
    assert told["sha256"] == shipped.sha256() == sha256_file(folder / "moe3d-tiny.safetensors")
    assert told["bytes"] == (folder / "moe3d-tiny.safetensors").stat().st_size
    assert told["parameters"] == sum(trained.tensor(name).numel() for name in trained.shapes())
    assert told["training"].pop("machine")
    assert told["training"] == {"checkpoint": {"origin": "checkpoint", "sha256": trained.sha256()}, "phases": []}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "checkpoint   checkpoint (checkpoint)"
    assert lines[2].startswith("judged       AbsRel ")
    assert lines[2].endswith(", float32 to float16 on 1 scenes of test-seeds")
    assert lines[3] == f"written      moe3d-tiny.safetensors, {told['bytes'] / 1e6:.2f} MB float16, and moe3d-tiny.json"
    assert lines[4] == "next         moe3d-export moe3d-tiny -o bundle --verify-quality"


def test_what_rounding_moves_is_told(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """float16 has steps of 2^-10 above 1, so 1 + 2^-13 becomes 1; steps of 2^-24 near 0, so 2^-26 becomes 0."""
    lost = torch.full_like(open_checkpoint("moe3d-tiny").tensor(NORM), 2.0**-26)
    exact = {f"camera_head.{name}_norm.bias": torch.zeros_like(lost) for name in ("token", "trunk")}
    near = {"camera_head.trunk_norm.weight": torch.full_like(lost, 1 + 2.0**-13)}
    checkpoint = open_checkpoint(trained_checkpoint(tmp_path / "a", {NORM: lost, **exact, **near}))

    moved = ship_weights.ship(checkpoint, {})

    assert moved[NORM] == 1
    assert moved["camera_head.trunk_norm.weight"] == pytest.approx(2.0**-13 / (1 + 2.0**-13))
    assert [moved[name] for name in exact] == [0, 0]
    assert facts(folder)["rounding"] == {"largest": 1, "mean": pytest.approx(sum(moved.values()) / len(moved))}
    assert ship(tmp_path / "a") == 0
    assert f"rounding     most in {NORM} 1.0e+00, " in capsys.readouterr().out


def test_what_float16_changes_on_held_out_scenes_is_in_the_facts(folder: Path, tmp_path: Path) -> None:
    """The figures are those of the evaluation of the checkpoint and of the shipped weights."""
    checkpoint = trained_checkpoint(tmp_path / "checkpoint")
    assert ship(checkpoint, "--judge", "2") == 0
    told = facts(folder)["rounding"]["quality"]
    assert (told["split"], told["scenes"], told["views"]) == ("test-seeds", 2, 4)
    assert set(told["changes"]) <= {"abs_rel", "delta1", "boundary_f1"}
    scenes = [rendered_scene(seed, split="test-seeds", views=4, height=21, width=28) for seed in range(2)]
    for name, source in (("reference", checkpoint), ("found", "moe3d-tiny")):
        expected = evaluate(Session.open(source).run, scenes, points=False).summary()
        for key, change in told["changes"].items():
            assert change[name] == pytest.approx(expected[key].mean, rel=1e-5), (name, key)
    assert 0 < told["changes"]["abs_rel"]["typical"] < 0.01


def test_weights_that_float16_changes_too_much_are_not_shipped(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the experts' two layers the first has weights of 1e-7, in float16 steps of 6e-8, and the second makes up.

    AbsRel of a model that has learnt nothing hardly moves, so the limit is a hundredth of the real one.
    """
    monkeypatch.setattr(ship_weights, "LARGEST_CHANGE", 1e-4)
    assert ship(trained_checkpoint(tmp_path / "plain")) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    capsys.readouterr()
    checkpoint, changed = open_checkpoint(trained_checkpoint(tmp_path / "whole")), {}
    for layer, factor in (("0.weight", 1e-6), ("0.bias", 1e-6), ("2.weight", 1e5)):
        for name in (f"depth_head.experts.{k}.{layer}" for k in range(4)):
            changed[name] = checkpoint.tensor(name) * factor
    path = trained_checkpoint(tmp_path / "checkpoint", changed)

    assert ship(path) == 2

    error = capsys.readouterr().err
    assert error.startswith("ship-weights: checkpoint: float16 changes AbsRel by more than 0.01 % per scene (AbsRel ")
    assert error.endswith("it loses digits of weights below 6e-5, look for these\n")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(("typical", "refused"), [(0.0099, False), (0.0101, True), (float("nan"), True)])
def test_the_limit_of_what_float16_may_change(typical: float, refused: bool, tmp_path: Path) -> None:
    source = open_checkpoint(trained_checkpoint(tmp_path / "checkpoint"))
    change = Comparison(16, {"abs_rel": Change(0.08, 0.08, 0.0, -0.001, 0.001, typical)}, None)
    with (
        pytest.raises(CheckpointError, match="float16 changes AbsRel by more than 1 % per scene")
        if refused
        else nullcontext()
    ):
        ship_weights.require_small(source, change)


@pytest.mark.parametrize("key", ["phases", "checkpoint"])
def test_facts_cannot_take_the_place_of_what_is_known(
    key: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps({"hours": 9, key: {"steps": 1}}))

    assert ship(trained_checkpoint(tmp_path / "checkpoint"), "--facts", path) == 2

    assert capsys.readouterr().err == (
        f"ship-weights: {path}: '{key}' is what this command says of the training itself; name it otherwise\n"
    )
    assert not folder.exists()


@pytest.mark.parametrize("licence", ["Apache-2.0", shipped_weights.LICENCE])
def test_weights_under_the_licence_of_the_package_are_shipped(licence: str, folder: Path, tmp_path: Path) -> None:
    assert ship(trained_checkpoint(tmp_path / "checkpoint", licence=licence)) == 0
    assert facts(folder)["licence"] == shipped_weights.LICENCE


def test_the_runs_phase_and_the_given_facts_are_kept_without_folders(folder: Path, tmp_path: Path) -> None:
    checkpoint = trained_checkpoint(tmp_path / "run" / "checkpoint")
    options = TrainOptions("/srv/somebody/tiny", steps=3, shapes=((126, 168),), scene_cache="/srv/somebody/pool")
    (tmp_path / "run" / "options.json").write_text(options.to_json())
    line = {"kind": "step", "step": 3, "samples": 12, "samples_per_second": 2.0}
    (tmp_path / "run" / "train.jsonl").write_text(json.dumps(line) + "\n")
    (tmp_path / "facts.json").write_text('{"hours": 9.5, "machine": "2 cores", "commands": ["/srv/bin/moe3d train"]}')

    assert ship(checkpoint, "--phase", tmp_path / "run", "--facts", tmp_path / "facts.json") == 0

    training = facts(folder)["training"]
    (phase,) = training["phases"]
    assert (phase["steps"], phase["samples"], phase["seconds"]) == (3, 12, 6)
    assert phase["options"] == options.to_dict() | {"source": "tiny", "scene_cache": "pool"}
    assert (training["hours"], training["machine"], training["commands"]) == (9.5, "2 cores", ["moe3d train"])
    assert training["checkpoint"]["origin"] == "checkpoint"


def test_new_weights_replace_the_old_ones(folder: Path, tmp_path: Path) -> None:
    assert ship(trained_checkpoint(tmp_path / "a")) == 0
    before = facts(folder)["sha256"]
    ones = torch.ones_like(open_checkpoint("moe3d-tiny").tensor(NORM)).float()

    assert ship(trained_checkpoint(tmp_path / "b", {NORM: ones})) == 0

    assert facts(folder)["sha256"] != before
    assert torch.equal(open_checkpoint("moe3d-tiny").tensor(NORM), ones.half())


def _too_large(folder: Path) -> Path:
    norm = seeded_source("run", LEAST).tensor(NORM)
    return trained_checkpoint(folder, {NORM: torch.full_like(norm, 65520.0)})  # the first that rounds to infinity


def _of_another_config(folder: Path) -> Path:
    assert LEAST.moe is not None
    config = dataclasses.replace(LEAST, moe=dataclasses.replace(LEAST.moe, temperature=2.0))
    source = open_checkpoint(trained_checkpoint(folder / "same"))
    return write_folder(folder, {name: source.tensor(name) for name in source.shapes()}, config)


def _of_vggt(folder: Path) -> Path:
    return trained_checkpoint(folder, licence=None)


def _of_no_licence(folder: Path) -> Path:
    return trained_checkpoint(folder, licence=FROM_SCRATCH_LICENCE)


def _of_a_likeness(folder: Path) -> Path:
    return trained_checkpoint(folder, licence="Apache-2.0-like")


def _seeded(folder: Path) -> Path:
    save_checkpoint(seeded_source("moe3d-tiny", PRESETS["moe3d-tiny"]), folder)
    return folder


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_too_large, f"checkpoint: tensor '{NORM}' reaches 6.55e+04, which float16 cannot hold"),
        (_of_another_config, "checkpoint is no moe3d-tiny: moe.temperature is 2.0, not 1.0; train the preset's own"),
        (_of_vggt, f"checkpoint has another licence than the package, Apache-2.0: {VGGT_LICENCE}; where you may"),
        (_of_no_licence, f"checkpoint has another licence than the package, Apache-2.0: {FROM_SCRATCH_LICENCE}; where "
         "you may give it out under that one, resume the run with --licence Apache-2.0"),
        (_of_a_likeness, "checkpoint has another licence than the package, Apache-2.0: Apache-2.0-like; "),
        (_seeded, "checkpoint holds seeded random weights (preset:moe3d-tiny seed 0); name trained ones"),
    ],
)  # fmt: skip
def test_what_cannot_be_shipped_is_refused_and_what_was_there_stays(
    folder: Path, tmp_path: Path, make: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ship(trained_checkpoint(tmp_path / "good")) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    assert ship(make(tmp_path / "run" / "checkpoint")) == 2

    assert f"ship-weights: {message}" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_more_than_the_package_may_hold_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shipped_weights.LARGEST_BYTES == 12_000_000
    monkeypatch.setattr(shipped_weights, "LARGEST_BYTES", 1_000_000)

    assert ship(trained_checkpoint(tmp_path / "checkpoint")) == 2

    assert " MB in float16; 1 MB may be shipped" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


def test_a_full_disk_leaves_what_was_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ship(trained_checkpoint(tmp_path / "a")) == 0
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(path: Path) -> str:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(ship_weights, "sha256_file", full)
    assert ship(trained_checkpoint(tmp_path / "b")) == 1

    assert "No space left on device" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("text", "problem"),
    [("[1]", "expected a JSON object, got list"), ("{", "is not JSON"), (None, "cannot be read (No such file")],
)
def test_facts_that_are_no_json_object_are_refused(
    folder: Path, tmp_path: Path, text: str | None, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "facts.json"
    if text is not None:
        path.write_text(text)

    assert ship(trained_checkpoint(tmp_path / "checkpoint"), "--facts", path) == 2

    assert f"ship-weights: {path}: {problem}" in capsys.readouterr().err
    assert not folder.exists()


def test_the_preset_itself_fits_into_what_may_be_shipped() -> None:
    """Two bytes for each of 5.5 M parameters, and 64 KiB for the header, which holds 329 names."""
    shapes = open_checkpoint("moe3d-tiny", seed=0).shapes()
    assert 2 * sum(torch.Size(shape).numel() for shape in shapes.values()) + (64 << 10) < 12e6

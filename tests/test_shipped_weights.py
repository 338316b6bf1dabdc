"""The preset with trained weights in the package: which weights a seed or none means, and files that are damaged."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import LEAST
from manifests import example_manifest
from trained_weights import ship_small, small_preset

from moe3d_deploy.checkpoint import load_model, open_checkpoint
from moe3d_deploy.cli.inspect import report
from moe3d_deploy.cli.main import export_main, main
from moe3d_deploy.config import PRESETS
from moe3d_deploy.errors import CheckpointError
from moe3d_deploy.export.source import SourceSpec
from moe3d_deploy.files import sha256_file
from moe3d_deploy.manifest import Checkpoint
from moe3d_deploy.runtime.session import Session
from moe3d_deploy.shipped_weights import FOLDER

BIAS = "depth_head.gate.2.bias"
ORIGIN = "preset:moe3d-tiny trained weights"
LICENCE = "Apache-2.0, trained by this project on procedural scenes, see docs/model_card.md"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package's folder of weights, with those of a small moe3d-tiny."""
    ship_small(tmp_path, monkeypatch)
    return tmp_path / "weights"


def test_no_seed_gives_the_trained_weights_as_they_are_stored(folder: Path) -> None:
    source = open_checkpoint("moe3d-tiny")

    assert (source.name, source.origin, source.licence) == ("moe3d-tiny", ORIGIN, LICENCE)
    assert source.config == PRESETS["moe3d-tiny"]
    assert source.sha256() == sha256_file(folder / "moe3d-tiny.safetensors")
    trained = open_checkpoint(folder.parent / "run" / "checkpoint")
    for name in trained.shapes():
        assert torch.equal(source.tensor(name), trained.tensor(name).half()), name
    model = load_model(source)
    assert torch.equal(model.depth_head.gate[2].bias, trained.tensor(BIAS).half().float())


@pytest.mark.parametrize("seed", [0, 3])
def test_any_seed_gives_seeded_random_weights(folder: Path, seed: int) -> None:
    source = open_checkpoint("preset:moe3d-tiny", seed=seed)

    assert (source.origin, source.licence) == (f"preset:moe3d-tiny seed {seed}", "seeded random weights, no licence")
    assert not torch.equal(source.tensor(BIAS), open_checkpoint("moe3d-tiny").tensor(BIAS).float())


def test_without_trained_weights_no_seed_means_seed_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_preset(tmp_path / "weights", monkeypatch)

    for folder_is_there in (False, True):
        if folder_is_there:
            (tmp_path / "weights").mkdir()
        source = open_checkpoint("moe3d-tiny")
        assert source.origin == "preset:moe3d-tiny seed 0"
        assert torch.equal(source.tensor(BIAS), open_checkpoint("moe3d-tiny", seed=0).tensor(BIAS))


def test_the_large_presets_have_no_trained_weights(folder: Path) -> None:
    for name in ("vggt-1b", "moe3d-1b"):
        assert open_checkpoint(name).origin == f"preset:{name} seed 0"


def test_an_export_and_a_session_take_the_same_weights(folder: Path) -> None:
    assert SourceSpec("moe3d-tiny").open().origin == ORIGIN
    assert SourceSpec("moe3d-tiny", 0).open().origin == "preset:moe3d-tiny seed 0"
    images = np.linspace(0, 1, 2 * 3 * 14 * 21, dtype=np.float32).reshape(2, 3, 14, 21)
    with torch.inference_mode():
        expected = load_model(open_checkpoint("moe3d-tiny"))(torch.from_numpy(images)[None])["depth"][0]

    found, seeded = (Session.open("moe3d-tiny", seed=seed).run(images)["depth"] for seed in (None, 0))

    np.testing.assert_array_equal(found, expected)
    assert not np.allclose(found, seeded)


def _spoil_weights(folder: Path) -> None:
    path = folder / "moe3d-tiny.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


def _spoil_facts(change: dict[str, object]) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / "moe3d-tiny.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (_spoil_weights, "moe3d-tiny.safetensors has another sha256 than moe3d-tiny.json says"),
        (lambda f: (f / "moe3d-tiny.safetensors").unlink(), "moe3d-tiny.safetensors is missing"),
        (lambda f: (f / "moe3d-tiny.json").unlink(), "moe3d-tiny.json is missing"),
        (lambda f: (f / "moe3d-tiny.json").write_text("{"), "moe3d-tiny.json is not JSON: "),
        (lambda f: (f / "moe3d-tiny.json").write_text("[]"), "moe3d-tiny.json lacks one of origin, licence, sha256, "),
        (_spoil_facts({"licence": None}), "moe3d-tiny.json lacks one of origin, licence, sha256, training"),
        (_spoil_facts({"sha256": "0" * 64}), "moe3d-tiny.safetensors has another sha256 than moe3d-tiny.json says"),
    ],
)
def test_damaged_weights_are_one_line_that_says_how_to_get_whole_ones(
    folder: Path, spoil: Callable[[Path], object], problem: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    spoil(folder)

    assert main(["convert", "moe3d-tiny", "-o", str(tmp_path / "out")]) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"moe3d: the trained weights of moe3d-tiny in this installation are damaged ({problem}")
    assert line.endswith("); install moe3d-deploy again, or use seeded random weights with seed 0")
    assert open_checkpoint("moe3d-tiny", seed=0).origin == "preset:moe3d-tiny seed 0"  # nor does it read the files


def test_weights_of_another_model_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert LEAST.moe is not None
    other = dataclasses.replace(LEAST, moe=dataclasses.replace(LEAST.moe, hidden_channels=8))
    monkeypatch.setitem(PRESETS, "moe3d-tiny", other)

    with pytest.raises(CheckpointError, match=r"moe3d-tiny\.safetensors: .*moe\.hidden_channels"):
        open_checkpoint("moe3d-tiny")


def test_convert_prints_origin_and_licence_and_hands_them_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", "moe3d-tiny", "-o", str(tmp_path / "out")]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"checkpoint   moe3d-tiny ({ORIGIN})", f"licence      {LICENCE}"]
    written = open_checkpoint(tmp_path / "out")
    assert (written.origin, written.licence) == (ORIGIN, LICENCE)


def test_convert_with_a_seed_writes_seeded_weights(folder: Path, tmp_path: Path) -> None:
    assert main(["convert", "moe3d-tiny", "-o", str(tmp_path / "out"), "--seed", "0"]) == 0

    assert open_checkpoint(tmp_path / "out").origin == "preset:moe3d-tiny seed 0"


@pytest.mark.parametrize(
    ("flags", "lines"),
    [
        ([], [f"checkpoint   {ORIGIN}, ", f"licence      {LICENCE}"]),
        (
            ["--seed", "0"],
            ["checkpoint   preset:moe3d-tiny seed 0, ", "licence      seeded random weights, no licence"],
        ),
    ],
)
def test_export_prints_origin_and_licence_before_it_starts(
    folder: Path, tmp_path: Path, flags: list[str], lines: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A profile that does not fit ends the command right after these lines."""
    assert export_main(["moe3d-tiny", "-o", str(tmp_path / "out"), "--height", "10", *flags]) == 2

    printed = capsys.readouterr().err.splitlines()
    assert printed[0].startswith(lines[0])
    assert printed[1] == lines[1]


def test_inspect_prints_origin_digest_and_licence_of_a_bundle() -> None:
    manifest = dataclasses.replace(example_manifest(), checkpoint=Checkpoint(ORIGIN, "a" * 64, LICENCE))

    text = "\n".join(report("bundle", "checked", manifest, {}))

    assert f"checkpoint    {ORIGIN}\n              sha256 {'a' * 64}\nlicence       {LICENCE}\n" in text


def test_the_packages_own_weights_are_whole_finite_and_small() -> None:
    source = open_checkpoint("moe3d-tiny")

    assert (source.origin, source.licence) == (ORIGIN, LICENCE)
    for name in source.shapes():
        assert source.tensor(name).isfinite().all(), name
        assert source.tensor(name).dtype == torch.float16
    assert (FOLDER / "moe3d-tiny.safetensors").stat().st_size <= 12e6

"""Saving checkpoints: what is written opens as what it was, and a failure leaves what was there."""

import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from moe3d_deploy.checkpoint import (
    WeightSource,
    convert_to_moe,
    load_model,
    open_checkpoint,
    save_checkpoint,
    seeded_source,
)
from moe3d_deploy.config import ModelConfig
from moe3d_deploy.errors import CheckpointError
from moe3d_deploy.files import exclusive_lock

NORM = "camera_head.token_norm.weight"


@pytest.fixture(scope="module")
def small(data_dir: Path) -> WeightSource:
    """Seeded weights of the golden files' model."""
    config = json.loads(str(np.load(data_dir / "golden_tiny_1x2x3x56x56.npz")["config"]))
    return seeded_source("small", ModelConfig.from_dict(config))


@pytest.fixture
def folder(small: WeightSource, tmp_path: Path) -> Path:
    """A checkpoint folder of `small`."""
    save_checkpoint(small, tmp_path / "small")
    return tmp_path / "small"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_saved_checkpoint_opens_as_what_it_was(small: WeightSource, tmp_path: Path, dtype: torch.dtype) -> None:
    save_checkpoint(small, tmp_path / "copy", dtype=dtype)
    copy = open_checkpoint(tmp_path / "copy")

    assert (copy.config, copy.name) == (small.config, "copy")
    assert (copy.licence, copy.origin) == (small.licence, small.origin)
    assert list(copy.shapes().items()) == list(small.shapes().items())
    assert all(torch.equal(copy.tensor(name), small.tensor(name).to(dtype)) for name in small.shapes())
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_dtype_load_as_float32(small: WeightSource, folder: Path, dtype: torch.dtype) -> None:
    save_checkpoint(small, folder, dtype=dtype, overwrite=True)
    source = open_checkpoint(folder)

    assert source.tensor(NORM).dtype == dtype
    assert torch.equal(load_model(source).state_dict()[NORM], small.tensor(NORM).to(dtype).float())


def test_the_digest_is_that_of_the_weights_file(folder: Path) -> None:
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes())

    assert open_checkpoint(folder).sha256() == digest.hexdigest()


def test_a_checkpoint_is_replaced_only_when_asked(small: WeightSource, folder: Path) -> None:
    other = seeded_source("other", small.config, seed=1)

    with pytest.raises(CheckpointError, match=r"config\.json exists already; choose another folder or ask to"):
        save_checkpoint(other, folder)
    assert torch.equal(open_checkpoint(folder).tensor(NORM), small.tensor(NORM))
    save_checkpoint(other, folder, overwrite=True)
    assert torch.equal(open_checkpoint(folder).tensor(NORM), other.tensor(NORM))


def test_a_checkpoint_can_be_written_over_its_own_source(small: WeightSource, folder: Path) -> None:
    save_checkpoint(open_checkpoint(folder), folder, dtype=torch.float16, overwrite=True)

    assert torch.equal(open_checkpoint(folder).tensor(NORM), small.tensor(NORM).half())


def test_values_beyond_the_dtype_are_refused(small: WeightSource, folder: Path) -> None:
    noisy = convert_to_moe(small, noise=1e9)

    with pytest.raises(CheckpointError, match=r"'depth_head\.experts\.0\.0\.weight' reaches .*, too large for"):
        save_checkpoint(noisy, folder, dtype=torch.float16, overwrite=True)
    assert open_checkpoint(folder).config.moe is None


def test_a_failed_save_leaves_the_old_checkpoint_and_nothing_else(small: WeightSource, folder: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def full_disk(count: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(small, folder, overwrite=True, progress=full_disk)

    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("full_at", ["model", "config"])
def test_a_disk_that_is_full_at_the_sync_leaves_the_old_checkpoint(
    small: WeightSource, folder: Path, monkeypatch: pytest.MonkeyPatch, full_at: str
) -> None:
    """A write may succeed in memory, and only the sync say that the disk has no room."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    fsync = os.fsync

    def full_disk(descriptor: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).name.startswith(f".{full_at}.partial"):
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(seeded_source("other", small.config, seed=1), folder, overwrite=True)

    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_save_stopped_between_its_two_files_leaves_no_config_of_other_weights(
    small: WeightSource, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def stop_before_config(source: Path, target: Path) -> None:
        if target.name == "config.json":
            raise OSError(5, "Input/output error")
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop_before_config)
    with pytest.raises(OSError, match="Input/output error"):
        save_checkpoint(small, folder, overwrite=True)

    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors"]
    with pytest.raises(CheckpointError, match=r"no config\.json, and no preset has its sizes"):
        open_checkpoint(folder)


def test_weights_whose_config_has_not_got_its_name_are_refused(folder: Path) -> None:
    """A writer killed between its two renames; the sizes alone would not tell the heads and the temperature."""
    (folder / "config.json").rename(folder / ".config.partial-0123abcd.json")

    with pytest.raises(
        CheckpointError, match=r"its writer was killed .*; rename \.config\.partial-0123abcd\.json to it"
    ):
        open_checkpoint(folder)


def test_one_process_writes_at_a_time(small: WeightSource, folder: Path) -> None:
    with (
        exclusive_lock(folder / ".checkpoint.lock"),
        pytest.raises(CheckpointError, match=r"small is being written by another process; wait until it has ended"),
    ):
        save_checkpoint(small, folder, overwrite=True)


def test_what_a_killed_writer_left_is_cleared_and_nothing_else(small: WeightSource, folder: Path) -> None:
    kept = [".model.partial-0123abcd.onnx", ".notes.partial-0123abcd.json", "model.partial-0123abcd.safetensors"]
    left = [".model.partial-0123abcd.safetensors", ".config.partial-89abcdef.json", ".checkpoint.lock"]
    for name in kept + left:
        (folder / name).touch()

    save_checkpoint(small, folder, overwrite=True)

    assert sorted(path.name for path in folder.iterdir()) == sorted([*kept, "config.json", "model.safetensors"])


def test_a_failed_save_leaves_no_new_folder_behind(small: WeightSource, tmp_path: Path) -> None:
    def full_disk(count: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(small, tmp_path / "new", progress=full_disk)
    assert not (tmp_path / "new").exists()


def test_a_file_or_a_folder_of_shards_is_not_written_into(small: WeightSource, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="file is a file; name the folder to write"):
        save_checkpoint(small, tmp_path / "file")

    (tmp_path / "model.safetensors.index.json").touch()
    with pytest.raises(
        CheckpointError, match="holds weights in shards, which are not overwritten; choose another folder"
    ):
        save_checkpoint(small, tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "model.safetensors.index.json"]


def test_progress_adds_up_to_the_number_of_values(small: WeightSource, tmp_path: Path) -> None:
    counts: list[int] = []
    save_checkpoint(small, tmp_path, progress=counts.append)

    assert sum(counts) == sum(math.prod(shape) for shape in small.shapes().values())
    assert len(counts) == len(small.shapes())

"""Finding a checkpoint's weights: what they are called, and files that are not what their name says."""

import json
import os
from pathlib import Path

import pytest
import torch
from checkpoints import small, tensors, write_folder

from moe3d_deploy.bundle import engine_name
from moe3d_deploy.checkpoint import open_checkpoint, save_checkpoint
from moe3d_deploy.checkpoint_files import find_weights
from moe3d_deploy.errors import CheckpointError
from moe3d_deploy.manifest import Checkpoint, Profile

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5026873000\n"


def refusal(source: Path | str, *, allow_pickle: bool = False) -> str:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(source, allow_pickle=allow_pickle)
    message = str(error.value)
    assert "\n" not in message
    return message


# What there is


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "moe3d-1B",
            "moe3d-1B: no such file or folder, nor a preset (vggt-1b, moe3d-1b, moe3d-tiny); did you mean moe3d-1",
        ),
        ("nowhere/model.safetensors", "nowhere/model.safetensors: no such file or folder"),
        ("preset:big", "preset 'big' is unknown; presets are vggt-1b, moe3d-1b, moe3d-tiny"),
        ("", ".: holds no model.safetensors"),
        ("x" * 5000, "cannot be read (File name too long); check the path"),
    ],
)
def test_an_unknown_source_is_named_with_what_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refusal(source)


def test_a_folder_without_weights_says_what_it_has(tmp_path: Path) -> None:
    assert refusal(tmp_path).endswith(
        ": holds no model.safetensors; name a checkpoint folder or the weights file itself"
    )
    for name in ("vggt.safetensors", "last.ckpt", "notes.txt"):
        (tmp_path / name).touch()
    assert "holds no model.safetensors (it has last.ckpt, vggt.safetensors); name" in refusal(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["model.safetensors.incomplete", ".cache/huggingface/download/AbC=.incomplete", "model.safetensors.crdownload"],
)
def test_an_unfinished_download_is_called_that(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"half")

    assert f"holds a download that has not ended ({name}); let it end first" in refusal(tmp_path)
    assert f"{name}: is a download that has not ended; let it end first" in refusal(tmp_path / name)


def test_a_kind_of_file_that_holds_no_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.npz").touch()
    assert "weights.npz: unknown kind of file; use .safetensors, a checkpoint folder" in refusal(
        tmp_path / "weights.npz"
    )


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    """Opening a pipe would wait for ever."""
    os.mkfifo(tmp_path / "model.safetensors")
    for source in (tmp_path, tmp_path / "model.safetensors"):
        assert "model.safetensors: is no regular file; name" in refusal(source)


def test_a_link_to_nothing_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("../../blobs/gone")
    for source in (tmp_path, tmp_path / "model.safetensors"):
        assert "model.safetensors: is a link to a file that is not there; download it again" in refusal(source)


# Files that are something else


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty (0 bytes); copy or download it again"),
        (
            POINTER,
            "is a git-lfs pointer, not the file it stands for; run 'git lfs install' and 'git lfs pull' in its fo",
        ),
        (
            b"<!DOCTYPE html>\n<html>",
            "is a web page, saved in place of the file; download the file itself (on Hugging F",
        ),
        (b"\n  <HTML><head><title>404", "is a web page"),
        (b"<?xml version='1.0'?><Error>", "is a web page"),
        (b"Entry not found", "is text ('Entry not found'...), not weights; download the file again"),
        (b'{"error": "Invalid username"}\n', 'is text (\'{"error": "Invalid username"}\'...), not weights'),
    ],
)
def test_what_a_failed_download_leaves_is_called_that(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert refusal(tmp_path / name, allow_pickle=True).startswith(f"{tmp_path / name}: {message}")


def test_a_renamed_pickle_is_no_safetensors_file(tmp_path: Path) -> None:
    torch.save(tensors(small()), tmp_path / "model.safetensors")
    for legacy in (False, True):
        torch.save({"a": torch.ones(1)}, tmp_path / "model.safetensors", _use_new_zipfile_serialization=not legacy)
        assert (
            "model.safetensors: is a pickle or zip archive, not safetensors; get the safetensors file, or name it .pt"
            in (refusal(tmp_path, allow_pickle=True))
        )


def test_a_renamed_safetensors_file_is_no_pickle(tmp_path: Path) -> None:
    write_folder(tmp_path, tensors(small()), small().config)
    (tmp_path / "model.safetensors").rename(tmp_path / "model.pt")

    for allowed in (False, True):
        assert refusal(tmp_path / "model.pt", allow_pickle=allowed).endswith(
            "model.pt: is a safetensors file, not a pickle; rename it to end in .safetensors"
        )


@pytest.mark.parametrize("length", [1, 7, 8, 9, 100, 5000, -1])
def test_a_file_cut_off_is_refused(tmp_path: Path, length: int) -> None:
    write_folder(tmp_path, tensors(small()), small().config)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])

    assert "model.safetensors: truncated or damaged safetensors file (" in refusal(tmp_path)


def test_the_first_bytes_of_a_header_s_length_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((0x4120).to_bytes(8, "little")[:2])
    assert "model.safetensors: truncated or damaged safetensors file (" in refusal(tmp_path)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**9, 100_000_001])
def test_a_header_of_absurd_length_is_not_read(tmp_path: Path, length: int) -> None:
    write_folder(tmp_path, tensors(small()), small().config)
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])

    assert "model.safetensors: truncated or damaged safetensors file (" in refusal(tmp_path)


# What it is called


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model as a checkpoint folder; not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "small-one"
    save_checkpoint(small(), folder)
    return folder


@pytest.mark.parametrize(
    ("folder", "name", "origin"),
    [
        ("~x", "x", "-x"),
        (".hidden", "hidden", ".hidden"),
        ("two\nlines \x07", "two-lines-", "two-lines -"),
        ("file:C:\\vggt", "file-C-vggt", "file-C-vggt"),
        ("modèle 2", "mod-le-2", "modèle 2"),
        ("模型", "model", "模型"),
        (os.fsdecode(b"\xff"), "model", "-"),
        ("moe3d-1b_v1.2+x", "moe3d-1b_v1.2+x", "moe3d-1b_v1.2+x"),
    ],
)
def test_a_bundle_can_hold_the_name_and_origin_of_any_folder(
    saved: Path, tmp_path: Path, folder: str, name: str, origin: str
) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "model.safetensors").symlink_to(saved / "model.safetensors")
    config = json.loads((saved / "config.json").read_text())
    del config["origin"]
    (tmp_path / folder / "config.json").write_text(json.dumps(config))

    source = open_checkpoint(tmp_path / folder)

    assert (source.name, source.origin) == (name, origin)
    text = json.dumps([source.name, source.origin], ensure_ascii=False)
    assert text.encode("utf-8")  # fails for half a surrogate pair
    assert Checkpoint(source.origin, None, source.licence).origin == origin
    profile = Profile((1, 1, 14, 14), (1, 1, 14, 14), (1, 1, 14, 14))
    assert engine_name(source.name, profile, "fp16", [89], "tensorrt", "10").startswith(f"{name}_")


@pytest.mark.parametrize(
    ("path", "name", "origin"),
    [
        ("vggt/model.safetensors", "vggt", "model.safetensors"),
        ("vggt/best.safetensors", "best", "best.safetensors"),
        ("vggt/model.safetensors.index.json", "vggt", "model.safetensors.index.json"),
        ("hub/models--facebook--VGGT-1B/snapshots/860a/model.safetensors", "VGGT-1B", "VGGT-1B"),
        ("hub/models--VGGT-1B/snapshots/860a/model.pt", "VGGT-1B", "VGGT-1B"),
        ("mine/snapshots/860a/model.pt", "860a", "model.pt"),
    ],
)
def test_a_file_is_called_after_what_tells_it_apart(tmp_path: Path, path: str, name: str, origin: str) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).touch()

    place = find_weights(tmp_path / path)
    assert (place.name, place.origin) == (name, origin)
    assert place.config == (tmp_path / path).with_name("config.json")

"""Which file of a checkpoint holds its tensors, what to call it, and whether it is what its name says.

No tensor and no config is read here. Links are followed, as the Hugging Face cache is made of them; the names that a
shard index holds have a rule of their own (`checkpoint_shards`).
"""

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe3d_deploy.config import PRESETS
from moe3d_deploy.errors import CheckpointError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHOWN = 3  # of a list of problems

Kind = Literal["safetensors", "index", "pickle"]

_PICKLES = (".pt", ".pth", ".ckpt", ".bin")
_UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".aria2")
_SHARD = re.compile(r".+-\d{5}-of-\d{5}\.safetensors")
_NO_FILE_NAME = re.compile(r"[^A-Za-z0-9_.+-]+")  # as in a bundle's file names, which the source's name becomes part of
_NO_ORIGIN = re.compile(r"[^\w .+-]+")
_HEAD_BYTES = 512
_LARGEST_HEADER = 100_000_000  # bytes; the safetensors library's own limit
_LFS_POINTER = b"version https://git-lfs"
_WEB_PAGE = (b"<!doctype", b"<html", b"<head", b"<?xml")


@dataclass(frozen=True)
class Place:
    """Where a checkpoint lies: the file with its tensors (or their index), the place of its config, what to call it."""

    weights: Path
    kind: Kind
    config: Path
    name: str
    origin: str


def find_weights(source: Path) -> Place:
    """The weights that `source`, a folder or a file, names. Raises CheckpointError where there are none to be read."""
    try:
        weights = _weights_in(source) if source.is_dir() else source
        _require_file(weights)
    except OSError as error:
        raise CheckpointError(f"{source}: cannot be read ({error.strerror or error}); check the path") from error
    name, origin = _names(source)
    return Place(weights, _kind(weights), weights.with_name(CONFIG_FILE), name, origin)


def refuse_impostor(path: Path, expected: Literal["safetensors", "pickle", "JSON"]) -> None:
    """Raise CheckpointError for a file whose first bytes show that it is something else than `expected`."""
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    if not head:
        raise CheckpointError(f"{path}: is empty (0 bytes); copy or download it again")
    if head.startswith(_LFS_POINTER):
        raise CheckpointError(
            f"{path}: is a git-lfs pointer, not the file it stands for; run 'git lfs install' and 'git lfs pull' in "
            f"its folder, or download the file itself"
        )
    text = head.lstrip()
    if text[:9].lower().startswith(_WEB_PAGE):
        raise CheckpointError(
            f"{path}: is a web page, saved in place of the file; download the file itself (on Hugging Face the address "
            f"has /resolve/, not /blob/; log in if it asks for that)"
        )
    found = _kind_of_bytes(head)
    if expected == "safetensors" and found == "pickle":
        raise CheckpointError(
            f"{path}: is a pickle or zip archive, not safetensors; get the safetensors file, or name it .pt and "
            f"use moe3d convert with --allow-pickle if you must"
        )
    if expected == "pickle" and found == "safetensors":
        raise CheckpointError(f"{path}: is a safetensors file, not a pickle; rename it to end in .safetensors")
    if expected != "JSON" and found == "text":
        start = head[:40].decode("ascii").split("\n", 1)[0].strip()
        raise CheckpointError(f"{path}: is text ({start!r}...), not weights; download the file again")


def first_few(problems: Sequence[str]) -> str:
    """The first SHOWN problems on one line, and how many others there are."""
    more = len(problems) - SHOWN
    return "; ".join(problems[:SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _weights_in(folder: Path) -> Path:
    single, index = folder / WEIGHTS_FILE, folder / INDEX_FILE
    held = [path for path in (single, index) if os.path.lexists(path)]
    if len(held) == 2:
        raise CheckpointError(f"{folder}: holds {WEIGHTS_FILE} and {INDEX_FILE}; name the one that is to be read")
    if held:
        return held[0]
    names = sorted(entry.name for entry in folder.iterdir())
    downloads = folder / ".cache" / "huggingface" / "download"
    unfinished = [name for name in names if name.endswith(_UNFINISHED)]
    unfinished += [str(path.relative_to(folder)) for path in downloads.glob("*.incomplete")]
    if unfinished:
        raise CheckpointError(f"{folder}: holds a download that has not ended ({unfinished[0]}); let it end first")
    if shards := [name for name in names if _SHARD.fullmatch(name)]:
        raise CheckpointError(f"{folder}: holds shards ({shards[0]}) but no {INDEX_FILE}; download that as well")
    others = [name for name in names if name.endswith((".safetensors", *_PICKLES))]
    has = f" (it has {', '.join(others[:SHOWN])})" if others else ""
    raise CheckpointError(
        f"{folder}: holds no {WEIGHTS_FILE}{has}; name a checkpoint folder or the weights file itself"
    )


def _require_file(path: Path) -> None:
    if path.is_file():
        return
    if path.is_symlink() and not path.exists():
        raise CheckpointError(f"{path}: is a link to a file that is not there; download it again")
    if path.exists():
        raise CheckpointError(f"{path}: is no regular file; name a checkpoint folder or the weights file itself")
    close = difflib.get_close_matches(str(path)[:80], PRESETS, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise CheckpointError(f"{path}: no such file or folder, nor a preset ({', '.join(PRESETS)}){hint}")


def _kind(weights: Path) -> Kind:
    if weights.name.endswith(".safetensors.index.json"):
        return "index"
    if weights.suffix == ".safetensors":
        if _SHARD.fullmatch(weights.name):
            raise CheckpointError(f"{weights}: is one of several shards; name their folder, which has {INDEX_FILE}")
        return "safetensors"
    if weights.suffix in _PICKLES:
        return "pickle"
    if weights.suffix in _UNFINISHED:
        raise CheckpointError(f"{weights}: is a download that has not ended; let it end first")
    raise CheckpointError(f"{weights}: unknown kind of file; use .safetensors, a checkpoint folder or a preset")


def _names(source: Path) -> tuple[str, str]:
    """A short name fit for a file name, and the origin, from the path as it was named (its links not followed)."""
    place = Path(os.path.abspath(source))
    origin = place.name
    name = place.name if source.is_dir() else place.stem
    if name == "model" or origin.endswith(".index.json"):
        place = place.parent
        name = place.name or name
    repository = place.parent.parent.name
    if place.parent.name == "snapshots" and repository.startswith("models--"):  # the Hugging Face cache
        name = origin = repository.split("--")[-1]
    name = _NO_FILE_NAME.sub("-", name).lstrip("-.+") or "model"
    return name, _NO_ORIGIN.sub("-", origin) or name


def _kind_of_bytes(head: bytes) -> Literal["safetensors", "pickle", "text", "other"]:
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= _LARGEST_HEADER:
        return "safetensors"
    if head.startswith(b"PK\x03\x04") or (head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        return "pickle"
    if len(head) > 8 and head.isascii() and all(byte >= 32 or byte in b"\t\r\n" for byte in head):
        return "text"
    return "other"

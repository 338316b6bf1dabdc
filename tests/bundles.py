"""What the bundle tests share besides their fixture (bundle_fixtures.py): writing a small bundle, and spoiling it."""

import json
import os
import shutil
from pathlib import Path

import pytest
from manifests import ENGINE, example_manifest

from moe3d_deploy.bundle import Bundle, BundleWriter
from moe3d_deploy.errors import BundleError
from moe3d_deploy.manifest import MANIFEST_NAME, Manifest

# Field 2 of an ONNX file, its producer's name: tag, length, text.
OLD, NEW = b"\x12\x09old model", b"\x12\x11new model, longer"


def write_bundle(path: Path, model: bytes = OLD, overwrite: bool = False) -> Bundle:
    with BundleWriter(path, overwrite) as writer:
        (writer.folder / "model.onnx").write_bytes(model)
        (writer.folder / "model.onnx.data").write_bytes(b"weights")
        return writer.commit(example_manifest())


def build_old(temp: Path, manifest: Manifest) -> None:
    temp.write_bytes(b"old engine")


def build_new(temp: Path, manifest: Manifest) -> None:
    temp.write_bytes(b"new engine")


def siblings(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir())


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def refusal(path: Path, verify: str = "full") -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.open(path, verify=verify)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert any(remedy in message for remedy in ("again", "give the folder", "rename")), "the message names no remedy"
    return message


def edit_manifest(path: Path, **changes: object) -> None:
    values = json.loads((path / MANIFEST_NAME).read_text())
    (path / MANIFEST_NAME).write_text(json.dumps({**values, **changes}))


def spoil(path: Path, how: str) -> None:
    """Do something to the engine of `bundle`."""
    if how == "no folder":
        shutil.rmtree(path / "engines")
    elif how == "missing":
        (path / ENGINE).unlink()
    elif how == "cut off":
        os.truncate(path / ENGINE, 3)
    else:
        (path / ENGINE).write_bytes(b"OLD ENGINE")


SPOILT = {
    "no folder": "is missing",
    "missing": "is missing",
    "cut off": "has 3 bytes, not 10",
    "damaged": "is damaged: its SHA-256 is not the manifest's",
}

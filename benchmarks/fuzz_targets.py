"""The readers that are fuzzed: what each is called with, and good inputs to start from.

A target takes bytes. Whatever they are, it has to accept them or raise one of this project's errors; everything else is
a finding. The modules under test are imported by `target`, so that `fuzz` can have them instrumented.
"""

import copy
import io
import json
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

# What replaces a value of a JSON document.
_ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 0.5, 1e308, "", "x", "x" * 300, "../x", "/x", "\u202e",
    "\x00", [], {}, [[]], [None] * 5, {"": None}, [1, 2, 3, 4], "0" * 64,
)  # fmt: skip
_STRUCTURED = 0x80  # of the first byte: the rest edits a good document, else it is a document


@dataclass(frozen=True)
class Target:
    """call(data) reads one input; `seeds` are good ones."""

    call: Callable[[bytes], Any]
    seeds: tuple[bytes, ...]


def target(name: str, checkpoint: Path, bundle: Path, work: Path) -> Target:
    """The one called `name`, of `fuzz.TARGETS`; `checkpoint` and `bundle` are good ones, `work` is for files."""
    make = {
        "manifest": lambda: _manifest(bundle),
        "external data": lambda: _external_data(bundle, work),
        "safetensors": lambda: _safetensors(checkpoint, work),
        "checkpoint config": lambda: _config(checkpoint, work),
        "images": lambda: _images(work),
        "engine shapes": _shapes,
        "bundle": lambda: _bundle(bundle, work),
    }
    return make[name]()


def _manifest(bundle: Path) -> Target:
    from moe3d_deploy.manifest import MANIFEST_NAME, Manifest

    good = (bundle / MANIFEST_NAME).read_bytes()

    def call(data: bytes) -> None:
        Manifest.from_json(_document(data, good).decode("utf-8", "surrogateescape"))

    return Target(call, (b"\0" + good, bytes([_STRUCTURED]) + bytes(range(40))))


def _external_data(bundle: Path, work: Path) -> Target:
    from moe3d_deploy.external_data import external_locations

    path = work / "model.onnx"

    def call(data: bytes) -> None:
        path.write_bytes(data)
        external_locations(path)

    return Target(call, (_small_model(), (bundle / "model.onnx").read_bytes()[:2000]))


def _small_model() -> bytes:
    """An ONNX file with a tensor whose values lie in model.onnx.data, and a node; field numbers are onnx.proto's."""

    def field(number: int, data: bytes) -> bytes:
        return bytes([number << 3 | 2, len(data)]) + data

    entry = field(1, b"location") + field(2, b"model.onnx.data")
    tensor = field(8, b"w") + field(13, entry)
    node = field(1, b"w") + field(4, b"Relu")
    return b"\x08\x09" + field(7, field(1, node) + field(5, tensor))


def _safetensors(checkpoint: Path, work: Path) -> Target:
    from moe3d_deploy.safetensors_io import SafetensorsFile

    path = work / "weights.safetensors"
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()

    def call(data: bytes) -> None:
        path.write_bytes(data)
        file = SafetensorsFile(path)
        for name in list(file.tensors)[:8]:
            file.read(name)

    return Target(call, (struct.pack("<Q", len(header)) + header + bytes(8),))


def _config(checkpoint: Path, work: Path) -> Target:
    from moe3d_deploy.checkpoint import open_checkpoint

    folder = work / "checkpoint"
    shutil.copytree(checkpoint, folder)
    good = (checkpoint / "config.json").read_bytes()

    def call(data: bytes) -> None:
        (folder / "config.json").write_bytes(_document(data, good))
        open_checkpoint(folder)

    return Target(call, (b"\0" + good, bytes([_STRUCTURED]) + bytes(range(40))))


def _images(work: Path) -> Target:
    from PIL import Image

    from moe3d_deploy.images import load_images

    path = work / "photo"
    pixels = np.random.default_rng(0).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    seeds = []
    for kind in ("PNG", "JPEG", "TIFF", "WEBP", "BMP", "PPM", "GIF", "JPEG2000"):
        for image in (Image.fromarray(pixels), Image.fromarray(pixels[..., 0]), Image.fromarray(pixels).convert("P")):
            buffer = io.BytesIO()
            try:
                image.save(buffer, kind)
            except (OSError, KeyError):  # a format that does not hold this kind, or one this Pillow cannot write
                continue
            seeds.append(buffer.getvalue())

    def call(data: bytes) -> None:
        path.write_bytes(data)
        load_images([path], size=28)

    return Target(call, tuple(seeds))


def _shapes() -> Target:
    from moe3d_deploy.engines.shapes import ShapeProfile

    def call(data: bytes) -> None:
        batch, views, height, width, *_ = [*data.decode("utf-8", "surrogateescape").split(" "), "1", "1", "14", "14"]
        profile = ShapeProfile.from_ranges(batch, views, height, width)
        ShapeProfile.from_dict(profile.as_dict())

    return Target(call, (b"1 1:4:8 140:392:518 518", b"1 2:3 14 28"))


def _bundle(bundle: Path, work: Path) -> Target:
    """A bundle of which one file is replaced; half of the time the manifest says that this is right."""
    from moe3d_deploy.bundle import Bundle, BundleWriter
    from moe3d_deploy.bundle_files import entry_of

    good = Bundle.open(bundle)
    path = work / "bundle"
    with BundleWriter(path) as writer:
        for name, data in (("model.onnx", _small_model()), ("model.onnx.data", b"weights")):
            (writer.folder / name).write_bytes(data)
        whole = writer.commit(good.manifest).manifest
    names = ("manifest.json", "model.onnx", "model.onnx.data")
    contents = {name: (path / name).read_bytes() for name in names}

    def call(data: bytes) -> None:
        choice, data = data[0] if data else 0, data[1:]
        name = names[choice % 3]
        try:
            (path / name).write_bytes(_document(data, contents[name]) if name == "manifest.json" else data)
            if choice & 0x40 and name != "manifest.json":
                files = {**whole.files, name: entry_of(path / name)}
                (path / "manifest.json").write_text(replace(whole, files=files).to_json())
            Bundle.open(path)
        finally:
            for changed in (name, "manifest.json"):
                (path / changed).write_bytes(contents[changed])

    start = [bytes([index]) + contents[name] for index, name in enumerate(names)]
    return Target(call, (*start, b"\x41" + contents["model.onnx"], bytes([0, _STRUCTURED]) + bytes(range(40))))


def _document(data: bytes, good: bytes) -> bytes:
    """JSON text: the data itself, or a good document with the edits that the data says."""
    if not data or not data[0] & _STRUCTURED:
        return data[1:]
    document = json.loads(good)
    edits = iter(data[1:61])
    try:
        while True:
            _edit(document, edits)
    except StopIteration:
        return json.dumps(document).encode("utf-8", "surrogatepass")


def _edit(document: Any, edits: Any) -> None:
    """Walk down to some value and replace, remove, double or rename it; raises StopIteration at the end of `edits`."""
    node = document
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            next(edits)  # nothing to edit; the edits still have to end
            return
        key = keys[next(edits) % len(keys)]
        if isinstance(node[key], (dict, list)) and next(edits) % 4:
            node = node[key]
            continue
        action = next(edits) % 8
        if action == 0:
            del node[key]
        elif action == 1 and isinstance(node, list):
            node.append(copy.deepcopy(node[key]))
        elif action == 1:
            node[f"{key} "] = node[key]
        else:
            node[key] = copy.deepcopy(_ODD[next(edits) % len(_ODD)])
        return

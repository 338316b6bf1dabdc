"""Survival matrix: a bundle that was damaged, spoilt on purpose or brought from elsewhere is refused in one line."""

import json
import os
import random
import re
import shutil
import socket
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from survival import Printed, Refused, content, hidden
from survival_fixtures import engine_of

from moe3d_deploy import trt
from moe3d_deploy.bundle import Bundle
from moe3d_deploy.cli.main import main
from moe3d_deploy.errors import BundleError, EngineError
from moe3d_deploy.files import sha256_file

pytest_plugins = ["survival_fixtures"]
MANIFEST = "manifest.json"


def offsets(size: int, count: int = 40) -> list[int]:
    """Where to cut or to damage a file: both ends, and places between that are the same in every run."""
    between = random.Random(size).sample(range(size), min(count, size))
    return sorted({0, 1, size // 2, size - 1, *between})


def refusal(path: Path, file: Path | str = "") -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.open(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(file) in message
    return message


def enter(bundle: Path, name: str) -> None:
    """Give the manifest the size and digest that a file has now, as a malicious sender would."""
    values = json.loads((bundle / MANIFEST).read_text())
    file = bundle / name
    values["files"][name] = {"size": file.stat().st_size, "sha256": sha256_file(file)}
    (bundle / MANIFEST).write_text(json.dumps(values))


# ---- the manifest


@pytest.mark.survival(row="manifest damaged", how="cut off at every one of 44 offsets")
def test_a_manifest_cut_off_anywhere_is_refused(plain: Path, photo: Path, refused: Refused) -> None:
    whole = (plain / MANIFEST).read_bytes()
    for size in offsets(len(whole) - 1):  # the last byte is a line end
        (plain / MANIFEST).write_bytes(whole[:size])
        refusal(plain, plain / MANIFEST)
    (plain / MANIFEST).write_bytes(whole[: len(whole) // 2])
    refused("run", plain, photo, "-o", plain.parent / "out", names=str(plain / MANIFEST))
    assert not (plain.parent / "out").exists()


@pytest.mark.survival(row="manifest damaged", how="each of 120 single bits flipped in turn")
def test_a_flipped_bit_of_a_manifest_is_refused_or_harmless(plain: Path) -> None:
    """A manifest has no digest of its own: what is accepted has to be a manifest still, and one of these files."""
    whole = (plain / MANIFEST).read_bytes()
    accepted, lines = 0, set()
    for position in offsets(len(whole), 120):
        changed = bytearray(whole)
        changed[position] ^= 1 << position % 8
        (plain / MANIFEST).write_bytes(changed)
        try:
            Bundle.open(plain)
        except BundleError as error:
            lines.add(str(error).count("\n"))
        else:
            accepted += 1
    assert lines == {0}, "errors are one line"
    assert accepted < 60, "letters in names and figures may change unseen, structure may not"


HOSTILE: dict[str, Callable[[str], str]] = {
    "10 million nested lists": lambda text: "[" * 10_000_000,
    "100,000 nested objects": lambda text: '{"a":' * 100_000 + "1" + "}" * 100_000,
    "nested inside a good manifest": lambda text: text.replace('"created_by": {', '"created_by": ' + "[" * 900 + "{"),
    "an integer of a million digits": lambda text: text.replace('"opset": 20', '"opset": ' + "9" * 1_000_000),
    "a key twice": lambda text: text.replace('"opset":', '"opset": 1, "opset":'),
    "NaN": lambda text: text.replace('"opset": 20', '"opset": NaN'),
    "Infinity": lambda text: text.replace('"opset": 20', '"opset": -Infinity'),
    "a number that overflows": lambda text: text.replace('"opset": 20', '"opset": 1e999'),
    "a lone surrogate": lambda text: text.replace('"opset": 20', '"opset": "\\ud800"'),
    "a wrong type": lambda text: text.replace('"opset": 20', '"opset": "20"'),
    "a negative size": lambda text: text.replace('"size": ', '"size": -', 1),
    "an unknown key": lambda text: text.replace("{", '{"__class__": "os.system",', 1),
    "a list for the top level": lambda text: f"[{text}]",
    "nothing but a zero byte": lambda text: "\0",
    "20 MB of blanks": lambda text: " " * 20_000_000 + text,
}


@pytest.mark.survival(row="hostile JSON", how="a manifest that is deep, huge, ambiguous or of wrong types")
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_json_is_refused_in_bounded_memory(kind: str, plain: Path, refused: Refused) -> None:
    text = (plain / MANIFEST).read_text()
    spoilt = HOSTILE[kind](text.replace('"opset": 20', '"opset": 20'))
    assert spoilt != text, "the manifest no longer has the field that this test spoils"
    (plain / MANIFEST).write_text(spoilt)
    del spoilt
    tracemalloc.start()
    try:
        refused("inspect", plain, names=str(plain / MANIFEST))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200e6, "a manifest of at most 16 MiB"


# ---- the ONNX file and where its weights are


@pytest.mark.survival(row="ONNX file damaged", how="model.onnx and model.onnx.data cut off at 44 offsets each")
@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_an_onnx_file_cut_off_anywhere_is_refused(name: str, plain: Path, photo: Path, refused: Refused) -> None:
    whole = (plain / name).read_bytes()
    for size in reversed(offsets(len(whole))):
        os.truncate(plain / name, size)
        refusal(plain, plain / name)
    refused("run", plain, photo, "-o", plain.parent / "out", names=f"{plain / name} has 0 bytes")


@pytest.mark.survival(row="ONNX file damaged", how="each of 44 single bits flipped in turn")
@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
def test_a_flipped_bit_of_an_onnx_file_is_refused(name: str, plain: Path, photo: Path, refused: Refused) -> None:
    whole = (plain / name).read_bytes()
    for position in offsets(len(whole)):
        with open(plain / name, "r+b") as file:
            file.seek(position)
            file.write(bytes([whole[position] ^ 1 << position % 8]))
        refusal(plain, plain / name)
        (plain / name).write_bytes(whole)
    (plain / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    refused("run", plain, photo, "-o", plain.parent / "out", names=f"{plain / name} is damaged")


@pytest.mark.survival(row="ONNX file damaged", how="cut off or overwritten, and the manifest's digest made to fit")
@pytest.mark.parametrize("kind", ["empty", "cut off", "text", "zeros"])
def test_an_onnx_file_that_is_none_is_one_line_even_with_a_fitting_digest(
    kind: str, plain: Path, photo: Path, refused: Refused
) -> None:
    model = plain / "model.onnx"
    whole = model.read_bytes()
    model.write_bytes({"empty": b"", "cut off": whole[: len(whole) // 3], "text": b"hello", "zeros": bytes(999)}[kind])
    enter(plain, "model.onnx")
    refused("run", plain, photo, "-o", plain.parent / "out", names="model.onnx")


@pytest.mark.survival(
    row="ONNX file damaged", how="weights file missing or shorter than the graph says, digest made to fit"
)
@pytest.mark.parametrize("kind", ["missing", "short"])
def test_missing_or_short_weights_are_one_line(kind: str, plain: Path, photo: Path, refused: Refused) -> None:
    data = plain / "model.onnx.data"
    if kind == "missing":
        data.unlink()
    else:
        os.truncate(data, 1000)
        enter(plain, data.name)
    refused("run", plain, photo, "-o", plain.parent / "out", names="model.onnx")


PLACES = [
    "../../etc/passwd",
    "{outside}",
    "engines/../../secret",
    "C:\\secret",
    "~/secret",
    "link",
    "model.onnx.data/x",
]


@pytest.mark.survival(
    row="external data out of place", how="a tensor whose location leads out of the folder, digests made to fit"
)
@pytest.mark.parametrize("place", PLACES)
def test_weights_outside_the_bundle_are_refused(
    place: str, plain: Path, tmp_path: Path, photo: Path, refused: Refused
) -> None:
    secret = tmp_path / "secret"
    shutil.copy(plain / "model.onnx.data", secret)
    if place == "link":
        (plain / "link").symlink_to(secret)
    model = onnx.load(plain / "model.onnx", load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.external_data)
    next(entry for entry in tensor.external_data if entry.key == "location").value = place.format(outside=secret)
    onnx.save(model, plain / "model.onnx")
    enter(plain, "model.onnx")
    refusal(plain, plain)  # by the scan of the bundle's reader: ONNX Runtime has seen nothing yet
    refused("run", plain, photo, "-o", plain.parent / "out", names=str(plain))


# ---- links and special files


@pytest.mark.survival(
    row="symbolic links", how="a file of the bundle is a link: inside, outside, to nothing, to itself"
)
@pytest.mark.parametrize("name", [MANIFEST, "model.onnx", "model.onnx.data"])
@pytest.mark.parametrize("target", ["inside", "outside", "nowhere", "itself"])
def test_a_link_in_a_bundle_is_refused(name: str, target: str, plain: Path, tmp_path: Path, refused: Refused) -> None:
    place = {"inside": plain / "moved", "outside": tmp_path / "moved", "nowhere": tmp_path / "none",
             "itself": plain / name}[target]  # fmt: skip
    if target in ("inside", "outside"):
        shutil.move(plain / name, place)
    else:
        (plain / name).unlink()
    (plain / name).symlink_to(place)
    refused("inspect", plain, names="is a link")


@pytest.mark.survival(row="symbolic links", how="the bundle's name is a link: read through it, written where it leads")
def test_a_link_to_a_bundle_is_followed_as_a_whole(plain: Path, tmp_path: Path, printed: Printed,
                                                   capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    (tmp_path / "link").symlink_to(plain)
    assert main(["inspect", str(tmp_path / "link"), "--no-digest"]) == 0
    printed(capsys.readouterr().out.splitlines()[0], 0)


SPECIAL: dict[str, Callable[[Path], Any]] = {
    "pipe": os.mkfifo,
    "socket": lambda path: socket.socket(socket.AF_UNIX).bind(str(path)),
    "folder": os.mkdir,
}


@pytest.mark.survival(row="special files", how="a pipe, a socket or a folder in place of a file of the bundle")
@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize("name", [MANIFEST, "model.onnx.data"])
def test_a_special_file_in_a_bundle_is_refused_without_waiting(
    name: str, kind: str, plain: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    (plain / name).unlink()
    monkeypatch.chdir(plain)  # a socket's path is short
    SPECIAL[kind](Path(name))
    refused("inspect", plain, names=str(plain / name))


@pytest.mark.survival(row="special files", how="a pipe, a socket, a folder or a device as a photograph")
@pytest.mark.parametrize("kind", [*SPECIAL, "device"])
def test_a_special_file_as_a_photograph_is_refused_without_waiting(
    kind: str, plain: Path, tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if kind != "device":
        SPECIAL[kind](Path("photo.jpg"))
    photo = Path("/dev/zero") if kind == "device" else tmp_path / "photo.jpg"
    refused("run", plain, photo, "-o", tmp_path / "out", names=photo.name)


@pytest.mark.survival(row="special files", how="the bundle itself is a file, a pipe, a device or nothing")
@pytest.mark.parametrize("kind", ["pipe", "file", "device", "nothing"])
def test_a_bundle_that_is_no_folder_is_refused(kind: str, tmp_path: Path, refused: Refused) -> None:
    path = Path("/dev/null") if kind == "device" else tmp_path / "bundle"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "file":
        path.write_text("not a bundle")
    refused("inspect", path, names=str(path))


# ---- engines


@pytest.mark.survival(row="engine damaged", how="cut off at 44 offsets, 44 bits flipped, emptied, overwritten")
def test_a_damaged_engine_is_refused_and_the_onnx_file_still_runs(good: Path, photo: Path, refused: Refused) -> None:
    engine = engine_of(good)
    whole = engine.read_bytes()
    for size in reversed(offsets(len(whole))):
        os.truncate(engine, size)
        refusal(good, engine)
    engine.write_bytes(whole)
    for position in offsets(len(whole)):
        with open(engine, "r+b") as file:
            file.seek(position)
            file.write(bytes([whole[position] ^ 1 << position % 8]))
        refusal(good, engine)
        with open(engine, "r+b") as file:
            file.seek(position)
            file.write(whole[position : position + 1])
    Bundle.open(good)
    engine.write_bytes(b"not an engine".ljust(len(whole), b"\0"))
    refused("inspect", good, names="1 of 1 engines missing or damaged; build one again with: moe3d-export")
    assert main(["run", str(good), str(photo), "-o", str(good.parent / "out"), "--formats", "npz"]) == 0


@pytest.mark.survival(row="engine damaged", how="a new engine is built in a bundle whose engine is cut off")
def test_a_damaged_engine_is_replaced_by_the_next_build(good: Path) -> None:
    engine = engine_of(good)
    before = content(good)
    os.truncate(engine, 100)
    assert main(["export", str(good), "--views", "1:2:4"]) == 0
    assert Bundle.open(good).engine_faults() == {}
    assert content(good).keys() == before.keys()
    assert hidden(good.parent) == []


@pytest.mark.survival(
    row="engine of another version or GPU",
    how="its record names version and GPUs; one that does not load is one line with both versions and the command",
)
def test_an_engine_says_what_it_was_built_by_and_for(
    good: Path, printed: Printed, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (record,) = Bundle.open(good).manifest.engines
    assert record.builder_version == trt.available()["tensorrt-rtx"]
    assert record.compute_capabilities == (80, 86, 89, 120)
    assert main(["inspect", str(good)]) == 0
    assert record.builder_version in capsys.readouterr().out
    if trt.visible_gpus():
        pytest.skip("a GPU is here: rtx_engine_runs of the GPU checks loads engines")
    bundle = Bundle.open(good)
    with pytest.raises(EngineError, match="needs an NVIDIA GPU and its driver; none is visible") as caught:
        trt.EngineRunner.of_bundle(bundle, record)
    monkeypatch.setattr("moe3d_deploy.trt.installed.visible_gpus", lambda: [(8, 9)])  # the library finds none
    with pytest.raises(EngineError) as caught:
        trt.EngineRunner.of_bundle(bundle, record)
    command = f"moe3d-export {good} --builder tensorrt-rtx --views 1:2:4 --height 42 --width 42"
    here = re.escape(record.builder_version)
    assert re.search(rf"\.plan: TensorRT-RTX {here}\S* cannot load it: .*; build it again: ", str(caught.value))
    assert str(caught.value).endswith(command)
    monkeypatch.setattr("moe3d_deploy.trt.installed.available", lambda: {"tensorrt-rtx": "1.0.0.1"})
    with pytest.raises(
        EngineError, match=rf"\.plan cannot be used here: built by .* {here}, here is 1\.0\.0\.1; "
    ) as caught:
        trt.EngineRunner.of_bundle(bundle, record)
    assert str(caught.value).endswith(f"; build it again: {command}")
    printed(str(caught.value), caught.value.exit_code)

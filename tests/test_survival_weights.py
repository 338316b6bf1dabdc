"""Survival matrix: weights that are damaged, hostile or of another model are refused by name, before any work."""

import json
import pickle
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from survival import Refused

from moe3d_deploy.checkpoint import open_checkpoint
from moe3d_deploy.cli.main import main
from moe3d_deploy.errors import CheckpointError

pytest_plugins = ["survival_fixtures"]
WEIGHTS, CONFIG = "model.safetensors", "config.json"
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def export(checkpoint: Path, tmp_path: Path, refused: Refused) -> Callable[..., str]:
    """export(*options, names=...): an export of the checkpoint has to be refused and leaves nothing."""

    def run(*options: str, names: str = "", source: Path = checkpoint) -> str:
        target = tmp_path / "target"
        target.mkdir(exist_ok=True)
        line = refused("export", source, "-o", target / "bundle", "--builder", "none", *options, names=names)
        assert list(target.iterdir()) == []
        return line

    return run


def change(checkpoint: Path, edit: Callable[[Tensors], Any]) -> None:
    tensors = load_file(checkpoint / WEIGHTS)
    edit(tensors)
    save_file(tensors, checkpoint / WEIGHTS)


@pytest.mark.survival(row="safetensors damaged", how="cut off at 43 offsets")
def test_weights_cut_off_anywhere_are_refused(checkpoint: Path, export: Callable[..., str]) -> None:
    whole = (checkpoint / WEIGHTS).read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    places = random.Random(0).sample(range(len(whole)), 40)
    for size in (7, 8, header, *places):
        (checkpoint / WEIGHTS).write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=WEIGHTS):
            open_checkpoint(checkpoint)
    export(names=WEIGHTS)


def header_with(whole: bytes, **changes: Any) -> bytes:
    """The file with another entry for its first tensor."""
    length = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + length])
    first = next(name for name in header if name != "__metadata__")
    header[first] |= changes
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + whole[8 + length :]


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "header of 2^63 bytes": lambda w: struct.pack("<Q", 1 << 63) + w[8:],
    "header longer than the file": lambda w: struct.pack("<Q", len(w)) + w[8:],
    "header of 0 bytes": lambda w: bytes(8) + w[8:],
    "header that is no JSON": lambda w: w[:8] + b"}" + w[9:],
    "nested header": lambda w: struct.pack("<Q", 200_000) + b'{"a":' * 40_000 + w,
    "offsets beyond the end": lambda w: header_with(w, data_offsets=[0, 1 << 40]),
    "offsets backwards": lambda w: header_with(w, data_offsets=[8, 0]),
    "negative shape": lambda w: header_with(w, shape=[-1]),
    "shape that overflows": lambda w: header_with(w, shape=[1 << 62, 1 << 62]),
    "unknown type": lambda w: header_with(w, dtype="F1024"),
    "bytes behind the data": lambda w: w + b"x",
    "a bit of the header": lambda w: w[:20] + bytes([w[20] ^ 4]) + w[21:],
}


@pytest.mark.survival(row="safetensors damaged", how="a header that lies: lengths, offsets, shapes, types, nesting")
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_header_that_lies_is_refused(kind: str, checkpoint: Path, export: Callable[..., str]) -> None:
    path = checkpoint / WEIGHTS
    path.write_bytes(DAMAGE[kind](path.read_bytes()))
    export(names="small")


CONFIGS: dict[str, Callable[[str], str]] = {
    "nested": lambda text: "[" * 100_000,
    "huge number": lambda text: text.replace('"img_size": 42', '"img_size": ' + "9" * 10_000),
    "NaN": lambda text: text.replace('"img_size": 42', '"img_size": NaN'),
    "wrong type": lambda text: text.replace('"img_size": 42', '"img_size": "42"'),
    "negative": lambda text: text.replace('"img_size": 42', '"img_size": -42'),
    "a list": lambda text: f"[{text}]",
    "not UTF-8": lambda text: text.replace("small", "\udcff"),
    "cut off": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
}


@pytest.mark.survival(
    row="hostile JSON", how="a checkpoint's config.json that is deep, huge, cut off or of wrong types"
)
@pytest.mark.parametrize("kind", CONFIGS)
def test_a_hostile_config_is_refused(kind: str, checkpoint: Path, export: Callable[..., str]) -> None:
    text = (checkpoint / CONFIG).read_text()
    spoilt = CONFIGS[kind](text)
    assert spoilt != text, "the config no longer has what this test spoils"
    (checkpoint / CONFIG).write_text(spoilt, errors="surrogateescape")
    export(names="small")


def rename(tensors: Tensors) -> None:
    tensors["aggregator.camera_tokn"] = tensors.pop("aggregator.camera_token")


def drop(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith("camera_head.")]:
        del tensors[name]


def reshape(tensors: Tensors) -> None:
    tensors["aggregator.camera_token"] = torch.zeros(1, 2, 1, 33)


def integers(tensors: Tensors) -> None:
    tensors["aggregator.camera_token"] = torch.zeros(1, 2, 1, 32, dtype=torch.int64)


UNFIT: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "a misspelt name": (rename, "aggregator.camera_token"),
    "missing tensors": (drop, "camera_head."),
    "another shape": (reshape, "aggregator.camera_token"),
    "integers": (integers, "aggregator.camera_token"),
    "an extra tensor": (lambda tensors: tensors.update(unheard=torch.zeros(3)), "unheard"),
    "no tensors": (lambda tensors: tensors.clear(), "small"),
}


@pytest.mark.survival(
    row="weights that do not fit", how="names misspelt, missing or extra, other shapes, integers, none"
)
@pytest.mark.parametrize("kind", UNFIT)
def test_weights_of_another_model_are_refused_by_name(kind: str, checkpoint: Path, export: Callable[..., str]) -> None:
    edit, names = UNFIT[kind]
    change(checkpoint, edit)
    assert export(names=names).count(";") < 12, "the first few problems, not all"


@pytest.mark.survival(row="weights that do not fit", how="config.json says 3 experts, the weights hold 2")
def test_another_number_of_experts_is_refused(checkpoint: Path, export: Callable[..., str]) -> None:
    config = json.loads((checkpoint / CONFIG).read_text())
    config["moe"]["num_experts"] = 3
    (checkpoint / CONFIG).write_text(json.dumps(config))
    export(names="2 experts")


@pytest.mark.survival(
    row="weights that are not finite",
    how="one NaN or infinity in one tensor; one 65,520, which half precision rounds to infinity",
)
@pytest.mark.parametrize(
    ("value", "dtype"),
    [(float("nan"), "float32"), (float("inf"), "float32"), (-float("inf"), "float32"), (65_520.0, "float16")],
)
def test_a_value_that_is_not_finite_is_refused_by_its_tensor(
    value: float, dtype: str, checkpoint: Path, tmp_path: Path, refused: Refused
) -> None:
    name = "aggregator.frame_blocks.0.attn.qkv.weight"
    change(checkpoint, lambda tensors: tensors[name].view(-1).__setitem__(7, value))
    refused("convert", checkpoint, "-o", tmp_path / "out", "--keep-vggt", "--dtype", dtype, names=name)
    assert not list((tmp_path / "out").glob("*")), "nothing half-written"


class Malicious:
    """Runs code when it is unpickled without care."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.proof,))


@pytest.mark.survival(
    row="pickle checkpoint", how="a malicious .pt, a cut off one, a good one; without and with --allow-pickle"
)
@pytest.mark.parametrize("allow", [False, True])
@pytest.mark.parametrize("kind", ["malicious", "malicious torch file", "cut off", "text", "numpy", "good"])
def test_a_pickle_never_runs_code(
    kind: str, allow: bool, tmp_path: Path, export: Callable[..., str], checkpoint: Path
) -> None:
    """And only a good one that was asked for is taken."""
    proof, path = tmp_path / "proof", checkpoint / "model.pt"
    if kind == "malicious":
        path.write_bytes(pickle.dumps(Malicious(proof)))
    elif kind == "malicious torch file":
        torch.save({"model": Malicious(proof)}, path)
    elif kind == "text":
        path.write_text("cos\nsystem\n(S'touch proof'\ntR.")
    elif kind == "numpy":
        np.save(path.with_suffix(".npy"), np.zeros(3))
        path.with_suffix(".npy").rename(path)
    else:
        torch.save(load_file(checkpoint / WEIGHTS), path)
        if kind == "cut off":
            path.write_bytes(path.read_bytes()[:5000])
    if kind == "good" and allow:
        taken = checkpoint.parent / "taken"
        assert main(["convert", str(path), "-o", str(taken), "--keep-vggt", "--allow-pickle"]) == 0
        weights, expected = load_file(taken / WEIGHTS), load_file(checkpoint / WEIGHTS)
        assert weights.keys() == expected.keys()
        assert all(torch.equal(weights[name], expected[name]) for name in expected)
    else:
        named = "--allow-pickle" if kind == "good" else "model.pt"
        export(*(["--allow-pickle"] if allow else []), source=path, names=named)
    assert not proof.exists()

"""Safetensors files: what is written, the library reads; what is damaged, is named in one line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moe3d_deploy.errors import CheckpointError
from moe3d_deploy.safetensors_io import SafetensorsFile, write_safetensors

TENSORS = {
    "b.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4) / 7,
    "a": torch.tensor(-2.5),
    "c.odd": torch.tensor([1e-8, 3.0, -65504.0]),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A small intact file."""
    path = tmp_path / "model.safetensors"
    _write(path, torch.float32)
    return path


def _write(path: Path, dtype: torch.dtype) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    write_safetensors(path, shapes, dtype, lambda name: TENSORS[name].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_safetensors_library_reads_what_was_written(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "model.safetensors"
    _write(path, dtype)

    read = load_file(path)
    assert set(read) == set(TENSORS)
    for name, tensor in read.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, TENSORS[name].to(dtype))
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_files_of_the_safetensors_library_are_read(tmp_path: Path) -> None:
    path = tmp_path / "library.safetensors"
    stored = {"half": torch.randn(5, 3).half(), "brain": torch.randn(2, 3).bfloat16(), "full": torch.randn(7)}
    save_file(stored, path)

    file = SafetensorsFile(path)

    for name, tensor in stored.items():
        assert file.tensors[name].shape == tuple(tensor.shape)
        assert torch.equal(file.read(name), tensor)


def test_tensors_keep_their_order(path: Path) -> None:
    assert list(SafetensorsFile(path).tensors) == list(TENSORS)


def test_a_tensor_read_may_be_changed(path: Path) -> None:
    file = SafetensorsFile(path)
    file.read("b.weight").zero_()

    assert torch.equal(file.read("b.weight"), TENSORS["b.weight"])


def test_a_file_cut_off_anywhere_is_refused_in_one_line(path: Path) -> None:
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(
            CheckpointError, match=r"model\.safetensors: truncated or damaged .* download it again"
        ) as e:
            SafetensorsFile(path)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data + b"x",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: data[:8] + b"\xff" + data[9:],
        lambda data: data[:8] + b"[" + data[9:],
        lambda data: data.replace(b'"shape":[3,4]', b'"shape":[3,5]'),
        lambda data: data.replace(b'"data_offsets":[0,48]', b'"data_offsets":[4,48]'),
        lambda data: data.replace(b'"F32"', b'"F99"', 1),
    ],
    ids=["appended", "huge header", "not UTF-8", "not JSON", "shape", "hole", "unknown dtype"],
)
def test_a_damaged_file_is_refused(path: Path, damage: Callable[[bytes], bytes]) -> None:
    whole = path.read_bytes()
    damaged = damage(whole)
    assert damaged != whole
    path.write_bytes(damaged)

    with pytest.raises(CheckpointError, match="truncated or damaged safetensors file"):
        SafetensorsFile(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ('{"a":%s,"a":%s}', "has the key 'a' twice"),
        ('{"__metadata__":{"x":"1","x":"2"},"a":%s}', "has the key 'x' twice"),
    ],
)
def test_a_header_with_a_key_twice_is_refused(tmp_path: Path, header: str, message: str) -> None:
    """The safetensors library takes the last one."""
    path = tmp_path / "model.safetensors"
    text = header.replace("%s", '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}').encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"0000")

    with pytest.raises(CheckpointError, match=rf"damaged safetensors file \({message}\); copy or download it again"):
        SafetensorsFile(path)


def test_integer_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ids.safetensors"
    save_file({"ids": torch.arange(3)}, path)

    with pytest.raises(CheckpointError, match="tensor 'ids' is I64; weights must be one of F64, F32, F16, BF16"):
        SafetensorsFile(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors: cannot be read .*; check the path"):
        SafetensorsFile(tmp_path / "none.safetensors")


def test_a_file_replaced_during_reading_is_noticed(path: Path) -> None:
    file = SafetensorsFile(path)
    _write(path, torch.float16)

    with pytest.raises(CheckpointError, match="changed while it was being read; start again"):
        file.read("a")


def test_a_dtype_without_a_place_in_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot hold torch\.int8; use one of torch\.float64"):
        _write(tmp_path / "model.safetensors", torch.int8)


def test_a_tensor_not_as_announced_stops_the_writing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a is \(2,\) torch\.float32, announced as \(3,\) torch\.float32"):
        write_safetensors(tmp_path / "x", {"a": (3,)}, torch.float32, lambda _: torch.zeros(2))


def test_header_is_plain_json(path: Path) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")

    assert json.loads(data[8 : 8 + length])["a"] == {"dtype": "F32", "shape": [], "data_offsets": [48, 52]}


@pytest.mark.parametrize("name", ["a", "ab", "abc"])
def test_data_is_aligned_whatever_the_header(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {name: (2,)}, torch.float64, lambda _: torch.ones(2, dtype=torch.float64))

    assert SafetensorsFile(path).tensors[name].start % 8 == 0

"""Weights in shards: they open as one file would, or the index and its shards are named where they disagree."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import NORM, shard_name, small, tensors, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moe3d_deploy.checkpoint import load_model, open_checkpoint
from moe3d_deploy.checkpoint_shards import ShardedFile, disagreements, is_plain_name, read_index
from moe3d_deploy.errors import CheckpointError
from moe3d_deploy.strict_json import JsonError

FEW = {"a": torch.arange(3.0), "b": torch.ones(2, 2).half(), "c": torch.zeros(5).bfloat16()}
FIRST, SECOND, THIRD = (shard_name(i, 3) for i in range(3))


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        ShardedFile(path)
    message = str(error.value)
    assert message.startswith(f"{path.parent}/model")
    assert "\n" not in message
    return message


def edited(folder: Path, edit: Callable[[dict[str, Any]], object]) -> str:
    """How an index that `edit` has spoilt is refused, without the path before it."""
    return refusal(write_shards(folder, FEW, edit=edit)).partition("index.json: ")[2]


@pytest.mark.parametrize("named", ["folder", "index"])
def test_shards_open_as_one_file_would(tmp_path: Path, named: str) -> None:
    index = write_shards(tmp_path / "mine", tensors(small()), small().config)

    source = open_checkpoint(index.parent if named == "folder" else index)

    assert (source.name, source.config) == ("mine", small().config)
    assert source.shapes() == small().shapes()
    assert torch.equal(source.tensor(NORM), small().tensor(NORM))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_shards_of_half_precision_load_as_any_type(tmp_path: Path, dtype: torch.dtype) -> None:
    stored = {name: tensor.to(dtype) for name, tensor in tensors(small()).items()}
    source = open_checkpoint(write_shards(tmp_path, stored, small().config))

    assert source.tensor(NORM).dtype == dtype
    for wanted in (torch.float32, torch.float16, torch.bfloat16):
        loaded = load_model(source, dtype_of=lambda _, wanted=wanted: wanted).state_dict()
        assert all(torch.equal(loaded[name], stored[name].to(wanted)) for name in stored)


def test_each_shard_keeps_its_own_types(tmp_path: Path) -> None:
    file = ShardedFile(write_shards(tmp_path, FEW))

    assert file.shapes() == {"a": (3,), "b": (2, 2), "c": (5,)}
    for name, tensor in FEW.items():
        assert file.read(name).dtype == tensor.dtype
        assert torch.equal(file.read(name), tensor)


def test_the_digest_is_that_of_sha256sums_lines(tmp_path: Path) -> None:
    index = write_shards(tmp_path, FEW)

    lines = [f"{hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()}  {name}" for name in (FIRST, SECOND, THIRD)]
    assert ShardedFile(index).sha256() == hashlib.sha256(("\n".join(lines) + "\n").encode()).hexdigest()


def test_an_index_may_leave_its_total_out_or_hold_it_as_a_float(tmp_path: Path) -> None:
    for i, metadata in enumerate([{}, {"total_size": 12.0 + 8 + 10}, {"total_parameters": 12}]):
        index = write_shards(tmp_path / str(i), FEW, edit=lambda index, value=metadata: index.update(metadata=value))
        assert set(ShardedFile(index).shapes()) == set(FEW)


# What an index says of itself


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors", "/x.safetensors", "a/x.safetensors", "a\\x.safetensors", "C:x.safetensors", "x.bin", "..",
        "", "a\x00.safetensors", "a\n.safetensors", 3, None, ["x.safetensors"], "x" * 300 + ".safetensors",
    ],
)  # fmt: skip
def test_a_shard_is_named_by_a_plain_file_name(tmp_path: Path, name: object) -> None:
    (tmp_path / "x.safetensors").touch()

    message = edited(tmp_path / "here", lambda index: index["weight_map"].update(a=name))

    assert message.startswith("has 'a' in ")
    assert message.endswith("which is no plain name of a .safetensors file beside it; copy or download it again")


@pytest.mark.parametrize(
    "index", [[], {}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": None}, {"metadata": {"total_size": 1}}]
)
def test_a_file_without_a_map_is_no_index(tmp_path: Path, index: object) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))

    assert "is no index of shards: it has no object weight_map with a file for each tensor; copy" in refusal(path)


@pytest.mark.parametrize("total", ["30", -1, 1.5, True, [], {}])
def test_a_total_is_a_number_of_bytes(tmp_path: Path, total: object) -> None:
    message = edited(tmp_path, lambda index: index["metadata"].update(total_size=total))
    assert message.startswith("has the total_size ")
    assert ", expected a number of bytes; copy or download it again" in message


@pytest.mark.parametrize("total", [0, 29, 31])
def test_a_wrong_total_is_named_with_the_right_one(tmp_path: Path, total: int) -> None:
    """3 float32, 4 float16 and 5 bfloat16 are 12 + 8 + 10 bytes."""
    message = edited(tmp_path, lambda index: index["metadata"].update(total_size=total))
    assert message == f"says total_size {total}, its shards hold 30 bytes of tensors; download all of them again"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "has the key 'a' twice"),
        (b"[" * 100_000, "is nested more than 32 deep"),
        (b'{"weight_map": NaN}', "has NaN, which JSON does not allow"),
        (b"{", "is not JSON: "),
        (b"\xff{}", "is not UTF-8 text (byte 0)"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
        (b"<html>", "is a web page"),
        (b"", "is empty (0 bytes)"),
    ],
)  # fmt: skip
def test_a_hostile_index_is_refused(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(text)
    assert message in refusal(path)


# An index and its shards


def test_missing_shards_are_named(tmp_path: Path) -> None:
    index = write_shards(tmp_path, FEW)
    (tmp_path / SECOND).unlink()

    assert refusal(index).endswith(f"1 of its 3 shards not there: {SECOND}; download into the same folder")


def test_a_tensor_that_its_shard_lacks_is_named_with_the_one_that_has_it(tmp_path: Path) -> None:
    one, two = shard_name(0, 2), shard_name(1, 2)
    index = write_shards(tmp_path, FEW, count=2, edit=lambda index: index["weight_map"].update(a=two, z=two))

    assert refusal(index).endswith(
        f"the index and its shards disagree: {two} lacks 'a', {one} has it; {two} lacks 'z'; download all of them again"
    )


def test_a_tensor_in_two_shards_is_named_with_both(tmp_path: Path) -> None:
    index = write_shards(tmp_path, FEW)
    save_file({"a": FEW["a"], "b": FEW["b"]}, tmp_path / SECOND)

    assert f"disagree: 'a' is in {FIRST} and in {SECOND}; download" in refusal(index)


def test_a_tensor_that_the_index_leaves_out_is_named(tmp_path: Path) -> None:
    index = write_shards(tmp_path, FEW)
    save_file({"b": FEW["b"], "other": FEW["a"]}, tmp_path / SECOND)

    assert f"disagree: 'other' in {SECOND} is not in the index; download" in refusal(index)


def test_three_disagreements_are_shown_and_the_others_counted(tmp_path: Path) -> None:
    message = edited(tmp_path, lambda index: index["weight_map"].update({f"x{i}": FIRST for i in range(7)}))
    assert message.count("lacks") == 3
    assert message.endswith("lacks 'x2'; and 4 more; download all of them again")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", f"{SECOND}: is empty (0 bytes)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", f"{SECOND}: is a git-lfs pointer"),
        (b"\x40\x00\x00\x00\x00\x00\x00\x00{}", f"{SECOND}: truncated or damaged safetensors file"),
    ],
)
def test_a_damaged_shard_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    index = write_shards(tmp_path, FEW)
    (tmp_path / SECOND).write_bytes(content)
    assert message in refusal(index)


def test_a_folder_with_one_file_and_with_shards_is_ambiguous(tmp_path: Path) -> None:
    write_shards(tmp_path, FEW)
    save_file(FEW, tmp_path / "model.safetensors")

    with pytest.raises(CheckpointError, match=r"holds model\.safetensors and model\.safetensors\.index\.json; name"):
        open_checkpoint(tmp_path)


def test_one_of_several_shards_is_no_checkpoint(tmp_path: Path) -> None:
    write_shards(tmp_path, FEW)

    with pytest.raises(CheckpointError, match="is one of several shards; name their folder"):
        open_checkpoint(tmp_path / FIRST)
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=rf"holds shards \({FIRST}\) but no model\.safetensors\.index\.json; do"):
        open_checkpoint(tmp_path)


# Links


def test_a_shard_may_not_be_a_link_out_of_its_folder(tmp_path: Path) -> None:
    index = write_shards(tmp_path / "in", FEW)
    shutil.move(tmp_path / "in" / SECOND, tmp_path / "out.safetensors")
    (tmp_path / "in" / SECOND).symlink_to("../out.safetensors")

    message = refusal(index)
    assert (
        f"its shard {SECOND} is a link out of the folder, to {tmp_path}/out.safetensors; put the file itself" in message
    )


def test_a_shard_may_be_a_link_in_its_folder_and_the_folder_a_link(tmp_path: Path) -> None:
    write_shards(tmp_path / "in", FEW)
    shutil.move(tmp_path / "in" / SECOND, tmp_path / "in" / "digest")
    (tmp_path / "in" / SECOND).symlink_to("digest")
    (tmp_path / "link").symlink_to("in")

    file = ShardedFile(tmp_path / "link" / "model.safetensors.index.json")
    assert torch.equal(file.read("b"), FEW["b"])


def test_a_dangling_link_is_a_missing_shard(tmp_path: Path) -> None:
    index = write_shards(tmp_path, FEW)
    (tmp_path / THIRD).unlink()
    (tmp_path / THIRD).symlink_to("gone")

    assert f"1 of its 3 shards not there: {THIRD}" in refusal(index)


def hugging_face_cache(root: Path, write: Callable[[Path], object]) -> Path:
    """What `write` puts in a folder as the cache keeps it: a snapshot of relative links to blobs. The snapshot."""
    repository = root / "models--facebook--VGGT-1B"
    snapshot = repository / "snapshots" / ("3" * 40)
    write(repository / "blobs")
    snapshot.mkdir(parents=True)
    for file in list((repository / "blobs").iterdir()):
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(file.with_name(digest))
        (snapshot / file.name).symlink_to(f"../../blobs/{digest}")
    return snapshot


def test_the_hugging_face_cache_opens_and_gives_its_repository_s_name(tmp_path: Path) -> None:
    snapshot = hugging_face_cache(tmp_path, lambda blobs: write_shards(blobs, tensors(small()), small().config))

    for source in (snapshot, snapshot / "model.safetensors.index.json"):
        opened = open_checkpoint(source)
        assert (opened.name, opened.origin) == ("VGGT-1B", "VGGT-1B")
        assert torch.equal(opened.tensor(NORM), small().tensor(NORM))


# Any index

NAMES = st.text(st.characters(codec="utf-8"), max_size=12)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | NAMES
JSON = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3), max_leaves=5)
INDEXES = JSON | st.fixed_dictionaries(
    {"weight_map": st.dictionaries(NAMES, NAMES | NAMES.map(lambda name: name + ".safetensors") | JSON)},
    optional={"metadata": JSON | st.dictionaries(st.just("total_size"), JSON)},
)


@settings(max_examples=200, deadline=None)
@given(INDEXES)
def test_any_index_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, index: object) -> None:
    """Whatever it says, only its own errors come out, and only names that stay in the folder."""
    path = tmp_path_factory.getbasetemp() / "any.safetensors.index.json"
    path.write_text(json.dumps(index))
    with contextlib.suppress(JsonError):
        weight_map, total = read_index(path)
        assert weight_map == index["weight_map"]  # type: ignore[index, call-overload]
        assert all((path.parent / name).parent == path.parent for name in weight_map.values())
        assert total is None or total >= 0


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_plain_name_stays_in_any_folder(data: st.DataObject) -> None:
    parts = st.sampled_from(["..", ".", "/", "\\", "a", "C:", "\x00", "\n", ".safetensors", "~", "é"])
    name = "".join(data.draw(st.lists(parts, max_size=6))) + ".safetensors"
    if is_plain_name(name):
        assert (Path("/folder") / name).resolve() == Path("/folder") / name
        assert len(Path(name).parts) == 1


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcdef"), st.sampled_from(["s1", "s2"]), min_size=1),
    st.dictionaries(st.sampled_from(["s1", "s2"]), st.sets(st.sampled_from("abcdef")), min_size=2),
)
def test_an_index_agrees_with_its_shards_only_where_each_tensor_is_in_its_place_alone(
    weight_map: dict[str, str], held: dict[str, set[str]]
) -> None:
    pairs = {(tensor, shard) for shard, tensors in held.items() for tensor in tensors}
    problems = disagreements(weight_map, {shard: dict.fromkeys(tensors) for shard, tensors in held.items()})
    assert (not problems) == (pairs == set(weight_map.items()))

"""The cache of scenes: equal bits with it and without, whatever happens to its files."""

import errno
from pathlib import Path

import pytest
import safetensors.torch
import torch

from moe3d_deploy.training import scene_cache
from moe3d_deploy.training.scene_cache import SceneStore, StoredScene
from moe3d_deploy.training.scenes import SceneOptions

OPTIONS = SceneOptions(28, 28, 1)


def assert_equal(one: StoredScene, other: StoredScene) -> None:
    assert all(a.equal(b) and a.dtype == b.dtype for a, b in zip(one, other, strict=True))


@pytest.fixture
def rendered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The seeds that were rendered."""
    seeds: list[int] = []
    render = scene_cache.render_scene

    def counting(seed: int, *arguments: object, **options: object) -> object:
        seeds.append(seed)
        return render(seed, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(scene_cache, "render_scene", counting)
    return seeds


def test_a_scene_is_rendered_once_and_equal_to_the_bit(tmp_path: Path, rendered: list[int]) -> None:
    fresh, _ = SceneStore(OPTIONS).get(5)
    store = SceneStore(OPTIONS, tmp_path)
    for _ in range(2):
        stored, notes = store.get(5)
        assert_equal(stored, fresh)
        assert notes == []
    assert rendered == [5, 5], "once without the folder, once with it"


def test_other_options_splits_and_generators_have_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [OPTIONS, SceneOptions(28, 28, 1, split="test-seeds"), SceneOptions(28, 28, 1, camera_effects=False)]
    paths = {SceneStore(kind, tmp_path).path(1) for kind in kinds}
    monkeypatch.setattr(scene_cache, "GENERATOR_VERSION", 99)
    paths.add(SceneStore(OPTIONS, tmp_path).path(1))
    assert len(paths) == 4


def cut(data: bytes) -> bytes:
    return data[:-1]


def flip(data: bytes) -> bytes:
    """One bit of a depth value."""
    return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]


def other(data: bytes) -> bytes:
    return safetensors.torch.save({"images": torch.zeros(1)})


@pytest.mark.parametrize(("damage", "why"), [
    (cut, "incomplete"), (flip, "wrong checksum"), (other, "other tensors than a scene's"), (lambda data: b"", "small"),
])  # fmt: skip
def test_a_damaged_file_is_told_once_and_rendered_again(damage, why: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    store = SceneStore(OPTIONS, tmp_path)
    fresh, _ = store.get(2)
    path = store.path(2)
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    again, notes = store.get(2)
    assert_equal(again, fresh)
    (note,) = notes
    assert note.startswith(f"{path}: damaged (")
    assert why in note
    assert note.endswith("; rendered again")
    assert path.read_bytes() == whole
    assert store.get(2)[1] == []


def test_a_full_cache_takes_no_more_and_says_so(tmp_path: Path) -> None:
    store = SceneStore(OPTIONS, tmp_path, limit_bytes=10_000)
    assert store.get(0)[1] == [], "a scene of 28 x 28 x (3 + 4) bytes and its cameras: 6 kB"
    scene, notes = store.get(1)
    assert notes == [f"scene cache {tmp_path} is full (1e-05 GB); further scenes are not kept"]
    assert_equal(scene, SceneStore(OPTIONS).get(1)[0])
    assert not store.path(1).exists()
    assert store.get(0)[1] == []


def test_files_are_counted_seldom_but_often_enough_for_many_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sixteen processes add files of 1,000 bytes in turn, with room for 1,000 of them."""
    held, looks = [0], [0]

    def count(folder: Path) -> int:
        looks[0] += 1
        return held[0]

    monkeypatch.setattr(scene_cache, "_bytes_below", count)
    rooms = [scene_cache._Room(1_000_000) for _ in range(16)]
    refused = [0] * 16
    for turn in range(16_000):
        if rooms[turn % 16].take(tmp_path, 1_000):
            held[0] += 1_000
        else:
            refused[turn % 16] += 1
    assert 990_000 < held[0] <= 1_000_000
    assert looks[0] < 800, "of 16,000 files"
    held[0] = 0  # somebody has made room
    assert any(rooms[0].take(tmp_path, 1_000) for _ in range(300))


def test_a_full_disk_is_a_line_and_no_part_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    scene, notes = SceneStore(OPTIONS, tmp_path).get(1)
    assert notes == [f"scene cache {tmp_path}: No space left on device; scenes are not kept until there is room"]
    assert_equal(scene, SceneStore(OPTIONS).get(1)[0])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_folder_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        SceneStore(OPTIONS, tmp_path / "file").get(1)

"""The frozen backbone's features: computed once per sample, with equal bits wherever they are kept."""

from pathlib import Path

import pytest
import torch
from trainings import TINY, assert_same, run, short, state_of, tiny_checkpoint

from moe3d_deploy.errors import InputError
from moe3d_deploy.training import feature_cache
from moe3d_deploy.training.data import Batch, plan_sample
from moe3d_deploy.training.feature_cache import FeatureCache, most_bytes
from moe3d_deploy.training.initialise import new_model
from moe3d_deploy.training.options import TrainOptions


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny")


def head(source: Path, **changes: object) -> TrainOptions:
    """Three steps of two samples in a pass, and two passes."""
    return short(source, train="head", from_scratch=False, **changes)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch sizes with which the backbone ran."""
    sizes: list[int] = []
    levels = feature_cache.frozen_levels

    def counting(model, images):  # type: ignore[no-untyped-def]
        sizes.append(len(images))
        return levels(model, images)

    monkeypatch.setattr(feature_cache, "frozen_levels", counting)
    return sizes


def test_every_place_gives_equal_bits_and_computes_a_sample_once(
    checkpoint: Path, tmp_path: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in ("memory", "disk"):
        computed.clear()
        run(head(checkpoint, feature_cache=place), tmp_path / place)
        assert computed == [1] * 6, "six samples, alone, in twelve places"
    computed.clear()
    for room in ("available_memory_bytes", "free_disk_bytes"):
        monkeypatch.setattr(feature_cache, room, lambda *folder: 1)
    _, lines = run(head(checkpoint, feature_cache="auto"), tmp_path / "none")
    assert computed == [1] * 12
    assert lines[0].endswith("features computed at every step (all of them: up to 2.5e-05 GB)")
    for place in ("disk", "none"):
        assert_same(state_of(tmp_path / place).tensors, state_of(tmp_path / "memory").tensors)


def test_features_on_disk_serve_a_run_that_goes_on_and_go_when_it_ends(
    checkpoint: Path, tmp_path: Path, computed: list[int]
) -> None:
    path = tmp_path / "run"
    result, _ = run(head(checkpoint, feature_cache="disk", minutes=1e-6), path)
    assert result.step == 1
    files = sorted((path / "features").rglob("*.safetensors"))
    assert len(files) == 2
    files[0].write_bytes(files[0].read_bytes()[:-1])
    run(head(checkpoint, feature_cache="disk"), path)
    assert len(computed) == 2 + 4 + 1, "the others, and the damaged one again"
    assert not (path / "features").exists()
    run(head(checkpoint, feature_cache="memory"), tmp_path / "memory")
    assert_same(
        {k: t for k, t in state_of(path).tensors.items() if k.startswith("model.")},
        {k: t for k, t in state_of(tmp_path / "memory").tensors.items() if k.startswith("model.")},
    )


def test_without_it_samples_are_new_in_every_pass(checkpoint: Path, tmp_path: Path, computed: list[int]) -> None:
    _, lines = run(head(checkpoint, feature_cache="off"), tmp_path / "run")
    assert computed == [1] * 12
    assert "features computed at every step" in lines[0]


def test_features_that_were_kept_and_new_ones_meet_on_the_device_of_the_batch(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The meta device stands for a GPU. Of two samples, one is on disk, read to the CPU; as after a kill."""
    options = head(checkpoint, feature_cache="disk")
    cache = FeatureCache.choose(options, TINY, "0" * 64, tmp_path / "features")
    shape = (1, 2, 4, TINY.token_dim)
    cache._write(0, [torch.zeros(shape) for _ in range(4)])
    monkeypatch.setattr(FeatureCache, "_write", lambda *_: None)  # nothing can be written of what is not there
    monkeypatch.setattr(
        feature_cache, "frozen_levels", lambda model, images: [torch.zeros(shape, device=images.device)] * 4
    )
    plans = tuple(plan_sample(options, number) for number in (0, 1))
    nothing = torch.zeros(0)
    batch = Batch(torch.zeros(2, 2, 3, 28, 28, device="meta"), nothing, nothing, nothing, plans, ())
    levels = cache.levels(new_model(TINY, 0), batch)
    assert [(tuple(level.shape), level.device.type) for level in levels] == [((2, *shape[1:]), "meta")] * 4


def test_the_place_is_the_first_with_twice_the_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TINY: 4 levels of 4 patches of 32 channels of 4 bytes, 2 views, 6 samples: 24,576 bytes."""
    options = head(tmp_path)
    need = 4 * 4 * 32 * 4 * 2 * 6
    assert most_bytes(options, TINY) == need == 24_576

    def chosen(memory: int, disk: int, **changes: object) -> str:
        monkeypatch.setattr(feature_cache, "available_memory_bytes", lambda: memory)
        monkeypatch.setattr(feature_cache, "free_disk_bytes", lambda folder: disk)
        return FeatureCache.choose(head(tmp_path, **changes), TINY, "0" * 64, tmp_path / "features").place

    assert chosen(2 * need, 0) == "memory"
    assert chosen(2 * need - 1, 2 * need) == "disk"
    assert chosen(2 * need - 1, 2 * need - 1) == "none"
    assert chosen(need, 0, feature_cache="memory") == "memory"
    with pytest.raises(InputError, match=r"do not fit in 0.0 GB of disk; use fewer scenes, or --feature-cache auto"):
        chosen(0, need - 1, feature_cache="disk")


@pytest.mark.parametrize("asked", ["disk", "auto"])
def test_what_a_run_has_kept_does_not_stand_in_its_own_way(
    asked: str, checkpoint: Path, tmp_path: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk of twice the room that all features need, of which a third is taken when the run goes on."""
    path = tmp_path / "run"
    monkeypatch.setattr(feature_cache, "available_memory_bytes", lambda: 0)
    disk = 2 * most_bytes(head(checkpoint), TINY)

    def free(folder: Path) -> int:
        return disk - sum(file.stat().st_size for file in path.rglob("*.safetensors") if "features" in file.parts)

    monkeypatch.setattr(feature_cache, "free_disk_bytes", free)
    run(head(checkpoint, feature_cache=asked, minutes=1e-6), path)
    assert len(computed) == 2
    if asked == "disk":
        disk //= 2
        assert free(path) < most_bytes(head(checkpoint), TINY)
    run(head(checkpoint, feature_cache=asked), path)
    assert len(computed) == 6, "each sample once in both passes"


def test_other_weights_samples_and_scenes_have_other_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def folder(digest: str, **changes: object) -> Path:
        return FeatureCache.choose(head(tmp_path, **changes), TINY, digest, tmp_path / "features").folder

    assert folder("a" * 64) == folder("a" * 64, learning_rate=1.0)
    found = {folder("a" * 64), folder("b" * 64), folder("a" * 64, seed=1), folder("a" * 64, amp="bf16")}
    monkeypatch.setattr(feature_cache, "GENERATOR_VERSION", 99)
    assert len(found | {folder("a" * 64)}) == 5

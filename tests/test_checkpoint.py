"""Opening and loading checkpoints: what fits goes through unchanged, damaged values are named."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import GAMMA, NORM, small, tensors, write_folder
from torch import Tensor

from moe3d_deploy.checkpoint import (
    VGGT_LICENCE,
    WeightSource,
    load_model,
    model_shapes,
    open_checkpoint,
    save_checkpoint,
    seeded_source,
)
from moe3d_deploy.config import PRESETS
from moe3d_deploy.errors import CheckpointError, InputError


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model as a checkpoint folder; not to be changed."""
    folder = tmp_path_factory.mktemp("saved") / "small-one"
    save_checkpoint(small(), folder)
    return folder


@pytest.fixture
def edited(tmp_path: Path) -> Callable[..., Path]:
    """Makes a folder of the small model's tensors after `edit` has changed them in place."""

    def make(edit: Callable[[dict[str, Tensor]], object]) -> Path:
        weights = tensors(small())
        edit(weights)
        return write_folder(tmp_path, weights, small().config)

    return make


def _sparse_vggt(folder: Path, data_dir: Path) -> Path:
    """VGGT-1B's model.safetensors with every real key and shape, the data a hole in the file."""
    groups = json.loads((data_dir / "vggt_1b_state_dict.json").read_text())
    header, end = {}, 0
    for name, shape in {**groups["model"], **groups["track_head"]}.items():
        begin, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path = folder / "model.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path


# Opening


def test_vggt_1b_has_the_published_keys_and_its_track_head_is_left_aside(data_dir: Path, tmp_path: Path) -> None:
    groups = json.loads((data_dir / "vggt_1b_state_dict.json").read_text())
    published = {name: tuple(shape) for name, shape in groups["model"].items()}
    assert (len(published), len(groups["track_head"])) == (1403, 394)

    source = open_checkpoint(_sparse_vggt(tmp_path, data_dir))

    assert source.config == PRESETS["vggt-1b"]
    assert source.shapes() == published == model_shapes(source.config)
    assert source.licence == VGGT_LICENCE


def test_a_preset_gives_seeded_weights_and_says_so() -> None:
    source = open_checkpoint("moe3d-tiny", seed=3)

    assert source.config == PRESETS["moe3d-tiny"]
    assert (source.name, source.origin) == ("moe3d-tiny", "preset:moe3d-tiny seed 3")
    assert source.licence == "seeded random weights, no licence"
    assert not torch.equal(source.tensor(NORM), open_checkpoint("preset:moe3d-tiny", seed=0).tensor(NORM))


def test_a_folder_named_like_a_preset_must_be_told_apart(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vggt-1b").symlink_to(saved)

    with pytest.raises(CheckpointError, match=r"preset and a folder here; write preset:vggt-1b or \./vggt-1b"):
        open_checkpoint("vggt-1b")
    assert open_checkpoint("./vggt-1b").config.img_size == 56
    assert open_checkpoint("preset:vggt-1b").config.img_size == 518


def test_a_preset_takes_no_config() -> None:
    with pytest.raises(InputError, match="preset 'moe3d-tiny' has its own config"):
        open_checkpoint("moe3d-tiny", config=PRESETS["moe3d-tiny"])


def test_a_file_is_read_with_the_config_beside_it_or_the_one_given(saved: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone.safetensors"
    alone.symlink_to(saved / "model.safetensors")

    assert open_checkpoint(saved / "model.safetensors").config == small().config
    assert open_checkpoint(saved / "model.safetensors").name == "small-one"
    assert open_checkpoint(alone, config=small().config).name == "alone"
    with pytest.raises(CheckpointError, match=r"alone\.safetensors: no config\.json, and no preset has its sizes"):
        open_checkpoint(alone)


# Loading


def test_the_model_has_exactly_the_weights_of_the_source(saved: Path) -> None:
    model = load_model(open_checkpoint(saved))

    assert not model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, small().tensor(name)), name
    assert not any(p.requires_grad or p.is_meta for p in model.parameters())


def test_dtypes_are_those_asked_for() -> None:
    model = load_model(small(), dtype_of=lambda name: torch.float16 if "blocks" in name else torch.float32)

    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.float16 if "blocks" in name else torch.float32)


def test_the_point_head_can_be_left_out_but_not_invented() -> None:
    without = dataclasses.replace(small().config, point_head=False)

    assert load_model(small(), point_head=False).config == without
    assert load_model(small(), point_head=True).config == small().config
    with pytest.raises(CheckpointError, match="x has no point head"):
        load_model(seeded_source("x", without), point_head=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers_are_refused(edited: Callable[..., Path], value: float, dtype: torch.dtype) -> None:
    def edit(weights: dict[str, Tensor]) -> None:
        weights[NORM] = weights[NORM].to(dtype)
        weights[NORM][5] = value

    source = open_checkpoint(edited(edit))
    with pytest.raises(
        CheckpointError, match=rf": tensor '{NORM}' holds NaN or infinite values; use undamaged weights$"
    ):
        load_model(source)


@pytest.mark.parametrize(("bad", "shown"), [(2, 2), (3, 3), (4, 3), (9, 3)])
def test_the_first_three_damaged_tensors_are_named(edited: Callable[..., Path], bad: int, shown: int) -> None:
    names = sorted(small().shapes())[: 10 * bad : 10]
    source = open_checkpoint(edited(lambda weights: [weights[name].fill_(float("nan")) for name in names]))

    with pytest.raises(CheckpointError) as error:
        load_model(source)
    message = str(error.value)
    expected = "; ".join(f"tensor '{name}' holds NaN or infinite values" for name in names[:shown])
    more = "; and more" if bad > shown else ""
    assert message == f"{source.name}: {expected}{more}; use undamaged weights"


def test_values_beyond_float16_are_refused_there_and_nowhere_else(edited: Callable[..., Path]) -> None:
    source = open_checkpoint(edited(lambda weights: (weights[NORM].fill_(-7e4), weights[GAMMA].fill_(65505))))

    with pytest.raises(CheckpointError) as error:
        load_model(source, dtype_of=lambda _: torch.float16)
    assert str(error.value).endswith(
        f": tensor '{GAMMA}' reaches 6.55e+04, too large for torch.float16; tensor '{NORM}' reaches 7e+04, "
        f"too large for torch.float16; use float32"
    )
    load_model(source, dtype_of=lambda _: torch.bfloat16)


def test_a_value_beyond_float32_is_damage(edited: Callable[..., Path]) -> None:
    def enlarge(weights: dict[str, torch.Tensor]) -> None:
        weights[GAMMA] = weights[GAMMA].double().fill_(1e300)

    with pytest.raises(CheckpointError, match=r"reaches 1e\+300, too large for torch.float32; use undamaged weights$"):
        load_model(open_checkpoint(edited(enlarge)))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_of_any_type_load_as_any_type(
    edited: Callable[..., Path], stored: torch.dtype, wanted: torch.dtype
) -> None:
    def edit(weights: dict[str, Tensor]) -> None:
        weights.update({name: tensor.to(stored) for name, tensor in weights.items() if "blocks" in name})

    model = load_model(open_checkpoint(edited(edit)), dtype_of=lambda _: wanted)

    for name, tensor in model.state_dict().items():
        kept = small().tensor(name).to(stored) if "blocks" in name else small().tensor(name)
        assert torch.equal(tensor, kept.to(wanted)), name


def test_keys_are_checked_before_any_tensor_is_read() -> None:
    class Unreadable(WeightSource):
        def shapes(self) -> dict[str, tuple[int, ...]]:
            return {"other": (1,)}

        def tensor(self, name: str) -> Tensor:
            raise AssertionError(f"{name} was read")

        def sha256(self) -> str:
            return "0" * 64

    with pytest.raises(CheckpointError, match="unknown 'other'"):
        load_model(Unreadable(PRESETS["moe3d-tiny"], "x", "x", "x"))

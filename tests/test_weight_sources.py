"""Pickled state dicts: refused code, accepted forms; and what seeded sources say about themselves."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moe3d_deploy.config import PRESETS, MoeConfig
from moe3d_deploy.errors import CheckpointError, InputError, Moe3dWarning
from moe3d_deploy.weight_sources import model_shapes, read_pickle, seeded_source

STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)}

pytestmark = pytest.mark.filterwarnings("ignore:.*is a pickle")


class _RunsCode:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: {"model": d, "epoch": 3}, lambda d: {"state_dict": d}])
def test_a_state_dict_is_found_where_trainers_put_it(tmp_path: Path, wrap: Callable[[dict], dict]) -> None:
    torch.save(wrap(STATE), tmp_path / "model.pt")

    read = read_pickle(tmp_path / "model.pt")

    assert read.keys() == STATE.keys()
    assert all(torch.equal(read[name], STATE[name]) for name in STATE)


def test_reading_a_pickle_warns(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "model.pt")

    with pytest.warns(Moe3dWarning, match=r"model\.pt is a pickle; prefer model\.safetensors"):
        read_pickle(tmp_path / "model.pt")


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path: Path, zipped: bool) -> None:
    trap = tmp_path / "code has run"
    path = tmp_path / "model.pt"
    if zipped:
        torch.save(STATE | {"trap": _RunsCode(trap)}, path)
    else:
        path.write_bytes(pickle.dumps(_RunsCode(trap)))

    with pytest.raises(CheckpointError, match=r"model\.pt: .*safetensors") as error:
        read_pickle(path)

    assert not trap.exists()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [[1, 2], {"a": 1}, {"a": torch.arange(3)}, {3: torch.ones(1)}, torch.ones(2)])
def test_a_pickle_without_a_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "model.pt")

    with pytest.raises(CheckpointError, match='no state dict of float tensors, nor one under "model"'):
        read_pickle(tmp_path / "model.pt")


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.9])
def test_a_truncated_pickle_is_refused_in_one_line(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "model.pt"
    torch.save(STATE, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else int(keep)])

    with pytest.raises(CheckpointError, match=r"model\.pt: .*safetensors") as error:
        read_pickle(path)
    assert "\n" not in str(error.value)


def test_an_old_torch_is_not_trusted_with_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")

    with pytest.raises(CheckpointError, match=r"needs torch 2\.10 or newer, this is 2\.9\.1"):
        read_pickle(tmp_path / "model.pt")


def test_a_seeded_digest_stands_for_name_seed_and_config() -> None:
    tiny = PRESETS["moe3d-tiny"]
    sources = [
        seeded_source("moe3d-tiny", tiny),
        seeded_source("moe3d-tiny", tiny, seed=1),
        seeded_source("other", tiny),
        seeded_source("moe3d-tiny", PRESETS["vggt-1b"]),
    ]

    assert len({source.sha256() for source in sources}) == 4
    assert sources[0].sha256() == seeded_source("moe3d-tiny", tiny).sha256()


def test_a_config_that_is_no_preset_is_not_called_one() -> None:
    assert seeded_source("moe3d-tiny", PRESETS["moe3d-tiny"], 3).origin == "preset:moe3d-tiny seed 3"
    assert seeded_source("mine", PRESETS["moe3d-tiny"], 3).origin == "seeded:mine seed 3"


def test_a_negative_seed_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="seed -2 is negative"):
        seeded_source("moe3d-tiny", PRESETS["moe3d-tiny"], -2)


def test_model_shapes_can_be_changed_by_the_caller() -> None:
    shapes = model_shapes(PRESETS["moe3d-tiny"])
    shapes.clear()

    assert model_shapes(PRESETS["moe3d-tiny"])["depth_head.gate.2.weight"] == (MoeConfig().num_experts, 32, 1, 1)

"""Pickled state dicts: refused unless asked for, their code never run, what they hold read as from any other file."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import NORM, small, tensors, write_config

from moe3d_deploy.checkpoint import VGGT_LICENCE, load_model, open_checkpoint
from moe3d_deploy.checkpoint_pickle import read_pickle
from moe3d_deploy.errors import CheckpointError, Moe3dWarning

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


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {"a": 1},
        {"a": torch.arange(3)},
        {3: torch.ones(1)},
        torch.ones(2),
        {"a": torch.ones(2, device="meta")},
        {"a": torch.ones(2).to(torch.float8_e4m3fn)},
        {"a": torch.ones(2).to_sparse()},
    ],
)
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


def test_the_loader_is_asked_once_and_only_for_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No second try with weights_only off, whatever the first one says."""
    asked: list[object] = []

    def load(path: Path, **options: object) -> None:
        asked.append(options["weights_only"])
        raise pickle.UnpicklingError("unsupported global: builtins.eval")

    torch.save(STATE, tmp_path / "model.pt")
    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(CheckpointError, match="holds more than tensors, which could run code; it was not loaded, use"):
        read_pickle(tmp_path / "model.pt")
    assert asked == [True]


# As a checkpoint


@pytest.mark.parametrize("name", ["model.pt", "last.pth", "epoch=3.ckpt", "pytorch_model.bin"])
def test_pickles_are_refused_unless_asked_for(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    torch.save({"model": tensors(small())}, path)

    with pytest.raises(
        CheckpointError,
        match=rf"{name}: a pickle can run code .*, or if you must: moe3d convert .*{name} --allow-pickle -o FOLDER",
    ):
        open_checkpoint(path, config=small().config)
    with pytest.warns(Moe3dWarning, match="is a pickle"):
        source = open_checkpoint(path, config=small().config, allow_pickle=True)
    assert source.shapes() == small().shapes()
    assert source.licence == VGGT_LICENCE
    assert torch.equal(source.tensor(NORM), small().tensor(NORM))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_pickle_of_half_precision_with_prefixes_loads(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {f"module.model.{name}": tensor.to(dtype) for name, tensor in tensors(small()).items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "model.pt")
    write_config(tmp_path, small().config)

    source = open_checkpoint(tmp_path / "model.pt", allow_pickle=True)

    assert source.tensor(NORM).dtype == dtype
    assert torch.equal(load_model(source).state_dict()[NORM], small().tensor(NORM).to(dtype).float())


def test_a_folder_with_nothing_but_a_pickle_names_it(tmp_path: Path) -> None:
    torch.save(STATE, tmp_path / "model.pt")

    with pytest.raises(
        CheckpointError, match=r"holds no model\.safetensors \(it has model\.pt\); name a checkpoint fold"
    ):
        open_checkpoint(tmp_path, allow_pickle=True)

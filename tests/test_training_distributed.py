"""Two processes on the CPU train as one does, and the device is chosen or refused."""

import sys
from pathlib import Path

import pytest
import torch
from survival import run_program
from trainings import FLAGS, run, short, state_of, tiny_checkpoint

from moe3d_deploy.errors import InputError
from moe3d_deploy.training.distributed import process_group
from moe3d_deploy.training.logs import read_log

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "moe3d_deploy"]


def test_two_processes_are_one_up_to_rounding(tmp_path: Path) -> None:
    """The gradients are summed in another order: 1e-5 of the first step's, of which the optimizer takes the sign."""
    source = tiny_checkpoint(tmp_path / "tiny")
    (tmp_path / "work").mkdir()
    arguments = ["train", source, *FLAGS, "--steps=2", "-o", tmp_path / "two"]
    ended = run_program(TORCHRUN, arguments, tmp_path / "work", OMP_NUM_THREADS="1")
    assert ended.code == 0, ended.errors
    run(short(source, steps=2), tmp_path / "one")
    one, two = (read_log(tmp_path / name / "train.jsonl", "step") for name in ("one", "two"))
    for key in ("loss", "depth", "camera", "gradient_norm"):
        assert two[0][key] == pytest.approx(one[0][key], rel=1e-5)
        assert two[1][key] == pytest.approx(one[1][key], rel=1e-2)
    assert two[0]["expert_usage"] == pytest.approx(one[0]["expert_usage"], rel=1e-5)
    moments = {name: tensor for name, tensor in state_of(tmp_path / "one").tensors.items() if ".exp_avg." in name}
    assert moments
    for name, tensor in moments.items():
        other = state_of(tmp_path / "two").tensors[name]
        assert float((other - tensor).abs().max()) < 1e-2 * float(tensor.abs().max()) + 1e-9, name


def test_a_step_that_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(InputError, match="a micro-batch of 3 scenes cannot be shared by 2 processes; change --batch"),
        process_group("cpu", 3),
    ):
        pass


@pytest.mark.parametrize(("name", "text"), [
    ("gpu", "device 'gpu' is unknown; use auto, cpu, cuda or cuda:N"),
    ("meta", "device 'meta' is not supported; use auto, cpu, cuda or cuda:N"),
])  # fmt: skip
def test_a_device_that_does_not_exist_is_refused(name: str, text: str) -> None:
    with pytest.raises(InputError) as caught, process_group(name, 1):
        pass
    assert str(caught.value) == text


def test_a_cuda_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="torch sees no CUDA device; use --device cpu"), process_group("cuda", 1):
        pass
    with process_group("auto", 1) as group:
        assert group.device.type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with (
        pytest.raises(InputError, match="cuda:2 asked for, this machine has 2 CUDA devices"),
        process_group("cuda:2", 1),
    ):
        pass
    with process_group("auto", 1) as group:
        assert group.device == torch.device("cuda", 0)

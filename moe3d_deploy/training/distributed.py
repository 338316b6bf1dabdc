"""Several processes, one per device, as torchrun starts them: each takes its share of every step.

A step is the same whatever the number of processes: gradients and losses are means over all of its scenes.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe3d_deploy.errors import InputError


@dataclass(frozen=True)
class Group:
    """This process's number, how many there are, and its device."""

    rank: int
    processes: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def mean(self, values: Tensor) -> Tensor:
        """The mean over all processes, in place; every one of them has to ask."""
        if self.processes > 1:
            dist.all_reduce(values)
            values /= self.processes
        return values

    def barrier(self) -> None:
        if self.processes > 1:
            dist.barrier()


@contextmanager
def process_group(device: str, share: int) -> Iterator[Group]:
    """Join the processes that torchrun started; alone without it.

    device  "auto" (CUDA where there is a device), "cpu", "cuda" or "cuda:N"; of several processes each takes its own
    share   what every step is cut into has to be a multiple of the processes: scenes of a micro-batch

    Raises InputError for a device that is not there or a step that cannot be shared.
    """
    processes, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    chosen = _device(device, local if processes > 1 else None)
    if processes == 1:
        yield Group(0, 1, chosen)
        return
    if share % processes:
        raise InputError(f"a micro-batch of {share} scenes cannot be shared by {processes} processes; change --batch")
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        group = Group(dist.get_rank(), processes, chosen)
        yield group
        # DistributedDataParallel keeps gloo's threads alive past destroy_process_group (torch 2.13). One of them that
        # still holds the last gradients when the interpreter ends aborts the process ("terminate called without an
        # active exception"). A barrier holds no tensor, and the threads drop theirs while it waits.
        group.barrier()
    finally:
        dist.destroy_process_group()


def _device(name: str, local_rank: int | None) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"device {name!r} is unknown; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise InputError(f"device {name!r} asked for, but torch sees no CUDA device; use --device cpu")
    index = device.index if device.index is not None else (local_rank or 0)
    if index >= torch.cuda.device_count():
        raise InputError(f"cuda:{index} asked for, this machine has {torch.cuda.device_count()} CUDA devices")
    return torch.device("cuda", index)

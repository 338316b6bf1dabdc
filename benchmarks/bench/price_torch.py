"""The subjects that PyTorch runs: the dense head on tokens, or the whole model with one last stage after the other."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from moe3d_deploy.benchmarks import torch_device
from moe3d_deploy.benchmarks.activation_memory import allocated
from moe3d_deploy.benchmarks.bench.price import HEAD, Shape
from moe3d_deploy.benchmarks.bench.price_forms import (
    Completed,
    Maps,
    StageAsMixture,
    last_stages,
    load_head,
    load_single,
    random_levels,
    whole_head,
)
from moe3d_deploy.benchmarks.timing import Timer
from moe3d_deploy.checkpoint import load_model
from moe3d_deploy.config import MoeConfig
from moe3d_deploy.export.precision import PrecisionPolicy
from moe3d_deploy.export.source import SourceSpec
from moe3d_deploy.model import MoE3D
from moe3d_deploy.model.dpt import Grid


class TorchSubject:
    """Forms of one head as calls on the device. `renew` gives all of them the same new inputs."""

    activations_by = "allocator"

    def __init__(
        self, calls: Mapping[str, Callable[[], Maps]], renew: Callable[[int], None], device: torch.device
    ) -> None:
        self.forms = tuple(calls)
        self.renew = renew
        self._calls = calls
        self.device = device.type
        self.threads = int(torch.get_num_threads())
        self._device = device

    def timer(self, form: str) -> Timer:
        return torch_device.timer(partial(_quietly, self._calls[form]), self._device)

    def activations(self, form: str) -> tuple[list[NDArray[Any]], int]:
        """One run: depth and confidence, and the most bytes of tensors alive at once in it."""
        kept: list[Maps] = []

        def run() -> None:
            kept[:] = [_quietly(self._calls[form])]

        if self._device.type == "cpu":
            peak = allocated(run)
        else:
            with torch_device.PeakMemory(self._device) as memory:
                held = torch.cuda.memory_allocated()
                run()
                torch.cuda.synchronize()
            peak = (memory.allocated_bytes or 0) - held
        return [tensor.float().cpu().numpy() for tensor in kept[0]], peak


def torch_subject(
    source: SourceSpec,
    part: str,
    moe: MoeConfig,
    shape: Shape,
    *,
    precision: str,
    library: Path | None,
    threads: int | None,
    device: torch.device,
) -> TorchSubject:
    """The forms on random inputs of a shape (B, S, H, W): HEAD on tokens, MODEL on images. On a GPU TF32 is off."""
    if threads is not None:
        torch.set_num_threads(threads)
    torch_device.set_exact_float32()
    dtype_of = PrecisionPolicy(precision).dtype_of()
    base = source.open()
    single = load_single(Completed.of(base, None), dtype_of).to(device)
    whole = Completed.of(base, moe)
    if part == HEAD:
        return _of_head(whole, single, shape, dtype_of, library, device)
    model = load_model(whole, dtype_of=dtype_of).to(device)
    stages = last_stages(model.depth_head, single, library)
    images = torch.empty((*shape[:2], 3, *shape[2:]), device=device)

    def renew(seed: int) -> None:
        images.uniform_(generator=torch.Generator(device).manual_seed(seed))

    calls = {form: partial(_run_model, model, images, StageAsMixture(stage)) for form, stage in stages.items()}
    return TorchSubject(calls, renew, device)


def _of_head(
    source: Completed,
    single: torch.nn.Module,
    shape: Shape,
    dtype_of: Callable[[str], torch.dtype],
    library: Path | None,
    device: torch.device,
) -> TorchSubject:
    config = source.config
    head = load_head(source, dtype_of).to(device)
    grid = Grid(*(pixels // config.patch_size for pixels in shape[2:]))
    levels: list[Tensor] = []

    def renew(seed: int) -> None:
        levels[:] = random_levels(config, shape[0] * shape[1], grid, device, seed)

    stages = last_stages(head, single, library)
    return TorchSubject(
        {form: partial(whole_head, head, levels, grid, stage) for form, stage in stages.items()}, renew, device
    )


def _run_model(model: MoE3D, images: Tensor, stage: StageAsMixture) -> Maps:
    model.depth_head.merged = stage  # type: ignore[assignment]
    outputs = model(images)
    return outputs["depth"].flatten(0, 1), outputs["depth_conf"].flatten(0, 1)


def _quietly(call: Callable[[], Maps]) -> Maps:
    with torch.inference_mode():
        return call()

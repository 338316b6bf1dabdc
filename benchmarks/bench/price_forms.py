"""The last stage of a depth head in every form that PyTorch runs, on one set of weights; and where those come from."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moe3d_deploy.benchmarks.bench.price import KERNEL, MERGED, PLAIN, SINGLE
from moe3d_deploy.config import ModelConfig, MoeConfig
from moe3d_deploy.model.dpt import OUTPUT_HIDDEN, DptHead, Grid, activate_depth
from moe3d_deploy.model.experts import MergedExperts, Mixture, branch, mix
from moe3d_deploy.native.torch_op import KernelExperts
from moe3d_deploy.weight_sources import WeightSource, model_shapes, seeded_source, sha256_text

Maps = tuple[Tensor, Tensor]  # depth, confidence (N, H, W)
LastStage = Callable[[Tensor], Maps]  # from full-resolution features (N, C, H, W)

HEAD_PREFIX = "depth_head."
_SINGLE_PREFIX = f"{HEAD_PREFIX}scratch.output_conv2."
_FIRST_PREFIX = f"{HEAD_PREFIX}experts.0."


def last_stages(head: DptHead, single: nn.Module, library: Path | None) -> dict[str, LastStage]:
    """By form, of an unmerged head; the kernel's only with its library.

    single   VGGT's own last stage: features to raw depth and confidence
    """
    if head.moe is None:
        raise ValueError("a head without experts has nothing to compare")
    experts, gate, temperature = head.experts, head.gate, head.moe.temperature
    merged = MergedExperts(experts, gate, head.moe)

    def plain(features: Tensor) -> Mixture:
        raw = torch.stack([expert(features) for expert in experts], dim=1)
        return mix(raw, gate(features), temperature)

    stages: dict[str, LastStage] = {
        SINGLE: lambda features: activate_depth(single(features)),
        PLAIN: lambda features: plain(features)[:2],
        MERGED: lambda features: merged(features)[:2],
    }
    if library is not None:
        kernel = KernelExperts(merged, library)
        stages[KERNEL] = lambda features: kernel(features)[:2]
    return stages


class StageAsMixture(nn.Module):
    """A last stage as `DptHead.merged`, so that a whole model runs with it; its weights stay where they are."""

    def __init__(self, stage: LastStage) -> None:
        super().__init__()
        self._stage = stage

    def forward(self, features_NCHW: Tensor) -> Mixture:
        depth, confidence = self._stage(features_NCHW)
        return Mixture(depth, confidence, depth.new_empty(0), depth.new_empty(0))


def whole_head(head: DptHead, levels_NPD: list[Tensor], grid: Grid, stage: LastStage) -> Maps:
    """From the patch tokens of the four depths on."""
    return stage(head.features(levels_NPD, grid))


def random_levels(config: ModelConfig, images: int, grid: Grid, device: torch.device, seed: int) -> list[Tensor]:
    """Random patch tokens (images, P, D) of the four depths. The head begins with a norm: any scale does."""
    generator = torch.Generator(device).manual_seed(seed)
    shape = (images, grid.h * grid.w, config.dpt_head.dim_in)
    return [torch.randn(shape, device=device, generator=generator) for _ in range(4)]


@dataclass(frozen=True, eq=False)
class Completed(WeightSource):
    """A checkpoint's weights for another last stage: what it has is taken, the rest is seeded.

    VGGT's last stage and the first expert stand for each other where they are equally wide.
    """

    base: WeightSource

    @classmethod
    def of(cls, base: WeightSource, moe: MoeConfig | None) -> "Completed":
        config = dataclasses.replace(base.config, moe=moe, point_head=False)
        return cls(config, base.name, base.origin, base.licence, base)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return model_shapes(self.config)

    def tensor(self, name: str) -> Tensor:
        if found := self._found(name):
            return self.base.tensor(found)
        return seeded_source(self.name, self.config).tensor(name)

    def sha256(self) -> str:
        return sha256_text(f"{self.base.sha256()} {self.config.moe} completed v1")

    @property
    def seeded(self) -> bool:
        """Whether anything is."""
        return not all(map(self._found, self.shapes()))

    def _found(self, name: str) -> str | None:
        """The checkpoint's tensor that serves as this one."""
        names = [name]
        for one, other in ((_SINGLE_PREFIX, _FIRST_PREFIX), (_FIRST_PREFIX, _SINGLE_PREFIX)):
            if name.startswith(one):
                names.append(other + name.removeprefix(one))
        held, wanted = self.base.shapes(), self.shapes()[name]
        return next((held_name for held_name in names if held.get(held_name) == wanted), None)


def load_head(source: WeightSource, dtype_of: Callable[[str], torch.dtype]) -> DptHead:
    """The depth head alone, as the source's config has it."""
    config = source.config
    with torch.device("meta"):
        head = DptHead(config.dpt_head, config.patch_size, 2, config.moe)
    names = {name: HEAD_PREFIX + name for name in head.state_dict()}
    head.load_state_dict({name: source.tensor(key).to(dtype_of(key)) for name, key in names.items()}, assign=True)
    return head.eval().requires_grad_(False)


def load_single(source: WeightSource, dtype_of: Callable[[str], torch.dtype]) -> nn.Sequential:
    """VGGT's last stage alone, of a source whose config has no experts."""
    with torch.device("meta"):
        single = branch(source.config.dpt_head.features // 2, OUTPUT_HIDDEN, 2)
    names = {name: _SINGLE_PREFIX + name for name in single.state_dict()}
    single.load_state_dict({name: source.tensor(key).to(dtype_of(key)) for name, key in names.items()}, assign=True)
    return single.eval().requires_grad_(False)

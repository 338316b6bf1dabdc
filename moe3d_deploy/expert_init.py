"""MoE3D weights from VGGT's: the depth head's last stage becomes experts and a gate, ready to be trained."""

import dataclasses
import math
import re
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe3d_deploy.checkpoint_sizes import check_modest
from moe3d_deploy.config import MoeConfig
from moe3d_deploy.errors import CheckpointError, InputError
from moe3d_deploy.seeded import seed_salt
from moe3d_deploy.weight_sources import WeightSource, model_shapes, sha256_text

_VGGT_LAST_STAGE = "depth_head.scratch.output_conv2."
_EXPERT_KEY = re.compile(r"depth_head\.experts\.\d+\.(.+)")


def convert_to_moe(
    source: WeightSource,
    *,
    num_experts: int = 4,
    noise: float = 0.01,
    seed: int = 0,
    temperature: float = 1.0,
) -> WeightSource:
    """VGGT's weights with its depth head's last stage turned into `num_experts` experts and a gate.

    An expert is a copy plus Gaussian noise of `noise` times the tensor's own standard deviation, so that experts
    can drift apart in training. The gate's last convolution is zero: the mix starts out uniform. A source that has
    as many experts already, at the same temperature, is returned as it is.

    Raises CheckpointError for a source with other experts, InputError for a number that makes no sense.
    """
    if not (math.isfinite(noise) and noise >= 0):
        raise InputError(f"expert noise must be a number >= 0, got {noise}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise InputError(f"gate temperature must be a number > 0, got {temperature}")
    seed_salt(seed)
    if source.config.moe is not None:
        held = source.config.moe
        for what, has, asked in (
            ("experts", held.num_experts, num_experts),
            ("gate temperature", held.temperature, temperature),
        ):
            if has != asked:
                raise CheckpointError(
                    f"{source.name} already has {what} {has}, asked for {asked}: experts are made from VGGT's depth "
                    f"head only; start from VGGT weights, or keep the head as it is"
                )
        return source
    hidden = source.shapes()[_VGGT_LAST_STAGE + "0.weight"][0]
    moe = MoeConfig(num_experts, hidden_channels=hidden, temperature=temperature)
    config = dataclasses.replace(source.config, moe=moe)
    check_modest(config)
    return _ExpertSource(
        config=config,
        name=f"{source.name}-moe{num_experts}",
        origin=f"{source.origin}, {num_experts} experts added (noise {noise:g}, seed {seed})",
        licence=source.licence,
        base=source,
        noise=noise,
        seed=seed,
    )


@dataclass(frozen=True, eq=False)
class _ExpertSource(WeightSource):
    base: WeightSource
    noise: float
    seed: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return model_shapes(self.config)

    def tensor(self, name: str) -> Tensor:
        if match := _EXPERT_KEY.fullmatch(name):
            copied = self.base.tensor(_VGGT_LAST_STAGE + match[1]).double()
            return (copied + self.noise * copied.std(correction=0) * self._normal(name)).float()
        if name.startswith("depth_head.gate."):
            return self._gate(name)
        return self.base.tensor(name)

    def sha256(self) -> str:
        return sha256_text(f"{self.base.sha256()} {self.config.moe} noise {self.noise!r} seed {self.seed} experts v1")

    def _gate(self, name: str) -> Tensor:
        shape = self.shapes()[name]
        if name != "depth_head.gate.0.weight":
            return torch.zeros(shape)
        return (self._normal(name) / math.sqrt(math.prod(shape[1:]))).float()

    def _normal(self, name: str) -> Tensor:
        generator = np.random.Generator(np.random.PCG64([self.seed, zlib.crc32(name.encode("utf-8"))]))
        return torch.from_numpy(generator.standard_normal(self.shapes()[name]))

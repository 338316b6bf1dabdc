"""A last stage of the depth head on its own, to be trained on the frozen full-resolution features of a model."""

import math
import zlib

import torch
from torch import Tensor, nn

from moe3d_deploy.benchmarks.head_variants import Variant
from moe3d_deploy.model.dpt import activate_depth
from moe3d_deploy.model.experts import branch, mix
from moe3d_deploy.parameter_shapes import DEPTH_CHANNELS
from moe3d_deploy.training.forward import Outputs
from moe3d_deploy.training.initialise import OUTPUT_STD

TEMPERATURE = 1.0  # of the gate


class LastStage(nn.Module):
    """VGGT's two convolutions, or experts and a gate: the same layers and arithmetic as in `MoE3D`."""

    def __init__(self, channels: int, variant: Variant) -> None:
        super().__init__()
        self.experts = nn.ModuleList(branch(channels, variant.hidden, DEPTH_CHANNELS) for _ in range(variant.experts))
        self.gate = branch(channels, variant.gate_hidden, variant.experts) if variant.experts > 1 else None

    def forward(self, features_NCHW: Tensor) -> Outputs:
        """Every view of (N, C, H, W) as a scene of one view; `weights` and `candidates` are None without a gate."""
        raw = torch.stack([expert(features_NCHW) for expert in self.experts], dim=1)
        log_sigma = -raw[:, None, :, 1]
        if self.gate is None:
            depth, confidence = activate_depth(raw[:, 0])
            return Outputs(depth[:, None], confidence[:, None], None, None, log_sigma, [])
        depth, confidence, weights, candidates = (x[:, None] for x in mix(raw, self.gate(features_NCHW), TEMPERATURE))
        return Outputs(depth, confidence, weights, candidates, log_sigma, [])


def fresh_stage(channels: int, variant: Variant, seed: int) -> LastStage:
    """With fresh weights, by the rules of `training.initialise`: Kaiming before the ReLU, a depth of about 1 at first,
    experts that differ, and a gate that weights them equally.

    A tensor's values depend on its name, shape and the seed, so the heads with and without entropy loss start equal.
    """
    with torch.device("meta"):
        stage = LastStage(channels, variant)
    stage.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            stream = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
            if name.endswith("bias") or name == "gate.2.weight":
                parameter.zero_()
            elif name.endswith(".2.weight"):
                nn.init.normal_(parameter, std=OUTPUT_STD, generator=stream)
            else:
                nn.init.normal_(parameter, std=math.sqrt(2 / parameter[0].numel()), generator=stream)
    return stage

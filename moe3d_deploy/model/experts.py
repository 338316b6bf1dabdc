"""The expert mix: K candidate depths per pixel, a softmax gate over them, and the weighted sum.

Two forms of equal algebra: the plain one (a branch per expert and a gate) is trained and stored; the merged one
(one convolution for all branches, then a per-pixel tail) is deployed. Exponential, softmax and sums are float32.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from moe3d_deploy.config import MoeConfig
from moe3d_deploy.model.transformer import in_type_of


class Mixture(NamedTuple):
    """depth, confidence (N, H, W); weights, candidates (depth per expert) (N, K, H, W)."""

    depth: Tensor
    confidence: Tensor
    weights: Tensor
    candidates: Tensor


class Conv2d(nn.Conv2d):
    """A convolution in the dtype of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(in_type_of(self.weight, x))


def branch(channels: int, hidden: int, out: int) -> nn.Sequential:
    """3x3 convolution, ReLU, 1x1 convolution: VGGT's last stage, an expert, and the gate."""
    return nn.Sequential(Conv2d(channels, hidden, 3, padding=1), nn.ReLU(), Conv2d(hidden, out, 1))


def mix(raw_NK2HW: Tensor, logits_NKHW: Tensor, temperature: float) -> Mixture:
    """Mix the experts' raw outputs (log depth, log of confidence - 1). The mix is of activated values.

    The 1 of a confidence stays outside the sum: the weights sum to 1 only up to rounding, and no confidence is below 1.
    """
    raw, logits = _at_least_float32(raw_NK2HW), _at_least_float32(logits_NKHW)
    weights = (logits / temperature).softmax(dim=1)
    candidates = raw[:, :, 0].exp()
    confidence = 1 + (weights * raw[:, :, 1].exp()).sum(1)
    return Mixture((weights * candidates).sum(1), confidence, weights, candidates)


def expert_mix(
    hidden: Tensor,
    expert_weight: Tensor,
    expert_bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
    temperature: float,
) -> Mixture:
    """The per-pixel tail that `moe3d::ExpertMix` computes.

    hidden         (N, K Ce + Cg, H, W)  after the ReLU, any float type: [expert 0 | ... | expert K-1 | gate]
    expert_weight  (K, 2, Ce), expert_bias (K, 2), gate_weight (K, Cg), gate_bias (K)  float32
    """
    experts, _, width = expert_weight.shape
    hidden = hidden.to(expert_weight.dtype)
    of_experts, of_gate = hidden.split([experts * width, gate_weight.shape[1]], dim=1)
    raw = expert_weight @ of_experts.unflatten(1, (experts, width)).flatten(3) + expert_bias[..., None]
    logits = gate_weight @ of_gate.flatten(2) + gate_bias[:, None]
    shape = hidden.shape[2:]
    return mix(raw.unflatten(3, shape), logits.unflatten(2, shape), temperature)


class MergedExperts(nn.Module):
    """The deployment form of `experts` and `gate`: equal weights, other order."""

    def __init__(self, experts: nn.ModuleList, gate: nn.Sequential, config: MoeConfig) -> None:
        super().__init__()
        first = [module[0] for module in (*experts, gate)]
        last = [module[2] for module in experts]  # type: ignore[index]
        self.temperature = config.temperature
        self.conv = Conv2d(first[0].in_channels, sum(c.out_channels for c in first), 3, padding=1, device="meta")
        tensors = {
            "conv.weight": torch.cat([c.weight for c in first]),
            "conv.bias": torch.cat([c.bias for c in first]),
        }
        self.load_state_dict(tensors, assign=True)
        self.expert_weight = nn.Parameter(torch.stack([c.weight[:, :, 0, 0] for c in last]))
        self.expert_bias = nn.Parameter(torch.stack([c.bias for c in last]))
        self.gate_weight = nn.Parameter(gate[2].weight[:, :, 0, 0].clone())  # type: ignore[index]
        self.gate_bias = nn.Parameter(gate[2].bias.clone())  # type: ignore[operator]
        self.requires_grad_(False)

    def hidden(self, features_NCHW: Tensor) -> Tensor:
        """What the tail reads: (N, K Ce + Cg, H, W)."""
        return self.conv(features_NCHW).relu()

    def forward(self, features_NCHW: Tensor) -> Mixture:
        return expert_mix(
            self.hidden(features_NCHW),
            self.expert_weight,
            self.expert_bias,
            self.gate_weight,
            self.gate_bias,
            self.temperature,
        )


def gate_entropy(weights_NKHW: Tensor) -> Tensor:
    """-sum_k w_k log w_k in nats, (N, H, W): 0 where one expert decides, log K where none does."""
    return -(weights_NKHW * weights_NKHW.clamp(min=1e-30).log()).sum(1)


def mixture_variance(mixture: Mixture) -> Tensor:
    """sum_k w_k (D_k - D)^2, (N, H, W), in squared units of depth."""
    return (mixture.weights * (mixture.candidates - mixture.depth[:, None]) ** 2).sum(1)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))

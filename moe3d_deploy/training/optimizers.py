"""The optimizers of a run behind one face: AdamW for all weights, or Muon for the matrices of the transformer blocks.

Muon (Jordan et al. 2024) makes the momentum of a matrix orthogonal before it steps. Its steps are scaled to the size of
AdamW's (Liu et al. 2025), so one learning rate serves both. Both optimizers are torch's own.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from moe3d_deploy.training.options import TrainOptions

_ADAMW_BETAS = (0.9, 0.95)
_MUON_MOMENTUM = 0.95
_BLOCKS = ("blocks.", "trunk.")  # of encoder, aggregator and camera head


class Optimizers:
    """Steps the weights `trained`, by state-dict name, as `options` says."""

    def __init__(self, trained: Mapping[str, nn.Parameter], options: TrainOptions) -> None:
        self._trained = trained
        orthogonal = {name for name in trained if options.optimizer == "muon" and _is_block_matrix(name, trained[name])}
        rest = {name: parameter for name, parameter in trained.items() if name not in orthogonal}
        rate, decay = options.learning_rate, options.weight_decay
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(parameter_groups(rest, decay), lr=rate, betas=_ADAMW_BETAS, fused=True)
        ]
        if orthogonal:
            self.parts.append(
                torch.optim.Muon(
                    [trained[name] for name in trained if name in orthogonal],
                    lr=rate,
                    weight_decay=decay,
                    momentum=_MUON_MOMENTUM,
                    adjust_lr_fn="match_rms_adamw",
                )
            )

    @property
    def learning_rate(self) -> float:
        return float(self.parts[0].param_groups[0]["lr"])

    @learning_rate.setter
    def learning_rate(self, value: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = value

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state(self) -> Iterator[tuple[str, str, Tensor]]:
        """What the optimizers remember: (key, name of the weight, tensor)."""
        for part in self.parts:
            for name, parameter in self._trained.items():
                for key, tensor in part.state.get(parameter, {}).items():
                    yield key, name, tensor

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` gave, as "key.name". Raises KeyError where something is missing."""
        for part in self.parts:
            keys = ("momentum_buffer",) if isinstance(part, torch.optim.Muon) else ("step", "exp_avg", "exp_avg_sq")
            held = {id(parameter) for group in part.param_groups for parameter in group["params"]}
            for name, parameter in self._trained.items():
                if id(parameter) in held:
                    part.state[parameter] = {key: _like(tensors[f"{key}.{name}"], parameter) for key in keys}


def parameter_groups(trained: Mapping[str, nn.Parameter], decay: float) -> list[dict[str, object]]:
    """Weight decay for matrices and kernels alone; none for biases, norms, LayerScale and tokens."""
    decayed = {name for name, p in trained.items() if p.ndim >= 2 and "token" not in name and "pos_embed" not in name}
    return [
        {"params": [p for name, p in trained.items() if name in decayed], "weight_decay": decay},
        {"params": [p for name, p in trained.items() if name not in decayed], "weight_decay": 0.0},
    ]


def _is_block_matrix(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 2 and any(part in name for part in _BLOCKS)


def _like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """On the parameter's device; a tensor of its shape also with its strides, as the optimizer made it."""
    if tensor.shape != parameter.shape:
        return tensor.to(parameter.device)  # the count of steps: the fused optimizer keeps it beside the weights
    return torch.empty_like(parameter).copy_(tensor)

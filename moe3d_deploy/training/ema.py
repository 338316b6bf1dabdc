"""A moving average of the weights in training: what a run's checkpoint holds, steadier than the last step."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from moe3d_deploy.errors import CheckpointError, InputError


class Ema:
    """The average of the parameters of `model` that require a gradient, in float32, on their device.

    Update t = 1, 2, ... sets average = d_t average + (1 - d_t) weights with d_t = min(decay, (t - 1) / (t + 9)).
    d_1 = 0, so the weights before training leave no trace, and early on the average spans the last tenth of the run
    instead of all of it. Source of the warm-up: polynomial-decay averaging, Shamir and Zhang 2013, with eta = 9.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """decay in [0, 1); 0 keeps the last weights. Raises InputError for another, or if nothing is trained."""
        if not 0 <= decay < 1:
            raise InputError(f"decay of the weight average is {decay}; pass a number in [0, 1), such as 0.999")
        self.decay = decay
        self.updates = 0
        self.average = {
            name: p.detach().to(torch.float32, copy=True) for name, p in model.named_parameters() if p.requires_grad
        }
        if not self.average:
            raise InputError("no parameter of this model requires a gradient; choose what to train first")

    def decay_at(self, update: int) -> float:
        """d_t of update t, from 1."""
        return min(self.decay, (update - 1) / (update + 9))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights of `model`, after a step of the optimizer."""
        self.updates += 1
        weights = [p.to(torch.float32) for p in self._parameters(model).values()]
        torch._foreach_lerp_(list(self.average.values()), weights, 1 - self.decay_at(self.updates))

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Overwrite the trained parameters of `model` with their average."""
        for name, parameter in self._parameters(model).items():
            parameter.copy_(self.average[name])

    @contextlib.contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within this context `model` has the averaged weights; afterwards its own again, to the bit."""
        own = {name: p.detach().clone() for name, p in self._parameters(model).items()}
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._parameters(model).items():
                    parameter.copy_(own[name])

    def state_dict(self) -> dict[str, Any]:
        """`updates` and `average`, the tensors by parameter name (not copies): all that `load_state_dict` needs."""
        return {"updates": self.updates, "average": dict(self.average)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken. Raises CheckpointError for tensors of other names or shapes."""
        average: dict[str, Tensor] = state["average"]
        if missing := sorted(average.keys() ^ self.average.keys()):
            raise CheckpointError(
                f"the saved weight average and this run differ in {missing[0]} (and {len(missing) - 1} more): "
                "it belongs to another run"
            )
        for name, tensor in self.average.items():
            if average[name].shape != tensor.shape:
                raise CheckpointError(
                    f"the saved weight average has {name} of shape {tuple(average[name].shape)}, this run "
                    f"{tuple(tensor.shape)}: it belongs to another run"
                )
        for name, tensor in self.average.items():
            tensor.copy_(average[name])
        self.updates = int(state["updates"])

    def _parameters(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """In the order of `average`, whatever requires a gradient by now."""
        held = dict(model.named_parameters())
        if missing := [name for name in self.average if name not in held]:
            raise InputError(f"this model has no {missing[0]}; average the model that the average was made for")
        return {name: held[name] for name in self.average}

"""Which optimizer steps which weight, how far, and what it remembers."""

import dataclasses

import pytest
import torch
from torch import nn
from trainings import SHORT, TINY

from moe3d_deploy.training.forward import trainable_parameters
from moe3d_deploy.training.initialise import new_model
from moe3d_deploy.training.optimizers import Optimizers, parameter_groups

RATE = 1e-3


def trained() -> dict[str, nn.Parameter]:
    return trainable_parameters(new_model(TINY, 0), "all")


def optimizers(weights: dict[str, nn.Parameter], optimizer: str) -> Optimizers:
    options = dataclasses.replace(SHORT, optimizer=optimizer, learning_rate=RATE, weight_decay=0.0)
    return Optimizers(weights, options)


def names_of(part: torch.optim.Optimizer, weights: dict[str, nn.Parameter]) -> set[str]:
    held = {id(p) for group in part.param_groups for p in group["params"]}
    return {name for name, p in weights.items() if id(p) in held}


def test_adamw_alone_steps_everything() -> None:
    weights = trained()
    (part,) = optimizers(weights, "adamw").parts
    assert names_of(part, weights) == set(weights)


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_all_the_rest() -> None:
    weights = trained()
    adamw, muon = (names_of(part, weights) for part in optimizers(weights, "muon").parts)
    assert adamw | muon == set(weights)
    assert not adamw & muon
    leaves = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")
    blocks = (
        "aggregator.patch_embed.blocks.0", "aggregator.frame_blocks.0", "aggregator.global_blocks.0",
        "camera_head.trunk.0",
    )  # fmt: skip
    assert muon == {f"{block}.{leaf}" for block in blocks for leaf in leaves}


def test_a_step_of_muon_has_the_size_of_adamws_and_orthogonal_directions() -> None:
    """0.2 x the learning rate in root mean square, whatever the size of the gradient; five Newton-Schulz iterations
    leave singular values between 0.7 and 1.2 of each other's mean."""
    weights = trained()
    both = optimizers(weights, "muon")
    name = "aggregator.frame_blocks.0.mlp.fc1.weight"
    before = {key: p.detach().clone() for key, p in weights.items()}
    for parameter in weights.values():
        parameter.grad = 1e-4 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    for part in both.parts:
        part.step()
    change = weights[name].detach() - before[name]
    assert change.square().mean().sqrt() == pytest.approx(0.2 * RATE, rel=0.15)
    singular = torch.linalg.svdvals(change)
    assert singular.max() / singular.min() < 2
    bias = "aggregator.frame_blocks.0.mlp.fc1.bias"
    torch.testing.assert_close(
        (weights[bias] - before[bias]).abs(), torch.full_like(before[bias], RATE), rtol=1e-3, atol=0
    )


def test_the_learning_rate_reaches_every_group() -> None:
    both = optimizers(trained(), "muon")
    both.learning_rate = 0.25
    assert {group["lr"] for part in both.parts for group in part.param_groups} == {0.25}
    assert both.learning_rate == 0.25


def test_a_state_that_lacks_a_tensor_is_refused() -> None:
    weights = trained()
    both = optimizers(weights, "muon")
    for parameter in weights.values():
        parameter.grad = torch.ones_like(parameter)
    for part in both.parts:
        part.step()
    tensors = {f"{key}.{name}": tensor for key, name, tensor in both.state()}
    del tensors["momentum_buffer.camera_head.trunk.0.mlp.fc1.weight"]
    with pytest.raises(KeyError, match="momentum_buffer.camera_head.trunk.0.mlp.fc1.weight"):
        optimizers(weights, "muon").restore(tensors)


def test_only_matrices_and_kernels_decay() -> None:
    weights = trained()
    decayed, plain = parameter_groups(weights, 0.1)
    held = {id(p) for p in decayed["params"]}  # type: ignore[attr-defined]
    names = {name for name, p in weights.items() if id(p) in held}
    assert {weights[name].ndim for name in names} == {2, 4}
    assert not [name for name in names if "token" in name or "pos_embed" in name]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)

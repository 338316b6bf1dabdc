"""The average of the weights against its closed form, resumed to the bit, and what it leaves alone."""

import math
import re

import pytest
import torch
from torch import Tensor, nn

from moe3d_deploy.errors import CheckpointError, InputError
from moe3d_deploy.training.ema import Ema


def model_of(value: float, dtype: torch.dtype = torch.float32) -> nn.Linear:
    layer = nn.Linear(2, 1, bias=False, dtype=dtype)
    nn.init.constant_(layer.weight, value)
    return layer


def averaged(values: list[float], decay: float) -> float:
    """The average after the weights were each of `values` in turn."""
    model = model_of(100.0)
    ema = Ema(model, decay)
    for value in values:
        nn.init.constant_(model.weight, value)
        ema.update(model)
    return float(ema.average["weight"][0, 0])


def noisy_step(model: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def test_warm_up_weighs_update_i_by_its_ninth_rising_factorial() -> None:
    """Polynomial-decay averaging with eta = 9: w_i ~ i (i + 1) ... (i + 8), as long as the decay is above d_t."""
    values = [float(3 * i % 7) for i in range(1, 31)]
    weights = [math.prod(range(i, i + 9)) for i in range(1, 31)]
    expected = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)

    assert averaged(values, decay=0.9999) == pytest.approx(expected, rel=1e-6)


def test_later_updates_have_the_decay_that_was_asked_for() -> None:
    """d_t reaches 0.5 at t = 11; 60 updates later, what came before has a share of 2^-60."""
    values = [float(i % 5) for i in range(80)]
    expected = 0.0
    for value in values:
        expected = 0.5 * expected + 0.5 * value

    assert averaged(values, decay=0.5) == pytest.approx(expected, rel=1e-6)


def test_decays_by_hand() -> None:
    ema = Ema(model_of(0.0), 0.9)
    assert [ema.decay_at(t) for t in (1, 2, 11, 91, 92, 10_000)] == [0, 1 / 11, 0.5, 0.9, 0.9, 0.9]


def test_weights_before_training_leave_no_trace() -> None:
    assert averaged([5.0], decay=0.999) == 5.0


def test_decay_zero_keeps_the_last_weights() -> None:
    assert averaged([1.0, 2.0, 3.0], decay=0.0) == 3.0


def test_half_precision_weights_are_averaged_in_float32() -> None:
    """1 and 1 + 2^-7 are neighbours in bfloat16; their average is between them."""
    model = model_of(1.0, torch.bfloat16)
    ema = Ema(model, 0.9)
    ema.update(model)
    nn.init.constant_(model.weight, 1 + 2**-7)
    ema.update(model)

    assert ema.average["weight"].dtype == torch.float32
    torch.testing.assert_close(ema.average["weight"], torch.full((1, 2), 1 + 2**-7 * 10 / 11))
    ema.copy_to(model)
    assert model.weight.dtype == torch.bfloat16


def test_resumed_average_equals_the_uninterrupted_one_to_the_bit() -> None:
    def run(resume_at: int | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model, generator = nn.Linear(5, 3), torch.Generator().manual_seed(1)
        ema = Ema(model, 0.95)
        for step in range(40):
            if step == resume_at:
                saved = ema.state_dict()
                saved = {"updates": saved["updates"], "average": {k: v.clone() for k, v in saved["average"].items()}}
                ema = Ema(model, 0.95)
                ema.load_state_dict(saved)
            noisy_step(model, generator)
            ema.update(model)
        return ema.average

    whole, resumed = run(None), run(13)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_only_what_is_trained_is_averaged_and_overwritten() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    ema = Ema(model, 0.9)
    ema.update(model)
    frozen = model[0].weight.clone()
    noisy_step(model, torch.Generator().manual_seed(0))
    moved = model[0].weight.clone()

    ema.copy_to(model)

    assert set(ema.average) == {"1.weight", "1.bias"}
    assert torch.equal(model[0].weight, moved)
    assert not torch.equal(moved, frozen)
    assert torch.equal(model[1].weight, ema.average["1.weight"])


def test_model_has_the_average_within_the_context_and_its_own_weights_after_it_even_after_an_error() -> None:
    model = model_of(1.0)
    ema = Ema(model, 0.9)
    ema.update(model)
    nn.init.constant_(model.weight, 1.2345678)
    own = model.weight.detach().clone()

    def evaluate() -> None:
        with ema.applied(model):
            assert model.weight.tolist() == [[1.0, 1.0]]
            raise KeyError

    with pytest.raises(KeyError):
        evaluate()

    assert torch.equal(model.weight, own)
    assert model.weight.requires_grad


def test_average_does_not_share_memory_with_the_weights() -> None:
    model = model_of(1.0)
    ema = Ema(model, 0.9)
    nn.init.constant_(model.weight, 2.0)
    assert ema.average["weight"].tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize(
    ("average", "message"),
    [
        ({"bias": torch.zeros(1)}, "the saved weight average and this run differ in bias (and 1 more): it belongs to"),
        ({"weight": torch.zeros(3, 1)}, "has weight of shape (3, 1), this run (1, 2): it belongs to another run"),
    ],
)
def test_average_of_another_run_is_refused_and_changes_nothing(average: dict[str, Tensor], message: str) -> None:
    model = model_of(1.0)
    ema = Ema(model, 0.9)

    with pytest.raises(CheckpointError, match=re.escape(message)):
        ema.load_state_dict({"updates": 7, "average": average})

    assert ema.updates == 0
    assert ema.average["weight"].tolist() == [[1.0, 1.0]]


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan])
def test_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(InputError, match=r"decay of the weight average is .*; pass a number in \[0, 1\)"):
        Ema(model_of(1.0), decay)


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(InputError, match="no parameter of this model requires a gradient"):
        Ema(model_of(1.0).requires_grad_(False), 0.9)


def test_another_model_is_refused() -> None:
    with pytest.raises(InputError, match="this model has no weight"):
        Ema(model_of(1.0), 0.9).update(nn.Sequential(model_of(1.0)))

"""Experts made from VGGT's depth head: copies plus seeded noise under a uniform gate."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from moe3d_deploy.checkpoint import convert_to_moe, load_model
from moe3d_deploy.config import PRESETS, ModelConfig
from moe3d_deploy.errors import CheckpointError, InputError
from moe3d_deploy.weight_sources import WeightSource, model_shapes, seeded_source

LAST_STAGE = "depth_head.scratch.output_conv2."


@pytest.fixture(scope="module")
def vggt(data_dir: Path) -> WeightSource:
    """A small VGGT: the golden files' model."""
    config = json.loads(str(np.load(data_dir / "golden_tiny_1x2x3x56x56.npz")["config"]))
    return seeded_source("small", ModelConfig.from_dict(config))


def test_noiseless_experts_give_vggts_depth(vggt: WeightSource) -> None:
    """K equal experts under any gate are VGGT's head; what is left is float32 rounding of the weighted sum."""
    images = torch.rand((1, 2, 3, 28, 42), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = load_model(vggt)(images)
        mixed = load_model(convert_to_moe(vggt, num_experts=3, noise=0.0))(images)

    torch.testing.assert_close(mixed["depth"], expected["depth"], rtol=1e-6, atol=0)
    torch.testing.assert_close(mixed["depth_conf"], expected["depth_conf"], rtol=1e-6, atol=0)
    assert torch.equal(mixed["pose_enc"], expected["pose_enc"])


def test_the_initial_mix_is_uniform(vggt: WeightSource) -> None:
    model = load_model(convert_to_moe(vggt, num_experts=5))
    with torch.inference_mode():
        weights = model(torch.rand(1, 1, 3, 28, 28), outputs=["expert_weights"])["expert_weights"]

    torch.testing.assert_close(weights, torch.full_like(weights, 0.2))


def test_tensors_are_those_of_the_model_with_that_many_experts(vggt: WeightSource) -> None:
    source = convert_to_moe(vggt, num_experts=6, temperature=0.5)

    assert source.config.moe is not None
    assert (source.config.moe.num_experts, source.config.moe.temperature) == (6, 0.5)
    assert source.shapes() == model_shapes(source.config)
    assert not any(name.startswith(LAST_STAGE) for name in source.shapes())


@pytest.mark.parametrize("part", ["0.weight", "0.bias", "2.weight", "2.bias"])
@pytest.mark.parametrize("noise", [0.01, 0.5])
def test_noise_is_relative_to_the_copied_tensors_spread(vggt: WeightSource, part: str, noise: float) -> None:
    copied = vggt.tensor(LAST_STAGE + part).double()
    source = convert_to_moe(vggt, num_experts=64, noise=noise)
    added = torch.stack([source.tensor(f"depth_head.experts.{k}.{part}").double() - copied for k in range(64)])

    # The standard deviation of n normal samples errs by 1 / sqrt(2 n); five times that.
    margin = 5 / math.sqrt(2 * added.numel())
    assert (added.std() / copied.std(correction=0)).item() == pytest.approx(noise, rel=margin)
    assert abs(added.mean() / added.std()) < 5 / math.sqrt(added.numel())


def test_experts_differ_and_the_seed_decides_how(vggt: WeightSource) -> None:
    first, again, other = (convert_to_moe(vggt, seed=seed) for seed in (3, 3, 4))
    names = [f"depth_head.experts.{k}.0.weight" for k in range(4)] + ["depth_head.gate.0.weight"]

    for name in names:
        assert torch.equal(first.tensor(name), again.tensor(name))
        assert not torch.equal(first.tensor(name), other.tensor(name))
    assert not torch.equal(first.tensor(names[0]), first.tensor(names[1]))


def test_gate_starts_at_the_scale_of_its_fan_in(vggt: WeightSource) -> None:
    source = convert_to_moe(vggt)
    weight = source.tensor("depth_head.gate.0.weight")

    fan_in = math.prod(weight.shape[1:])
    assert weight.std().item() == pytest.approx(1 / math.sqrt(fan_in), rel=5 / math.sqrt(2 * weight.numel()))
    for name in ("0.bias", "2.weight", "2.bias"):
        assert not source.tensor(f"depth_head.gate.{name}").any()


def test_other_tensors_pass_through(vggt: WeightSource) -> None:
    name = "aggregator.frame_blocks.0.attn.qkv.weight"

    assert torch.equal(convert_to_moe(vggt).tensor(name), vggt.tensor(name))


def test_origin_and_digest_tell_what_was_done(vggt: WeightSource) -> None:
    source = convert_to_moe(vggt, num_experts=2, noise=0.1, seed=5)

    assert source.origin == "seeded:small seed 0, 2 experts added (noise 0.1, seed 5)"
    assert source.name == "small-moe2"
    assert source.licence == vggt.licence
    others = (
        convert_to_moe(vggt, num_experts=2, noise=0.1, seed=6),
        convert_to_moe(vggt, num_experts=2, noise=0.2, seed=5),
        convert_to_moe(vggt, num_experts=3, noise=0.1, seed=5),
    )
    assert len({source.sha256(), vggt.sha256(), *(o.sha256() for o in others)}) == 5


def test_experts_that_are_there_already_stay() -> None:
    source = seeded_source("moe3d-tiny", PRESETS["moe3d-tiny"])

    assert convert_to_moe(source, num_experts=4, noise=0.3) is source
    with pytest.raises(CheckpointError, match="moe3d-tiny already has experts 4, asked for 8: .* VGGT"):
        convert_to_moe(source, num_experts=8)
    with pytest.raises(CheckpointError, match=r"already has gate temperature 1\.0, asked for 0\.5"):
        convert_to_moe(source, temperature=0.5)


@pytest.mark.parametrize("noise", [-0.1, math.nan, math.inf])
def test_a_noise_that_makes_no_sense_is_refused(vggt: WeightSource, noise: float) -> None:
    with pytest.raises(InputError, match="expert noise must be a number >= 0, got"):
        convert_to_moe(vggt, noise=noise)


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf])
def test_a_temperature_that_makes_no_sense_is_refused(vggt: WeightSource, temperature: float) -> None:
    with pytest.raises(InputError, match="gate temperature must be a number > 0, got"):
        convert_to_moe(vggt, temperature=temperature)


def test_a_million_experts_are_refused_before_they_are_built(vggt: WeightSource) -> None:
    with pytest.raises(InputError, match=r"moe\.num_experts is 1e\+06, beyond any model \(at most 1000\)"):
        convert_to_moe(vggt, num_experts=10**6)


def test_no_expert_at_all_is_refused(vggt: WeightSource) -> None:
    with pytest.raises(InputError, match="num_experts must be positive, got 0"):
        convert_to_moe(vggt, num_experts=0)


def test_a_source_without_point_head_stays_without(vggt: WeightSource) -> None:
    config = dataclasses.replace(vggt.config, point_head=False)

    assert not any(name.startswith("point_head.") for name in convert_to_moe(seeded_source("x", config)).shapes())

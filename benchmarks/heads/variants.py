"""The depth heads that are compared: their sizes, what each costs, how each is trained and spoken of. No torch."""

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import NamedTuple

from moe3d_deploy import costs
from moe3d_deploy.config import ModelConfig, MoeConfig
from moe3d_deploy.errors import InputError
from moe3d_deploy.parameter_shapes import OUTPUT_HIDDEN, parameter_shapes

SINGLE, NARROW, WIDE, MOE, MOE_ENTROPY = "single", "narrow", "wide", "moe4", "moe4-entropy"
EXPERTS = 4  # of MOE
PRIMARY = "boundary_f1"  # the measure of the comparisons that were chosen before any training
BETTER, WORSE, UNCLEAR = "better", "worse", "no clear difference"
EQUAL_WITHIN = 0.01  # by which the FLOPs of `wide` and `moe4` may differ

_PREFIXES = ("depth_head.experts.", "depth_head.gate.")


@dataclass(frozen=True)
class Variant:
    """A last stage of the depth head: `experts` branches of `hidden` channels and, from two of them on, a gate."""

    name: str
    title: str
    hidden: int
    experts: int = 1
    gate_hidden: int = 0
    entropy_weight: float = 0.0


class Trial(NamedTuple):
    """One training of one head: with which depth loss, from which fresh weights, at which learning rate."""

    loss: str
    seed: int
    variant: Variant
    learning_rate: float

    def __str__(self) -> str:
        return f"{self.loss}-seed{self.seed}-{self.variant.name}-rate{self.learning_rate}"


@dataclass(frozen=True)
class Plan:
    """What every head of a comparison is trained and judged on, and may not differ between the heads of a folder.

    Seeds, losses and learning rates are no part of it: they may be added to a comparison.
    """

    height: int = 126
    width: int = 168
    views: int = 4  # of a scene, in training and when judged
    scenes: int = 225  # distinct ones of training: with their views, a fifth of all steps sees each view once
    steps: int = 1500
    batch: int = 3  # views of a step
    entropy_weight: float = 5e-4  # of MOE_ENTROPY
    validation: int = 16  # scenes by which a head's learning rate is chosen
    judged: int = 32  # scenes of each held-out split


def variants(config: ModelConfig, entropy_weight: float) -> tuple[Variant, ...]:
    """The heads to compare on the features of a model. Experts are as wide as those of `config`, or as MoE3D's.

    Raises InputError where no whole number of channels gives a single head the FLOPs of the experts.
    """
    moe = config.moe or MoeConfig()
    experts = Variant(MOE, f"{EXPERTS} experts and a gate", moe.hidden_channels, EXPERTS, moe.gate_hidden_channels)
    with_entropy = replace(
        experts, name=MOE_ENTROPY, title=f"{experts.title}, entropy loss", entropy_weight=entropy_weight
    )
    single = Variant(SINGLE, "VGGT's single head", OUTPUT_HIDDEN)
    narrow = Variant(NARROW, "a single head as wide as one expert", moe.hidden_channels)
    wide = Variant(WIDE, "a single head of as many FLOPs as the experts", _equal_width(config, experts))
    return (single, *([narrow] if narrow.hidden != single.hidden else []), wide, experts, with_entropy)


def flops_per_pixel(config: ModelConfig, variant: Variant) -> int:
    """Of the last stage alone, on the features of `config`; counted as everywhere (`costs`)."""
    side = config.patch_size
    parts = costs.flops(_with_last_stage(config, variant), 1, 1, side, side)
    gate = parts["depth head gate"] if variant.experts > 1 else 0
    return (parts["depth head experts"] + gate) // side**2


def parameters(config: ModelConfig, variant: Variant) -> int:
    """Of the last stage alone."""
    prefixes = _PREFIXES if variant.experts > 1 else _PREFIXES[:1]
    shapes = parameter_shapes(_with_last_stage(config, variant))
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefixes))


def references(names: Collection[str]) -> list[str]:
    """Of these heads, the single ones that MOE is measured against. First comes the paper's pair, a branch of the size
    of one expert: VGGT's own where experts are as wide as that.
    """
    return [name for name in (NARROW, SINGLE, WIDE) if name in names]


def _equal_width(config: ModelConfig, experts: Variant) -> int:
    """FLOPs of a single head are proportional to its width."""
    goal = flops_per_pixel(config, experts)
    one = flops_per_pixel(config, Variant(WIDE, "", 1))
    width = max(1, round(goal / one))
    if abs(width * one - goal) > EQUAL_WITHIN * goal:
        raise InputError(
            f"a single head {width} channels wide costs {width * one} FLOP per pixel and {EXPERTS} experts {goal}: no "
            f"width comes within {EQUAL_WITHIN:.0%}, so these heads cannot be compared; use a model with wider experts"
        )
    return width


def _with_last_stage(config: ModelConfig, variant: Variant) -> ModelConfig:
    """A single branch is counted as one expert, without the gate that its config has to have."""
    moe = MoeConfig(variant.experts, variant.hidden, variant.gate_hidden or 1)
    return replace(config, moe=moe, point_head=False)

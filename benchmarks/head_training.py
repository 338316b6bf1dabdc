"""Train several heads side by side on one pool of frozen features: every step, each of them sees the same views."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe3d_deploy.benchmarks.head_pool import Pool, view_order
from moe3d_deploy.benchmarks.head_stage import LastStage, fresh_stage
from moe3d_deploy.benchmarks.head_variants import Plan, Variant
from moe3d_deploy.errors import Moe3dError
from moe3d_deploy.training.losses import LossOptions, objective
from moe3d_deploy.training.optimizers import Optimizers
from moe3d_deploy.training.options import TrainOptions
from moe3d_deploy.training.schedules import learning_rate_factor

CURVES = ("depth", "entropy")  # parts of the loss that are kept, before their weights


@dataclass(frozen=True, eq=False)
class TrainedHead:
    """A head and its losses at every step, (steps,) float32 by CURVES; no entropy without a gate."""

    stage: LastStage
    curves: Mapping[str, Tensor]


def train_heads(
    heads: Sequence[Variant],
    pool: Pool,
    plan: Plan,
    loss: str,
    seed: int,
    on_step: Callable[[int, dict[str, float]], None],
) -> dict[str, TrainedHead]:
    """Heads with weights of `seed`, trained from scratch, by their names.

    Neither the views nor their order depend on the seed or on which heads are trained. AdamW without weight decay, a
    warm-up of a twentieth of the steps and a cosine, gradients limited to a norm of 1: equal for all.
    on_step   called after each step with its number, from 1, and the depth losses by head
    Raises Moe3dError for a loss that is not finite.
    """
    options = TrainOptions(
        source="frozen", steps=plan.steps, learning_rate=plan.learning_rate, weight_decay=0.0, depth_loss=loss
    )
    trained = [_Head(head, pool.features.shape[1], seed, options) for head in heads]
    for step, index in enumerate(view_order(plan, len(pool.features))):
        features, targets = pool.batch(index)
        rate = options.learning_rate * learning_rate_factor(
            step, options.warmup_steps, options.steps, options.final_rate
        )
        for head in trained:
            total, parts = objective(head.stage(features), targets, head.loss)
            head.keep(step, float(total.detach()), parts)
            head.optimizers.learning_rate = rate
            head.optimizers.zero_grad()
            total.backward()
            nn.utils.clip_grad_norm_(head.stage.parameters(), options.clip)
            for optimizer in head.optimizers.parts:
                optimizer.step()
        on_step(step + 1, {head.variant.name: head.losses["depth"][-1] for head in trained})
    return {
        head.variant.name: TrainedHead(
            head.stage, {name: torch.tensor(values) for name, values in head.losses.items() if values}
        )
        for head in trained
    }


class _Head:
    def __init__(self, variant: Variant, channels: int, seed: int, options: TrainOptions) -> None:
        self.variant = variant
        self.stage = fresh_stage(channels, variant, seed)
        self.optimizers = Optimizers(dict(self.stage.named_parameters()), options)
        self.loss = LossOptions(depth=options.depth_loss, entropy_weight=variant.entropy_weight)
        self.losses: dict[str, list[float]] = {name: [] for name in CURVES}

    def keep(self, step: int, total: float, parts: Mapping[str, Tensor]) -> None:
        if not math.isfinite(total):
            raise Moe3dError(
                f"step {step + 1}: the loss of the head {self.variant.name} is {total}; use a smaller --learning-rate"
            )
        for name, values in self.losses.items():
            if name in parts:
                values.append(float(parts[name]))

"""A last stage of the depth head on its own, and its training on a pool of frozen features."""

import math
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moe3d_deploy.benchmarks.heads.pool import Pool, view_order
from moe3d_deploy.benchmarks.heads.variants import Plan, Trial, Variant
from moe3d_deploy.errors import Moe3dError
from moe3d_deploy.machine import usable_cores
from moe3d_deploy.model.dpt import activate_depth
from moe3d_deploy.model.experts import branch, mix
from moe3d_deploy.parameter_shapes import DEPTH_CHANNELS
from moe3d_deploy.training.forward import Outputs
from moe3d_deploy.training.initialise import OUTPUT_STD
from moe3d_deploy.training.losses import LossOptions, objective
from moe3d_deploy.training.optimizers import Optimizers
from moe3d_deploy.training.options import TrainOptions
from moe3d_deploy.training.schedules import learning_rate_factor

CURVES = ("depth", "entropy")  # parts of the loss that are kept, before their weights
TEMPERATURE = 1.0  # of the gate
_POLL_SECONDS = 0.5


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


@dataclass(frozen=True, eq=False)
class TrainedHead:
    """A head and its losses at every step, (steps,) float32 by CURVES; no entropy without a gate."""

    stage: LastStage
    curves: Mapping[str, Tensor]


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


def train_head(trial: Trial, pool: Pool, plan: Plan, on_step: Callable[[int], None]) -> TrainedHead:
    """A head trained from scratch as `trial` says.

    Neither the views nor their order depend on the trial. AdamW without weight decay, a warm-up of a twentieth of the
    steps and a cosine, gradients limited to a norm of 1: equal for all.
    on_step   called after each step with its number, from 1
    Raises Moe3dError for a loss that is not finite.
    """
    options = TrainOptions(
        source="frozen",
        steps=plan.steps,
        learning_rate=trial.learning_rate,
        weight_decay=0.0,
        depth_loss=trial.loss,
        entropy_weight=trial.variant.entropy_weight,
    )
    losses = LossOptions(depth=options.depth_loss, entropy_weight=options.entropy_weight)
    stage = fresh_stage(pool.features.shape[1], trial.variant, trial.seed)
    optimizers = Optimizers(dict(stage.named_parameters()), options)
    curves: dict[str, list[float]] = {name: [] for name in CURVES}
    for step, index in enumerate(view_order(plan, len(pool.features))):
        features, targets = pool.batch(index)
        total, parts = objective(stage(features), targets, losses)
        if not total.isfinite():
            raise Moe3dError(
                f"step {step + 1}: the loss of the head {trial.variant.name} at a learning rate of "
                f"{trial.learning_rate} is {total.item()}; leave out this --learning-rate, or use a smaller one"
            )
        for name in CURVES:
            if name in parts:
                curves[name].append(float(parts[name]))
        factor = learning_rate_factor(step, options.warmup_steps, options.steps, options.final_rate)
        optimizers.learning_rate = options.learning_rate * factor
        optimizers.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(stage.parameters(), options.clip)
        for optimizer in optimizers.parts:
            optimizer.step()
        on_step(step + 1)
    return TrainedHead(stage, {name: torch.tensor(values) for name, values in curves.items() if values})


def train_heads(
    trials: Sequence[Trial],
    pool: Pool,
    plan: Plan,
    on_steps: Callable[[int], None],
    on_head: Callable[[Trial, TrainedHead], None],
) -> None:
    """All trials, as many at a time as there are cores, each on one: what comes out does not depend on how many.

    on_steps   called now and then with the steps done of all trials together
    on_head    called with each trial as soon as it is trained

    These convolutions are small: on two threads they take up to three times the processor time (docs/comparison.md).
    Raises Moe3dError as `train_head`; the other trials then end too, as after an interrupt.
    """
    stopped = threading.Event()
    done = dict.fromkeys(trials, 0)

    def train(trial: Trial) -> TrainedHead:
        def on_step(step: int) -> None:
            if stopped.is_set():
                raise _StoppedError
            done[trial] = step

        return train_head(trial, pool, plan, on_step)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(usable_cores(), initializer=torch.set_num_threads, initargs=(1,)) as executor:
            try:
                running = {executor.submit(train, trial): trial for trial in trials}
                while running:
                    for future in wait(running, _POLL_SECONDS, FIRST_COMPLETED).done:
                        on_head(running.pop(future), future.result())
                    on_steps(sum(done.values()))
            finally:
                stopped.set()
                executor.shutdown(wait=False, cancel_futures=True)
    finally:
        torch.set_num_threads(threads)


class _StoppedError(Exception):
    """Ends a thread whose result nobody waits for any more."""

"""What changes over a run: the learning rate and the gate's temperature, as functions of the step alone."""

import math

from moe3d_deploy.errors import InputError


def learning_rate_factor(step: int, warmup: int, total: int, floor: float = 0.0) -> float:
    """What the learning rate is multiplied with at `step` (from 0) of `total`: a linear rise, then half a cosine.

    (step + 1) / warmup during the first `warmup` steps, then floor + (1 - floor) (1 + cos(pi p)) / 2 with
    p = (step - warmup) / (total - warmup); `floor` from step `total` on.
    Source: cosine annealing, Loshchilov and Hutter 2017 (SGDR), without restarts.
    """
    if total < 1 or not 0 <= warmup <= total:
        raise InputError(f"warm-up of {warmup} steps in a run of {total}: pass 0 <= warm-up <= steps, steps >= 1")
    if not 0 <= floor <= 1:
        raise InputError(f"floor of the learning rate is {floor}; pass a share of the learning rate, 0 to 1")
    _require_step(step)
    if step >= total:
        return floor
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / (total - warmup)
    return floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2


def temperature_at(step: int, total: int, start: float, end: float) -> float:
    """The gate's temperature at `step` (from 0) of `total`: geometric from `start` to `end`, which the last step has.

    start^(1 - p) end^p with p = step / (total - 1), so that equal numbers of steps sharpen the gate by equal factors.
    The paper anneals, but its schedule is not known: this one is this project's. start = end keeps it constant.
    """
    if total < 1:
        raise InputError(f"a run of {total} steps has no temperature; pass at least 1 step")
    for value in (start, end):
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"gate temperature must be a number > 0, got {value}")
    _require_step(step)
    if step >= total - 1 or start == end:
        return end
    progress = step / (total - 1)
    return start ** (1 - progress) * end**progress


def _require_step(step: int) -> None:
    if step < 0:
        raise InputError(f"step {step} is negative; steps count from 0")

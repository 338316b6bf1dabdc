"""The training loop: steps, saves, validations, and the end by whatever comes first. docs/training.md explains it."""

import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from signal import Signals
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from moe3d_deploy.checkpoint import open_checkpoint
from moe3d_deploy.errors import InputError, Moe3dError
from moe3d_deploy.training.data import Batch, batches, named_deaths, plan_sample, step_numbers
from moe3d_deploy.training.distributed import Group, process_group
from moe3d_deploy.training.logs import RunLog
from moe3d_deploy.training.meter import Meter, time_left
from moe3d_deploy.training.options import TrainOptions
from moe3d_deploy.training.run_folder import RunFolder, open_run
from moe3d_deploy.training.scene_loss import Losses
from moe3d_deploy.training.schedules import learning_rate_factor, temperature_at
from moe3d_deploy.training.stopping import StopRequest
from moe3d_deploy.training.trainee import Trainee
from moe3d_deploy.training.validation import held_out_scenes, validate

OnEvent = Callable[[dict[str, Any]], None]
"""Told what happens: {"label", "text"} for a line that stays, {"step", "total", "detail"} for a bar."""


_VALIDATED = {"abs_rel": "AbsRel", "delta1": "delta", "auc30": "AUC@30"}


class TrainingError(Moe3dError):
    """A training that cannot go on."""


@dataclass(frozen=True)
class Result:
    """Where a run is now: `step` of `total`; the signal that ended it early, if one did."""

    step: int
    total: int
    stopped_by: Signals | None
    resume_command: str


def train(options: TrainOptions, path: Path, on_event: OnEvent = lambda event: None) -> Result:
    """Train, or go on with the run in `path`, until its last step, a signal or the end of `options.minutes`.

    Raises InputError and CheckpointError for what cannot be trained or resumed, TrainingError for a loss that is not
    finite: the last saved state stays. OSError for a disk that is full.
    """
    source = open_checkpoint(options.source)
    _check(options, source.config.patch_size)
    with ExitStack() as stack:
        group = stack.enter_context(process_group(options.device, options.batch // options.accumulate))
        # The first process alone writes; the others wait until it has found the folder to be in order.
        folder = stack.enter_context(open_run(path, options)) if group.is_first else RunFolder(path)
        group.barrier()
        run = _Run(options, Trainee(options, source, group.device, folder), folder, group, on_event)
        stack.callback(run.close)
        with named_deaths():
            return run.until_the_end()


@dataclass(frozen=True)
class _Step:
    """What came out of step `index`, from 0; on the device, so that a look at a value waits for all that is queued."""

    index: int
    losses: Losses  # means over all processes
    norm: Tensor
    per_scene: Tensor  # of this process's scenes


class _Run:
    def __init__(
        self, options: TrainOptions, trainee: Trainee, folder: RunFolder, group: Group, on_event: OnEvent
    ) -> None:
        self.options, self.trainee, self.folder, self.group, self.on_event = options, trainee, folder, group, on_event
        self.told: set[str] = set()
        self.saved: int | None = None
        self.loss = math.nan
        torch.manual_seed(options.seed)
        self.step = trainee.restore()
        if self.step:
            self.saved = self.step
            self._line("resumed", f"{folder.path} at step {self.step} of {options.steps}")
        kind = group.device.type
        # Its processes start here, before there is any other thread.
        self.batches = batches(options, self.step, rank=group.rank, processes=group.processes, device=kind)
        self.module: Any = trainee.loss
        if group.processes > 1:
            devices = [group.device.index] if kind == "cuda" else None
            self.module = DistributedDataParallel(trainee.loss, device_ids=devices)
        self.log = RunLog(folder.path, self.step) if group.is_first else None
        self.meter = Meter()

    def until_the_end(self) -> Result:
        o = self.options
        self._line("training", self.trainee.describe())
        if self.log and not self.log.has_tensorboard:
            self._line("log", "train.jsonl alone; TensorBoard: pip install 'moe3d-deploy[train]'")
        scenes = self._held_out_scenes() if self.step < o.steps else []
        first = self.step
        self.meter = Meter()  # from here on
        with StopRequest(o.minutes) as stop:
            before = None
            while self.step < o.steps:
                step, stopping = self._one_step(stop)
                self.step += 1
                last = self.step == o.steps
                logs = self.step % o.log_every == 0 or last
                validates = bool(scenes) and (last or self.step % o.validate_every == 0)
                saves = self.step % o.save_every == 0 or last or stopping
                # A GPU is still at work on this step. To look at the one before does not let it run dry.
                now = logs or validates or saves
                self._look_at(before, step if now else None)
                before = None if now else step
                self._show()
                if logs:
                    self._log_step(step)
                if validates:
                    self._validate(scenes)
                if saves:
                    self._save()
                if stopping:
                    break
        if self.step == o.steps:
            if self.group.is_first:
                self.trainee.finish()
            if self.saved is not None and first == o.steps:
                self._save_checkpoint()  # a kill may have hit between the last state and its checkpoint
        return Result(self.step, o.steps, stop.number, self.folder.resume_command)

    def close(self) -> None:
        self.batches.close()
        if self.log:
            self.log.close()

    def _one_step(self, stop: StopRequest) -> tuple[_Step, bool]:
        """Queue all of a step, and say whether the run is to end."""
        o, trainee = self.options, self.trainee
        factor = learning_rate_factor(self.step, o.warmup_steps, o.steps, o.final_rate)
        temperature = temperature_at(self.step, o.steps, *trainee.temperatures)
        parts = []
        for index in range(o.accumulate):
            batch = self._next_batch()
            with self._without_sync(index < o.accumulate - 1):
                losses = self.module(batch, temperature)
                (losses.total / o.accumulate).backward()
            parts.append(_detached(losses))
        norm = trainee.update(o.learning_rate * factor)
        trainee.temperature = temperature
        losses, stopping = self._over_processes(_mean(parts), stop.asked)
        self.meter.steps += 1
        return _Step(self.step, losses, norm, torch.cat([p.per_scene for p in parts])), stopping

    def _next_batch(self) -> Batch:
        before = time.monotonic()
        batch = next(self.batches)
        self.meter.waited += time.monotonic() - before
        for note in batch.notes:
            self._note(note)
        return batch.to(self.group.device)

    def _without_sync(self, hold: bool) -> AbstractContextManager[Any]:
        return self.module.no_sync() if hold and self.group.processes > 1 else nullcontext()

    def _over_processes(self, losses: Losses, stop: bool) -> tuple[Losses, bool]:
        """The means over all processes, and whether any of them was asked to stop."""
        if self.group.processes == 1:
            return losses, stop
        values = [torch.tensor(float(stop)), losses.total, *losses.parts.values()]
        packed = torch.stack([value.float().to(self.group.device) for value in values])
        if losses.usage is not None:
            packed = torch.cat([packed, losses.usage.float()])
        packed = self.group.mean(packed)
        count = 2 + len(losses.parts)
        parts = dict(zip(losses.parts, packed[2:count], strict=True))
        usage = None if losses.usage is None else packed[count:]
        return losses._replace(total=packed[1], parts=parts, usage=usage), bool(packed[0] > 0)

    def _look_at(self, *steps: _Step | None) -> None:
        """Stop where a loss or a gradient is no number. The weights have it by then; no save does."""
        for step in steps:
            if step is not None:
                self.loss = float(step.losses.total)
                norm = float(step.norm)
                if not math.isfinite(self.loss):
                    self._stop_at(step, f"the loss is {self.loss}")
                if not math.isfinite(norm):
                    self._stop_at(step, f"the gradient is {norm}")

    def _stop_at(self, step: _Step, what: str) -> NoReturn:
        o, group = self.options, self.group
        numbers = list(step_numbers(o, step.index, group.rank, group.processes))
        bad = [n for n, value in zip(numbers, step.per_scene.tolist(), strict=True) if not math.isfinite(value)]
        plans = [plan_sample(o, number) for number in bad or step_numbers(o, step.index)]
        listed = ", ".join(f"{plan.number} (scene {plan.seed})" for plan in plans)
        left = f"step {self.saved} is saved" if self.saved is not None else "nothing is saved yet"
        raise TrainingError(
            f"step {step.index + 1}: {what}; sample{'s' * (len(plans) > 1)} {listed}. {left.capitalize()}; start a new "
            "phase with a smaller --learning-rate"
        )

    def _show(self) -> None:
        total = self.options.steps
        pace = self.meter.pace
        loss = "" if math.isnan(self.loss) else f"loss {self.loss:.4f}  "
        detail = f"{loss}{pace:.2f} s/step  {time_left(pace * (total - self.step))}"
        self.on_event({"step": self.step, "total": total, "detail": detail})

    def _log_step(self, step: _Step) -> None:
        o, losses = self.options, step.losses
        seconds, waited, steps = self.meter.lap()
        values: dict[str, Any] = {
            **{name: float(value) for name, value in losses.parts.items()},
            "loss": self.loss,
            "learning_rate": self.trainee.learning_rate,
            "gradient_norm": float(step.norm),
            "temperature": self.trainee.temperature,
            "samples_per_second": steps * o.batch / seconds,
            "data_wait_share": waited / seconds,
            "samples": self.step * o.batch,
        }
        if losses.usage is not None:
            values["expert_usage"] = losses.usage.tolist()
        self._write("step", values)

    def _held_out_scenes(self) -> list[Any]:
        if not self.options.validate_every or not self.group.is_first:
            return []
        scenes, notes = held_out_scenes(self.options)
        for note in notes:
            self._note(note)
        return scenes

    def _validate(self, scenes: list[Any]) -> None:
        with self.meter.paused(), self.trainee.averaged() as model:
            errors = validate(model, scenes, self.group.device)
        if self.options.train == "backbone":  # the depth head has not followed
            errors = {name: value for name, value in errors.items() if name == "auc30"}
        self._write("validation", errors)
        text = ", ".join(f"{title} {errors[name]:.4f}" for name, title in _VALIDATED.items() if name in errors)
        self._line("validation", f"step {self.step}: {text} on {len(scenes)} held-out scenes")

    def _save(self) -> None:
        if self.group.is_first:
            with self.meter.paused():
                self.trainee.save_state(self.step)
                self._save_checkpoint()
        self.saved = self.step

    def _save_checkpoint(self) -> None:
        if self.group.is_first:
            self.trainee.save_checkpoint(self.step)

    def _note(self, text: str) -> None:
        """Once per run and process, however often it happens; the log has those of the first process."""
        if text not in self.told:
            self.told.add(text)
            self.on_event({"label": "note", "text": text})
            self._write("note", {"text": text})

    def _line(self, label: str, text: str) -> None:
        if self.group.is_first:
            self.on_event({"label": label, "text": text})

    def _write(self, kind: str, values: dict[str, Any]) -> None:
        if self.log:
            self.log.write(kind, self.step, values)


def _check(options: TrainOptions, patch: int) -> None:
    for height, width in options.shapes:
        if height % patch or width % patch:
            raise InputError(f"shape {height}x{width} is not a multiple of {patch} on both sides; change --shapes")


def _detached(losses: Losses) -> Losses:
    return losses._replace(total=losses.total.detach())


def _mean(parts: list[Losses]) -> Losses:
    if len(parts) == 1:
        return parts[0]
    total = torch.stack([p.total for p in parts]).mean()
    means = {name: torch.stack([p.parts[name] for p in parts]).mean() for name in parts[0].parts}
    usages = [p.usage for p in parts if p.usage is not None]
    return Losses(
        total, torch.cat([p.per_scene for p in parts]), means, torch.stack(usages).mean(0) if usages else None
    )

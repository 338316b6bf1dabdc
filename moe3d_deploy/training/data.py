"""The samples of a run: number n is a function of the options and n alone, whoever computes it and when.

A step takes `batch` consecutive numbers. They have one image shape and one number of views; which scene, which of its
views in which order, mirrored or not, and what colours, is drawn per sample.
"""

import atexit
import functools
import os
import random
import signal
import tempfile
import weakref
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from moe3d_deploy.errors import InputError, Moe3dError, first_line
from moe3d_deploy.training.options import TrainOptions
from moe3d_deploy.training.scene_cache import SceneStore, StoredScene
from moe3d_deploy.training.scenes import SceneOptions
from moe3d_deploy.training.stopping import STOP_SIGNALS

# Mirroring takes pixel u to W - 1 - u, and the principal point from W/2 to W/2 - 1: centres lie at integers, so W/2 is
# not the middle. Of a scene rendered two columns wider, with its principal point at W/2 + 1, columns 1..W are the
# view and columns W+1..2 the mirrored one: in both the point lies at W/2 exactly, where the pose encoding wants it.
MIRROR_MARGIN = 2

# Bytes. The name of a socket, with at most 107, is this and "/pymp-xxxxxxxx/listener-xxxxxxxx".
_LONGEST_TEMPORARY = 70

_MIRROR = torch.tensor([-1.0, 1.0, 1.0])
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


class Jitter(NamedTuple):
    """Of the colours of all views of a sample: v -> (v^gamma * gain - 1/2) * contrast + 1/2, then the saturation."""

    gamma: float
    gain: float
    contrast: float
    saturation: float


@dataclass(frozen=True)
class Plan:
    """How a sample is made: `number` of the run, `seed` of the scene, which of its views, in order.

    original  the number of which this is a repetition, to the bit; `number` itself where samples do not repeat
    """

    number: int
    original: int
    seed: int
    height: int
    width: int
    views: tuple[int, ...]
    mirrored: bool
    jitter: Jitter | None


class Batch(NamedTuple):
    """images (B, S, 3, H, W) in [0, 1], depth (B, S, H, W), extrinsics (B, S, 3, 4), intrinsics (B, S, 3, 3)."""

    images: Tensor
    depth: Tensor
    extrinsics: Tensor
    intrinsics: Tensor
    plans: tuple[Plan, ...]
    notes: tuple[str, ...]

    def to(self, device: torch.device) -> "Batch":
        images, depth, extrinsics, intrinsics = (part.to(device, non_blocking=True) for part in self[:4])
        return Batch(images, depth, extrinsics, intrinsics, self.plans, self.notes)


def plan_sample(options: TrainOptions, number: int) -> Plan:
    """What sample `number` >= 0 of a run is."""
    original = _original(options, number)
    of_step = _stream(options.seed, "step", original // options.batch)
    height, width = options.shapes[of_step.randrange(len(options.shapes))]
    counts = range(options.views[0], options.views[1] + 1)
    (count,) = of_step.choices(counts, weights=counts)  # mostly several: as likely as it is many
    passes, place = divmod(original, options.scene_count)
    of_sample = _stream(options.seed, "sample", original)
    views = of_sample.sample(range(options.scene_views), count)
    mirrored = of_sample.random() < 0.5
    jitter = Jitter(*(of_sample.uniform(low, high) for low, high in ((0.8, 1.25), (0.8, 1.2), (0.8, 1.2), (0.5, 1.3))))
    return Plan(
        number=number,
        original=original,
        seed=int(_order(options.seed, "scenes", passes, options.scene_count)[place]),
        height=height,
        width=width,
        views=tuple(views),
        mirrored=mirrored and options.mirror,
        jitter=jitter if options.jitter else None,
    )


def make_sample(plan: Plan, scene: StoredScene) -> StoredScene:
    """The views of `plan` from its scene, which is MIRROR_MARGIN wider where the run mirrors; images become float32."""
    index = torch.tensor(plan.views)
    images, depth, extrinsics, intrinsics = (part[index] for part in scene)
    if scene.depth.shape[-1] != plan.width:
        columns = torch.arange(plan.width + 1, 1, -1) if plan.mirrored else torch.arange(1, plan.width + 1)
        images, depth = images[..., columns], depth[..., columns]
        intrinsics = intrinsics.clone()
        intrinsics[:, 0, 2] = plan.width + 1 - intrinsics[:, 0, 2] if plan.mirrored else intrinsics[:, 0, 2] - 1
    if plan.mirrored:  # world and camera: R' = M R M, t' = M t
        flip = torch.cat([_MIRROR, torch.ones(1)])
        extrinsics = extrinsics * _MIRROR[:, None] * flip
    return StoredScene(_colours(images, plan.jitter), depth, extrinsics, intrinsics)


def scene_store(
    options: TrainOptions, height: int, width: int, *, split: str = "train", views: int | None = None
) -> SceneStore:
    """The scenes from which samples of a shape are made; other splits are as wide as their images."""
    margin = MIRROR_MARGIN if options.mirror and split == "train" else 0
    scenes = SceneOptions(
        height=height,
        width=width + margin,
        views=views or options.scene_views,
        split=split,
        photographs=options.photographs,
        camera_effects=options.camera_effects,
    )
    folder = Path(options.scene_cache) if options.scene_cache else None
    return SceneStore(scenes, folder, round(options.scene_cache_gb * 1e9))


class Samples(Dataset[Batch | Exception]):
    """The samples of a run by their numbers, each as a batch of one."""

    def __init__(self, options: TrainOptions) -> None:
        self.options = options
        self.stores = {shape: scene_store(options, *shape) for shape in options.shapes}

    def __getitem__(self, number: int) -> Batch | Exception:
        """An error is returned: one that is raised in a process of torch's loader arrives as text."""
        plan = plan_sample(self.options, number)
        try:
            scene, notes = self.stores[plan.height, plan.width].get(plan.seed)
        except (Moe3dError, OSError) as error:
            return error
        images, depth, extrinsics, intrinsics = (part[None] for part in make_sample(plan, scene))
        return Batch(images, depth, extrinsics, intrinsics, (plan,), tuple(notes))


def step_numbers(options: TrainOptions, step: int, rank: int = 0, processes: int = 1) -> range:
    """The samples of step `step` >= 0 that process `rank` of `processes` takes."""
    share = options.batch // processes
    start = step * options.batch + rank * share
    return range(start, start + share)


def batches(
    options: TrainOptions, first_step: int, *, rank: int = 0, processes: int = 1, device: str = "cpu"
) -> Generator[Batch, None, None]:
    """The micro-batches of this process from `first_step` to the last step, `accumulate` of them for each.

    Made in `options.workers_for(device, processes)` processes of their own, ahead of time; with 0 in this one. Their
    number changes nothing. The processes start at once, and end with the generator.
    device   "cpu" or "cuda": where the batches will go to
    Raises InputError where the processes cannot start; when their turn comes, what making a sample raised, and
    Moe3dError for a process that died.
    """
    workers = options.workers_for(device, processes)
    if workers and len(os.fsencode(tempfile.gettempdir())) > _LONGEST_TEMPORARY:
        raise InputError(
            f"the temporary folder {tempfile.gettempdir()} has too long a name for the sockets of processes that make "
            "samples; set TMPDIR to a shorter one, or use --workers 0"
        )
    numbers = _MicroBatches(options, first_step, rank, processes)
    loader = DataLoader(
        Samples(options),
        batch_sampler=numbers,
        num_workers=workers,
        collate_fn=_together,
        pin_memory=device == "cuda",
        prefetch_factor=4 if workers else None,
        worker_init_fn=_start_worker,
        multiprocessing_context="fork" if workers else None,
        generator=torch.Generator(),  # else it draws from the global stream
    )
    made = _raising(iter(loader))
    if workers:  # at an exit in the middle, before multiprocessing's own end: that would terminate them, and wait
        atexit.register(_close, weakref.ref(made))
    return made


@contextmanager
def named_deaths() -> Iterator[None]:
    """Raise Moe3dError for a process of `batches` that dies: torch says so wherever this process is at the time."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise Moe3dError(f"a process that makes samples has died ({first_line(error)}); use fewer --workers") from error


def _raising(made: Iterator[Batch | Exception]) -> Generator[Batch, None, None]:
    try:
        while True:
            with named_deaths():
                batch = next(made, None)
            if batch is None:
                return
            if isinstance(batch, Exception):
                raise batch
            yield batch
    finally:
        # Now, not when the last one who knows `made` has gone, such as a traceback. torch has no public word for it.
        if isinstance(made, _MultiProcessingDataLoaderIter):
            made._shutdown_workers()


def _close(made: "weakref.ref[Generator[Batch, None, None]]") -> None:
    if (batches_left := made()) is not None:
        batches_left.close()


@dataclass(frozen=True)
class _MicroBatches:
    options: TrainOptions
    first_step: int
    rank: int
    processes: int

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.first_step, self.options.steps):
            numbers = step_numbers(self.options, step, self.rank, self.processes)
            size = len(numbers) // self.options.accumulate
            for start in range(0, len(numbers), size):
                yield list(numbers[start : start + size])

    def __len__(self) -> int:
        return (self.options.steps - self.first_step) * self.options.accumulate


def _together(samples: Sequence[Batch | Exception]) -> Batch | Exception:
    whole = []
    for sample in samples:
        if isinstance(sample, Exception):
            return sample
        whole.append(sample)
    return Batch(
        torch.cat([sample.images for sample in whole]),
        torch.cat([sample.depth for sample in whole]),
        torch.cat([sample.extrinsics for sample in whole]),
        torch.cat([sample.intrinsics for sample in whole]),
        tuple(plan for sample in whole for plan in sample.plans),
        tuple(note for sample in whole for note in sample.notes),
    )


def _start_worker(index: int) -> None:
    """What ends a run often reaches all of its processes; the parent alone decides when, and needs samples till then.

    A process ends when its parent tells it to, or within seconds after its parent has gone: torch's loader sees to it.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _colours(images: Tensor, jitter: Jitter | None) -> Tensor:
    """uint8 (S, 3, H, W) -> float32 in [0, 1].

    By a table of the 256 values, and sums whose order is written out: no bit depends on how many threads do it.
    """
    values = np.arange(256) / 255
    if jitter:
        values = (values**jitter.gamma * jitter.gain - 0.5) * jitter.contrast + 0.5
    result = torch.from_numpy(values.clip(0, 1).astype(np.float32))[images.long()]
    if jitter:
        red, green, blue = (weight * result[:, i] for i, weight in enumerate(_LUMA))
        grey = (red + green + blue)[:, None]
        result = ((result - grey) * jitter.saturation + grey).clamp(0, 1)
    return result


def _original(options: TrainOptions, number: int) -> int:
    """Where samples repeat, the number in the first pass: whole steps of it come again, in another order each time."""
    if not options.repeats_samples:
        return number
    steps = -(-options.scene_count // options.batch)
    step, place = divmod(number, options.batch)
    passes, step = divmod(step, steps)
    if passes:
        step = int(_order(options.seed, "passes", passes, steps)[step])
    return step * options.batch + place


def _stream(seed: int, purpose: str, number: int) -> random.Random:
    return random.Random(
        f"{seed} {purpose} {number}"
    )  # a text is hashed with SHA-512, so that neighbours are unrelated


@functools.lru_cache(maxsize=4)
def _order(seed: int, purpose: str, passes: int, count: int) -> np.ndarray:
    """A random order of range(count)."""
    bits = _stream(seed, purpose, passes).getrandbits(128)
    return np.random.Generator(np.random.PCG64(bits)).permutation(count)

"""One case in one process: load, run, and what it takes. Runs as a child, so that a crash is the case's alone."""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe3d_deploy.benchmarks.bench.ceilings import best
from moe3d_deploy.benchmarks.bench.inputs import FreshImages, FreshPhotographs, comes_from_photographs
from moe3d_deploy.benchmarks.bench.process_memory import HostMemory
from moe3d_deploy.benchmarks.bench.report import PIPELINE_WHOLE, WHOLE, Memory, Round, Shape
from moe3d_deploy.benchmarks.bench.runners import Runner, infer, open_runner
from moe3d_deploy.benchmarks.bench.state import cpu_seconds, machine_state
from moe3d_deploy.benchmarks.timing import Effort, Series, collect_parts
from moe3d_deploy.child import Emit
from moe3d_deploy.image_decode import decode_image
from moe3d_deploy.images import Exif, Fitting, ImageBatch, batch_of, fit
from moe3d_deploy.manifest import Preprocessing
from moe3d_deploy.runtime.outputs import write_scene
from moe3d_deploy.runtime.pixels import to_pixels

_MICROSECOND = 4  # decimals of a millisecond that are kept: a tenth of it
_EXIF: Exif = "apply"


def measure_case(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Child: the `report.Round` of a case, as JSON, and beside its fields the `nodes` of `report.Case`.

    backend, source, options, types, workdir   of `open_runner`
    shape, seed, threads
    effort                     of the runs, `timing.Effort`
    pipeline_runs              of the whole way from files to files
    preprocessing              of the model, `manifest.Preprocessing`
    """

    def step(text: str) -> None:
        emit({"step": text})

    step("loading")
    batch, views, height, width = request["shape"]
    runner = open_runner(
        request["backend"],
        request["source"],
        threads=request["threads"],
        options=request["options"],
        types=request["types"],
        size=(height, width),
        workdir=request["workdir"],
    )
    fitted = request["preprocessing"]
    preprocessing = Preprocessing(**{**fitted, "mean": tuple(fitted["mean"]), "std": tuple(fitted["std"])})
    result = measure(
        runner,
        (batch, views, height, width),
        preprocessing,
        seed=request["seed"],
        effort=Effort(**request["effort"]),
        pipeline_runs=request["pipeline_runs"],
        step=step,
    )
    return {**dataclasses.asdict(result), "nodes": runner.nodes()}


def measure(
    runner: Runner,
    shape: Shape,
    preprocessing: Preprocessing,
    *,
    seed: int,
    effort: Effort,
    pipeline_runs: int,
    step: Callable[[str], None] = lambda text: None,
) -> Round:
    """Measure a runner that is not loaded yet on images of `shape` (B, S, H, W)."""
    memory = HostMemory()
    started = time.perf_counter()
    runner.load()
    load_seconds = time.perf_counter() - started
    memory.after_load()

    images = FreshImages(shape, runner.input_type, seed)
    step("first run")
    started = time.perf_counter()
    infer(runner, images.next())
    first_run_seconds = time.perf_counter() - started
    memory.after_first_run()

    step("runs")
    before, used, started = machine_state(), cpu_seconds(), time.perf_counter()
    series = collect_parts(lambda: infer(runner, images.next())[0], whole=WHOLE, effort=effort)
    cores_used = (cpu_seconds() - used) / (time.perf_counter() - started)
    after = machine_state()
    host, device = memory.figures(), runner.device_memory()

    # From here on other things than the model take memory.
    step("memory, ceilings")
    allocated = runner.allocated_bytes(images.next())
    ceilings = runner.ceilings()
    pipeline = None
    photographs = FreshPhotographs(shape, seed)
    if pipeline_runs and comes_from_photographs(shape, preprocessing):
        step("from files to files")
        # The model is warm; a first pass is still slower, as it makes the folder.
        few = Effort(pipeline_runs, pipeline_runs, warmup_budget_ms=0)
        with tempfile.TemporaryDirectory(prefix="moe3d-bench-") as folder:
            way = _Way(runner, photographs, preprocessing, shape, Path(folder) / "scene")
            pipeline = collect_parts(way.run, whole=PIPELINE_WHOLE, effort=few)
        step("ceilings again")
        ceilings = best(ceilings, runner.ceilings())

    anonymous = host.pop("anonymous_bytes")
    activations = allocated if allocated is not None else anonymous
    by = "allocator" if allocated is not None else "anonymous memory"
    return Round(
        seed=seed,
        device=runner.device,
        load_seconds=round(load_seconds, 3),
        warmup_runs=series[WHOLE].warmup_runs,
        stable=series[WHOLE].stable,
        series=_rounded(series),
        pipeline=_rounded(pipeline) if pipeline else None,
        photographs=str(photographs) if pipeline else None,
        cores_used=round(cores_used, 3),
        threads=runner.threads,
        cuda_graph=runner.cuda_graph,
        memory=Memory(
            **host,  # type: ignore[arg-type]
            weights_bytes=runner.weights_bytes(),
            activations_bytes=activations,
            activations_by=by if activations is not None else None,
            device=device,
        ),
        ceilings=ceilings,
        before=before,
        after=after,
        first_run_seconds=round(first_run_seconds, 3),
    )


class _Way:
    """From the bytes of photographs to the files of `moe3d run`."""

    def __init__(
        self, runner: Runner, photographs: FreshPhotographs, preprocessing: Preprocessing, shape: Shape, folder: Path
    ) -> None:
        self._runner = runner
        self._photographs = photographs
        self._fitting = Fitting(preprocessing.mode, shape[3], preprocessing.patch_size, _EXIF)  # type: ignore[arg-type]
        self._folder = folder

    def run(self) -> dict[str, float]:
        """Milliseconds of every stage and of the whole of one pass."""
        files = self._photographs.next()
        marks = [time.perf_counter()]
        pictures = [[decode_image(file, "photograph", _EXIF) for file in scene] for scene in files]
        marks.append(time.perf_counter())
        batches = [self._batch(scene) for scene in pictures]
        images = self._input(batches)
        marks.append(time.perf_counter())
        _, outputs = infer(self._runner, images)
        marks.append(time.perf_counter())
        for i, batch in enumerate(batches):
            write_scene({name: value[i] for name, value in outputs.items()}, batch, self._folder)
        marks.append(time.perf_counter())
        steps = zip(("decode", "preprocess", WHOLE, "post"), marks, marks[1:], strict=False)
        return {name: 1e3 * (b - a) for name, a, b in steps} | {PIPELINE_WHOLE: 1e3 * (marks[-1] - marks[0])}

    def _batch(self, scene: list[Any]) -> ImageBatch:
        return batch_of([fit(image, f"{i}.jpg", "photograph", self._fitting) for i, image in enumerate(scene)])

    def _input(self, batches: list[ImageBatch]) -> NDArray[Any]:
        images = np.stack([batch.images for batch in batches])
        return to_pixels(images) if self._runner.input_type == "uint8" else images


def _rounded(series: dict[str, Series]) -> dict[str, tuple[float, ...]]:
    return {name: tuple(round(value, _MICROSECOND) for value in item.times_ms) for name, item in series.items()}

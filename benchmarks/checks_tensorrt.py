"""GPU check of TensorRT and its plugin: an engine with and one without it, their depth against PyTorch's, their times.

Everything goes the way of a user: the plugin by CMake, engines by what `moe3d-export` calls, loading by what checks an
engine's record first.
"""

import os
import secrets
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from moe3d_deploy import trt
from moe3d_deploy.benchmarks.bundle_reference import Reference, compare, find_bundle, text
from moe3d_deploy.benchmarks.checks import CheckRun
from moe3d_deploy.benchmarks.checks_engines import shapes_to_try
from moe3d_deploy.benchmarks.timing import Effort, interleave
from moe3d_deploy.bundle import Bundle
from moe3d_deploy.engines.add import add_built_engine
from moe3d_deploy.engines.shapes import Shape4, ShapeProfile
from moe3d_deploy.errors import Moe3dError
from moe3d_deploy.manifest import EngineRecord
from moe3d_deploy.native.build import SOURCES, find_nvcc, run_compiler

BUILDER = "tensorrt"
VARIABLE = "MOE3D_TENSORRT_PLUGIN"  # environment variable: a plugin library to take instead of building one
VIEWS, HEIGHT, WIDTH = "1:2:4", "140:392:518", "140:518:518"

_BRIEF = Effort(budget_ms=2_000.0, warmup_budget_ms=4_000.0)


def tensorrt_plugin(run: CheckRun) -> None:
    """Build both engines, run both on fresh images, compare with PyTorch, time them in turn."""
    trt.require(BUILDER)
    cards = trt.visible_gpus()
    if not cards:
        run.skip("the CUDA driver shows no GPU")
    version = trt.available()[BUILDER]
    run.record(tensorrt=version, card=10 * cards[0][0] + cards[0][1])
    library = trt.PluginLibrary.of(plugin_path(run, version, cards[0]))
    run.record(plugin={"library": library.path.name, "sha256": library.sha256, "tensorrt": library.major})
    bundle = _copy(run, find_bundle(run))
    if (kind := bundle.manifest.inputs[0].dtype) != "float32":
        run.skip(f"the bundle takes {kind} images, and this check gives float32: export without --input")
    reference = Reference(run, bundle.manifest)
    engines = {name: _build(run, bundle, name, plugin) for name, plugin in (("without", None), ("with", library))}
    runners: dict[str, trt.EngineRunner] = {}
    for name, (opened, record) in engines.items():
        run.step(f"loading the engine {name} the plugin")
        path = library.path if name == "with" else None
        runners[name] = trt.EngineRunner.of_bundle(opened, record, plugin=path)
    shapes = shapes_to_try(_profile(bundle))
    compare_with_torch(run, runners, reference, shapes)
    measure(run, runners, shapes)
    for runner in runners.values():
        runner.close()


def plugin_path(run: CheckRun, version: str, card: trt.Capability) -> Path:
    """The library that MOE3D_TENSORRT_PLUGIN names, else one that CMake builds here for this card.

    Skips the check where a tool is missing. Raises Moe3dError where the build fails, or finds no headers.
    """
    if named := os.environ.get(VARIABLE):
        return Path(named)
    cmake, nvcc, project = shutil.which("cmake"), find_nvcc(), SOURCES.parent
    if not (project / "CMakeLists.txt").is_file():
        run.skip(f"engines/native is not here, so the plugin cannot be built: use a checkout, or set {VARIABLE}")
    if cmake is None or nvcc is None:
        run.skip(f"{'cmake' if cmake is None else 'nvcc'} was not found: install it, or set {VARIABLE}")
    out, major = run.work / "native", version.partition(".")[0]
    run.step("building the plugin with CMake")
    options = [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={10 * card[0] + card[1]}"]
    log = run_compiler([cmake, "-S", str(project), "-B", str(out), *options])
    found = out / f"libmoe3d_plugin_trt{major}.so"
    if found.stem.removeprefix("lib") not in log:
        raise Moe3dError(
            f"CMake found no headers of TensorRT {major}: set TENSORRT_INCLUDE_DIR to the folder with NvInfer.h, which "
            f"is in NVIDIA's public repository too, or {VARIABLE} to a plugin library"
        )
    run_compiler([cmake, "--build", str(out), "--target", found.stem.removeprefix("lib")])
    return found


def compare_with_torch(
    run: CheckRun, runners: dict[str, trt.EngineRunner], reference: Reference, shapes: list[Shape4]
) -> None:
    """Every output of both engines against PyTorch's float32, on images nobody has seen; the seed is in the result."""
    seed = secrets.randbits(31)
    found: list[dict[str, Any]] = []
    run.record(seed=seed, shapes=found)
    for shape in shapes:
        images = fresh_images(shape, seed)
        expected = reference.outputs_of(images)
        for name, runner in runners.items():
            label = f"the engine {name} the plugin at {text(shape)}"
            run.step(f"running {label}")
            errors = compare(run, label, runner.run({"images": images}), expected, reference.precision)
            found.append({"shape": list(shape), "engine": name, "errors": errors})
            run.record(shapes=found)


def measure(run: CheckRun, runners: dict[str, trt.EngineRunner], shapes: list[Shape4]) -> None:
    """Milliseconds of a run, NumPy in and out: copies to and from the card are part of both."""
    times = []
    for shape in shapes:
        run.step(f"timing {text(shape)}")
        images = fresh_images(shape, 0)
        ratio = interleave(*(_timer(runners[name], images) for name in ("without", "with")), effort=_BRIEF)
        times.append(
            {
                "shape": list(shape),
                "without_plugin": ratio.first._asdict(),
                "with_plugin": ratio.second._asdict(),
                "with_over_without": ratio.median,
            }
        )
        run.record(times=times)


def fresh_images(shape: Shape4, seed: int) -> np.ndarray:
    """(B, S, 3, H, W) float32 noise in [0, 1)."""
    batch, views, height, width = shape
    return np.random.default_rng([seed, *shape]).random((batch, views, 3, height, width), np.float32)


def _timer(runner: trt.EngineRunner, images: np.ndarray) -> Callable[[], float]:
    def timer() -> float:
        started = time.perf_counter()
        runner.run({"images": images})
        return 1000 * (time.perf_counter() - started)

    return timer


def _copy(run: CheckRun, bundle: Bundle) -> Bundle:
    """The bundle in this run's folder: a user's is left as it is."""
    return Bundle.open(shutil.copytree(bundle.path, run.work / "tensorrt_bundle"), verify="sizes", engines=False)


def _profile(bundle: Bundle) -> ShapeProfile:
    patch = bundle.manifest.config.patch_size
    return ShapeProfile.from_ranges(views=VIEWS, height=HEIGHT, width=WIDTH, patch_size=patch)


def _build(run: CheckRun, bundle: Bundle, name: str, plugin: trt.PluginLibrary | None) -> tuple[Bundle, EngineRecord]:
    """An audited engine in the bundle; the audit fails it where not the plugin ran, or where it did unasked."""
    run.step(f"building the engine {name} the plugin")
    opened, record = add_built_engine(bundle, BUILDER, _profile(bundle), plugin=plugin)
    facts = {"file": record.file, "build": record.build, "audit": record.audit, "plugin": record.plugin}
    run.record(**{f"engine_{name}_plugin": facts})
    _note_inspector(run, name, record.audit)
    return opened, record


def _note_inspector(run: CheckRun, name: str, audit: dict[str, Any]) -> None:
    """On a card the inspector is to tell of the attention: a note where it does not, with all that it said."""
    inspector = audit.get("inspector")
    if audit.get("attention_source") == "inspector":
        return
    if inspector is None:
        why = "it was not asked"
    elif inspector["told"]:
        why = f"its attentions are {inspector['attentions']}"
    else:
        why = inspector["reason"]
    run.note(f"the engine {name} the plugin: the inspector does not tell whether attention is fused: {why}")

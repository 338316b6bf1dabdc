"""What people would compare a checkpoint or a bundle with, as cases of the same run; what cannot run says why."""

import dataclasses
import importlib.util
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from moe3d_deploy import cuda_driver
from moe3d_deploy.benchmarks.bench.cases import Planned, Source, same_model
from moe3d_deploy.benchmarks.bench.report import Shape
from moe3d_deploy.bundle import Bundle
from moe3d_deploy.errors import InputError
from moe3d_deploy.manifest import BUILDERS, EngineRecord, Range, ShapeRanges
from moe3d_deploy.runtime.packages import load_package

OF_CHECKPOINT = ("pytorch", "pytorch-compiled", "onnxruntime-widespread")
OF_BUNDLE = ("onnxruntime-cuda", *BUILDERS)
_OF_TORCH = ("seed", "allow_pickle", "view_chunk", "plugin")
_CUDA_PROVIDER = "CUDAExecutionProvider"


def plan_peers(sources: Sequence[Source], shapes: Sequence[Shape], only: Collection[str] = ()) -> list[Planned]:
    """The peers of every source on every shape; without shapes on the source's own usual ones.

    only   backends of OF_CHECKPOINT and OF_BUNDLE; none: all of them

    Of a checkpoint or preset: PyTorch in 16 bits, torch.compile, the widespread export, and ONNX Runtime on a bundle
    where none is among the sources. Of a bundle: ONNX Runtime on CUDA, and its engines. A peer that this machine cannot
    run is one case with the reason, on the first shape. Raises InputError for one of `only` that no source has.
    """
    kinds = {source.kind == "bundle" for source in sources}
    for backend in only:
        if (backend in OF_BUNDLE) not in kinds:
            lacking = "bundle" if backend in OF_BUNDLE else "checkpoint or preset"
            raise InputError(f"{backend} is a peer of a {lacking}, and none is named; name one, or leave it out")
    planned = []
    for source in sources:
        given = list(dict.fromkeys(shapes or source.default_shapes()))
        for peer, missing in _of_checkpoint(source, sources) if source.kind != "bundle" else _of_bundle(source):
            if only and peer.backend not in only:
                continue
            fitting = [shape for shape in given if peer.ranges.takes(shape)]
            if missing:
                planned.append(Planned(peer, given[0], missing, peer=True))
            elif not fitting:
                planned.append(Planned(peer, given[0], "it takes none of the shapes of this run", peer=True))
            planned += [Planned(peer, shape, peer=True) for shape in fitting if not missing]
    return planned


def _of_checkpoint(source: Source, sources: Sequence[Source]) -> Iterator[tuple[Source, str | None]]:
    on_gpu = _torch_sees_gpu()
    options = {name: value for name, value in source.options.items() if name in _OF_TORCH}

    def peer(backend: str, precision: str) -> Source:
        given = {**options, "precision": precision}
        if backend == "pytorch-compiled":
            given.setdefault("plugin", "none")  # what is compiled is PyTorch's own operators
        return dataclasses.replace(source, backend=backend, precision=precision, options=given)

    no_half = None if on_gpu else "half in PyTorch is for GPUs, and PyTorch sees none here"
    no_compiler = _without_compiler(on_gpu)
    yield peer("pytorch", "bf16"), None
    yield peer("pytorch", "fp16"), no_half
    yield peer("pytorch-compiled", "fp32"), no_compiler
    yield peer("pytorch-compiled", "fp16" if on_gpu else "bf16"), no_compiler
    # Its file has the float32 weights without a point head, one scene.
    small = dataclasses.replace(source.config, point_head=False)
    one_scene = dataclasses.replace(source.ranges, batch=Range(1, 1))
    widespread = dataclasses.replace(
        source,
        kind="widespread",
        backend="onnxruntime-widespread",
        config=small,
        weights=small,
        ranges=one_scene,
        options={name: value for name, value in options.items() if name in ("seed", "allow_pickle")},
    )
    lacking = [name for name in ("onnxruntime", "onnx", "onnxscript") if not importlib.util.find_spec(name)]
    why = f"{lacking[0]} is not installed: pip install 'moe3d-deploy[export,cpu]'" if lacking else None
    yield widespread, why
    bundles = [other for other in sources if other.kind == "bundle" and same_model(other.config, source.config)]
    if not bundles:
        bundle = dataclasses.replace(source, kind="bundle", backend="onnxruntime", weights=small, config=small)
        yield bundle, f"no bundle of this model was named; make one: moe3d-export {source.name} -o bundle"


def _of_bundle(source: Source) -> Iterator[tuple[Source, str | None]]:
    manifest = Bundle.open(source.source, verify="sizes", engines=False).manifest
    why = "the bundle's model is split, and this runs whole ones only" if manifest.parts else None
    if manifest.only_in_onnxruntime:
        why = f"{manifest.precision} is for ONNX Runtime on a CPU"
    yield dataclasses.replace(source, backend="onnxruntime-cuda", options={}), why or _without_cuda_provider()
    for builder in reversed(BUILDERS):
        record = next((item for item in manifest.engines if item.builder == builder and item.part is None), None)
        engine = dataclasses.replace(source, backend=builder, options={})
        if record is None:
            folder = Path(source.source).name
            yield (
                engine,
                why or (f"the bundle has no engine of {builder}; add one: moe3d-export {folder} --builder {builder}"),
            )
            continue
        engine = dataclasses.replace(engine, precision=record.precision, ranges=_ranges(record, source))
        yield engine, _without_gpu()


def _ranges(record: EngineRecord, source: Source) -> ShapeRanges:
    """What the engine's first profile takes."""
    low, high, patch = record.profiles[0].min, record.profiles[0].max, source.config.patch_size
    steps = (1, 1, patch, patch)
    axes = (Range(a, b, step) for a, b, step in zip(low, high, steps, strict=True))
    return ShapeRanges(*axes)


def _torch_sees_gpu() -> bool:
    return bool(load_package("torch").cuda.is_available())


def _without_gpu() -> str | None:
    return None if cuda_driver.query().gpus else "the CUDA driver shows no GPU"


def _without_compiler(on_gpu: bool) -> str | None:
    """torch.compile writes C++ for a CPU, and for a GPU launches Triton's kernels from C."""
    variable, usual = ("CC", "gcc") if on_gpu else ("CXX", "g++")
    command = os.environ.get(variable, usual)
    if shutil.which(command.split()[0] if command.split() else usual):
        return None
    return f"torch.compile needs a compiler, and {command} is not installed: install it, or name another in {variable}"


def _without_cuda_provider() -> str | None:
    ort = load_package("onnxruntime")
    if _CUDA_PROVIDER not in ort.get_available_providers():
        return f"onnxruntime {ort.__version__} is a build without CUDA: pip install 'moe3d-deploy[gpu]'"
    return _without_gpu()

"""Build an engine for a bundle, audit it, and add it there."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from moe3d_deploy import trt
from moe3d_deploy.bundle import Bundle, add_engine, engine_name
from moe3d_deploy.engines.audit import expected, require_audit
from moe3d_deploy.engines.build import build, resolve_builder
from moe3d_deploy.engines.shapes import ShapeProfile
from moe3d_deploy.errors import EngineError
from moe3d_deploy.manifest import EngineRecord, Manifest, Profile


def add_built_engine(
    bundle: Bundle,
    builder: str,
    shapes: ShapeProfile,
    *,
    compute_capabilities: Sequence[trt.Capability] | None = None,
    workspace_bytes: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    on_drop: Callable[[str], None] | None = None,
) -> tuple[Bundle, EngineRecord]:
    """Build an engine of `bundle`'s ONNX file for `shapes` and put it into the bundle, replacing one of its name.

    builder               tensorrt, tensorrt-rtx or auto
    compute_capabilities  TensorRT-RTX: (major, minor) of each GPU to build for; TensorRT builds for this machine's
    workspace_bytes       the most scratch memory a layer may take; None leaves it to the builder
    progress              progress(phase, step, total)
    on_drop               gets the file name of each engine record that went because its file is missing or damaged

    An engine that fails its audit does not enter the bundle; the record's audit has a line for people, `summary`.
    The bundle stays valid whatever happens. Raises InputError, MissingExtraError, EngineError or BundleError.
    """
    now = Bundle.open(bundle.path, verify="sizes", engines=False).manifest
    expected(now)  # a precision that no audit knows is refused before the build
    builder = resolve_builder(builder, opset=now.opset, precision=now.precision)
    capabilities = trt.target_capabilities(builder, compute_capabilities)
    planned = _plan(now, builder, capabilities, shapes)

    def write(path: Path, manifest: Manifest) -> EngineRecord:
        if _of_the_model(manifest) != _of_the_model(now):
            raise EngineError(f"bundle {bundle.path} was replaced by another meanwhile; build its engine again")
        built = build(
            bundle.model_path,
            path,
            shapes,
            precision=manifest.precision,
            builder=builder,
            compute_capabilities=capabilities,
            workspace_bytes=workspace_bytes,
            progress=progress,
        )
        return replace(
            planned,
            builder_version=built["builder_version"],
            compute_capabilities=tuple(built["compute_capabilities"]),
            plugin=built["plugin"],
            audit=require_audit(built["audit"], manifest),
            build=built["build"],
        )

    after = add_engine(bundle.path, planned, write, on_drop=on_drop)
    record = next(engine for engine in after.manifest.engines if engine.file == planned.file)
    return after, record


def _plan(
    manifest: Manifest, builder: str, capabilities: Sequence[trt.Capability], shapes: ShapeProfile
) -> EngineRecord:
    """The record of the engine as far as it is known before the build."""
    version = trt.available()[builder]
    targets = tuple(10 * major + minor for major, minor in capabilities)
    profile = Profile(shapes.min, shapes.opt, shapes.max)
    short = ".".join(version.split(".")[:3])
    return EngineRecord(
        file="engines/" + engine_name(manifest.name, profile, manifest.precision, targets, builder, short),
        builder=builder,
        builder_version=version,
        compute_capabilities=targets,
        precision=manifest.precision,
        profiles=(profile,),
    )


def _of_the_model(manifest: Manifest) -> Manifest:
    """The manifest without engines, which others may add at any time."""
    files = {name: entry for name, entry in manifest.files.items() if not name.startswith("engines/")}
    return replace(manifest, engines=(), files=files)

"""Build an engine for a bundle and add it there."""

from collections.abc import Callable
from pathlib import Path

from moe3d_deploy import trt
from moe3d_deploy.bundle import Bundle, add_engine, engine_name
from moe3d_deploy.engines.build import build, resolve_builder
from moe3d_deploy.engines.shapes import ShapeProfile
from moe3d_deploy.manifest import EngineRecord, Profile


def add_built_engine(
    bundle: Bundle,
    builder: str,
    shapes: ShapeProfile,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Bundle, EngineRecord]:
    """Build an engine of `bundle`'s ONNX file for `shapes` and put it into the bundle, replacing one of its name.

    builder   tensorrt, tensorrt-rtx or auto
    progress  progress(phase, step, total)

    The bundle stays valid whatever happens. Raises InputError, MissingExtraError, EngineError or BundleError.
    """
    builder = resolve_builder(builder)
    manifest = bundle.manifest
    version = trt.available()[builder]
    capabilities = trt.RTX_CAPABILITIES if builder == "tensorrt-rtx" else tuple(trt.visible_gpus()[:1])
    profile = Profile(shapes.min, shapes.opt, shapes.max)
    planned = EngineRecord(
        file="engines/"
        + engine_name(
            manifest.name,
            profile,
            manifest.precision,
            [10 * major + minor for major, minor in capabilities],
            builder,
            ".".join(version.split(".")[:3]),
        ),
        builder=builder,
        builder_version=version,
        compute_capabilities=tuple(10 * major + minor for major, minor in capabilities),
        precision=manifest.precision,
        profiles=(profile,),
    )

    def write(path: Path) -> EngineRecord:
        built = build(
            bundle.model_path,
            path,
            shapes,
            precision=manifest.precision,
            builder=builder,
            compute_capabilities=capabilities if builder == "tensorrt-rtx" else None,
            progress=progress,
        )
        return EngineRecord(
            file=planned.file,
            builder=built["builder"],
            builder_version=built["builder_version"],
            compute_capabilities=tuple(built["compute_capabilities"]),
            precision=built["precision"],
            profiles=(profile,),
            plugin=built["plugin"],
            audit=built["audit"],
            build=built["build"],
        )

    after = add_engine(bundle.path, planned, write)
    record = next(engine for engine in after.manifest.engines if engine.file == planned.file)
    return after, record

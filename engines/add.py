"""Build an engine for a bundle, or take it from the cache, audit it, and add it there."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moe3d_deploy import trt
from moe3d_deploy.bundle import Bundle, add_engine, engine_name
from moe3d_deploy.engines.audit import check_names, expected, require_audit
from moe3d_deploy.engines.build import build, check_request
from moe3d_deploy.engines.cache import EngineCache, Entry, engine_key
from moe3d_deploy.engines.planned import plan_beside_build
from moe3d_deploy.engines.plugin_rules import check_model_for_plugin
from moe3d_deploy.engines.shapes import ShapeProfile
from moe3d_deploy.errors import EngineError, InputError
from moe3d_deploy.manifest import EngineRecord, Manifest, Profile

_DEFAULTS = trt.BuildFlags()


def add_built_engine(
    bundle: Bundle,
    builder: str,
    shapes: ShapeProfile | Sequence[ShapeProfile],
    *,
    compute_capabilities: Sequence[trt.Capability] | None = None,
    flags: trt.BuildFlags = _DEFAULTS,
    plugin: trt.PluginLibrary | None = None,
    accept: Collection[str] = (),
    part: str | None = None,
    cache: EngineCache | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    on_drop: Callable[[str], None] | None = None,
) -> tuple[Bundle, EngineRecord]:
    """Build an engine of `bundle`'s ONNX file for `shapes` and put it into the bundle, replacing one of its name.

    builder               tensorrt, tensorrt-rtx or auto
    shapes                one profile or several
    compute_capabilities  TensorRT-RTX: (major, minor) of each GPU to build for; TensorRT builds for this machine's
    plugin                library of the expert mix for TensorRT; the engine gets a name of its own, and needs that very
                          library, whose SHA-256 is in the record, wherever it is loaded
    accept                names of engines.audit.FINDINGS that may stand
    part                  role of the part that it is built of, in a bundle whose model is split
    cache                 where the engine is looked for first and kept afterwards; None builds it in any case
    progress              progress(phase, step, total)
    on_drop               gets the file name of each engine record that went because its file is missing or damaged

    The builder's messages are beside the engine, `<engine>.log`; those of a build that failed stay in the cache.
    An engine that fails its audit enters neither bundle nor cache; the record's audit has a line for people, `summary`,
    and its build says `from_cache`. The bundle stays valid whatever happens.
    Raises InputError, MissingExtraError, EngineError or BundleError.
    """
    profiles = (shapes,) if isinstance(shapes, ShapeProfile) else tuple(shapes)
    now = Bundle.open(bundle.path, verify="sizes", engines=False).manifest
    onnx_path = _onnx_path(bundle.path, now, part)
    want = expected(now, part)  # a precision that no audit knows is refused before the build
    check_names(accept)
    check_model_for_plugin(now.config, now.merged_experts, plugin)
    if plugin and not want.expert_mix:
        raise InputError(f"--plugin: the {part} of a split model mixes no experts: leave it out")
    builder = check_request(
        builder, flags, compute_capabilities, opset=now.opset, precision=now.precision, plugin=plugin
    )
    capabilities = trt.target_capabilities(builder, compute_capabilities)
    planned = _plan(now, builder, capabilities, profiles, with_plugin=plugin is not None, part=part)
    final_log = (bundle.path / planned.file).with_suffix(".log")
    log = final_log.with_name(f".{final_log.stem}.partial-{secrets.token_hex(4)}.log")  # goes like a killed writer's

    def build_here(path: Path, messages: Path) -> dict[str, Any]:
        return build(
            onnx_path,
            path,
            profiles,
            precision=now.precision,
            builder=builder,
            compute_capabilities=capabilities,
            flags=flags,
            plugin=plugin,
            log_path=messages,
            progress=progress,
        )

    def write(path: Path, manifest: Manifest) -> EngineRecord:
        if _of_the_model(manifest) != _of_the_model(now):
            raise EngineError(f"bundle {bundle.path} was replaced by another meanwhile; build its engine again")
        kept = entry.fetch(path, log) if entry else None
        if kept is not None:
            built, audit = kept, _audited(kept, manifest, planned, plugin, accept)
        else:
            with _messages(log, entry) as messages:
                built = build_here(path, messages)
                audit = _audited(built, manifest, planned, plugin, accept)
            if entry:
                entry.store(path, built, log)
        return replace(
            planned,
            builder_version=built["builder_version"],
            compute_capabilities=tuple(built["compute_capabilities"]),
            plugin=built["plugin"],
            audit=audit,
            build={**built["build"], "from_cache": kept is not None},
        )

    with contextlib.ExitStack() as stack:
        entry: Entry | None = None
        if cache:
            key = engine_key(
                onnx_path,
                profiles,
                builder=builder,
                builder_version=planned.builder_version,
                compute_capabilities=capabilities,
                flags=flags,
                plugin=plugin.path if plugin else None,
            )
            entry = stack.enter_context(cache.entry(key))
        stack.callback(log.unlink, missing_ok=True)
        after = add_engine(bundle.path, planned, write, on_drop=on_drop)
        if log.exists():
            os.replace(log, final_log)
    record = next(engine for engine in after.manifest.engines if engine.file == planned.file)
    return after, record


def _onnx_path(bundle: Path, manifest: Manifest, part: str | None) -> Path:
    """The ONNX file that the engine is built of. Raises InputError for a part that is not there, or not named."""
    if part:
        return bundle / manifest.part(part).file
    if manifest.parts:
        roles = ", ".join(one.role for one in manifest.parts)
        raise InputError(f"the model of bundle {bundle} is split: an engine is of one of its parts, {roles}")
    return bundle / manifest.model_file


@contextlib.contextmanager
def _messages(log: Path, entry: Entry | None) -> Iterator[Path]:
    """Where a build writes its messages: of a good one they become `log`, of a failed one they stay in the cache."""
    if entry is None:
        yield log
        return
    place = entry.failed_log
    try:
        yield place
    except EngineError as error:
        if not place.exists():
            raise
        raise EngineError(f"{error}; the builder's messages are in {place}") from error
    except BaseException:
        place.unlink(missing_ok=True)
        raise
    if place.exists():
        shutil.move(place, log)


def _plan(
    manifest: Manifest,
    builder: str,
    capabilities: Sequence[trt.Capability],
    shapes: Sequence[ShapeProfile],
    *,
    with_plugin: bool = False,
    part: str | None = None,
) -> EngineRecord:
    """The record of the engine as far as it is known before the build."""
    version = trt.available()[builder]
    targets = tuple(10 * major + minor for major, minor in capabilities)
    profiles = tuple(Profile(shape.min, shape.opt, shape.max) for shape in shapes)
    short = ".".join(version.split(".")[:3])
    if with_plugin:
        short += "+plugin"  # so that it lies beside the engine that needs no library
    name = engine_name(
        manifest.name, profiles[0], manifest.precision, targets, builder, short, more_profiles=profiles[1:], part=part
    )
    return EngineRecord(
        file="engines/" + name,
        builder=builder,
        builder_version=version,
        compute_capabilities=targets,
        precision=manifest.precision,
        profiles=profiles,
        part=part,
    )


def _audited(
    built: dict[str, Any],
    manifest: Manifest,
    planned: EngineRecord,
    plugin: trt.PluginLibrary | None,
    accept: Collection[str],
) -> dict[str, Any]:
    """The audit of a good engine, with what was predicted for it beside what it is. Raises EngineError for another."""
    facts = built["audit"]
    audit = require_audit(
        facts,
        manifest,
        built_by=(planned.builder, built["builder_version"]),
        plugin=plugin is not None,
        profiles=planned.profiles,
        accept=accept,
        part=planned.part,
    )
    plan = plan_beside_build(
        manifest,
        planned.profiles,
        activation_bytes=facts["activation_memory_bytes"],
        plan_bytes=built["build"]["plan_bytes"],
        part=planned.part,
    )
    return {**audit, "plan": plan}


def _of_the_model(manifest: Manifest) -> Manifest:
    """The manifest without engines, which others may add at any time."""
    files = {name: entry for name, entry in manifest.files.items() if not name.startswith("engines/")}
    return replace(manifest, engines=(), files=files)

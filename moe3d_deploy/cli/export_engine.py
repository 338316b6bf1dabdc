"""The engine side of `moe3d export`: its options, what is checked before any work, the build and its progress."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

from moe3d_deploy import planning
from moe3d_deploy.bundle import Bundle
from moe3d_deploy.cli.arguments import given_flags
from moe3d_deploy.cli.export_events import Reporter
from moe3d_deploy.config import ModelConfig
from moe3d_deploy.engines.add import add_built_engine
from moe3d_deploy.engines.audit import FINDINGS, check_names
from moe3d_deploy.engines.build import check_request
from moe3d_deploy.engines.cache import EngineCache
from moe3d_deploy.engines.options import parse_size, parse_targets
from moe3d_deploy.engines.plugin_rules import check_model_for_plugin
from moe3d_deploy.engines.profiles import (
    VIEW_CHUNK,
    WHOLE_SHAPES,
    ShapeFlags,
    engines_of,
    of_any_views,
    read_profiles,
)
from moe3d_deploy.engines.shapes import AXES, ShapeProfile
from moe3d_deploy.errors import EngineError, InputError, Moe3dError
from moe3d_deploy.export.contract import layout
from moe3d_deploy.export.precision import PrecisionPolicy
from moe3d_deploy.manifest import SPLITS, WITH_HEADS, EngineRecord, Manifest, ShapeRanges
from moe3d_deploy.trt import BuildFlags, Capability, PluginLibrary, accepted_findings

_Command = TypeVar("_Command", bound=Callable[..., Any])

CHANNELS_LAST = layout("uint8")
CACHE_VARIABLE = "MOE3D_CACHE"
_SIGN_OF_LIFE_SECONDS = 30.0  # between lines where no bar can be shown

_SHAPES = (*AXES, *WHOLE_SHAPES)
_FLAGS = (
    "view_chunk", "part",
    "target", "workspace", "optimization_level", "timing_cache", "version_compatible", "hardware_compatible",
    "weight_streaming", "strip_weights", "plugin", "accept", "no_cache",
)  # fmt: skip

_OPTIONS = (
    click.option(
        "--builder", type=click.Choice(["auto", "tensorrt", "tensorrt-rtx", "none"]), default="auto", show_default=True,
        help="Engine builder; none for the ONNX file alone.",
    ),
    click.option(
        "--batch", multiple=True, help="Scenes of the engine: value, min:max or min:opt:max; any shape flag may be "
        "repeated, for an engine of several profiles.  [default: 1]",
    ),
    click.option("--views", multiple=True, help="Views of the engine.  [default: 1:2:8]"),
    click.option(
        "--height", multiple=True, help="Image height of the engine in pixels.  [default: 10 patches to img_size]"
    ),
    click.option("--width", multiple=True, help="Image width of the engine in pixels.  [default: as --height]"),
    click.option(
        "--min-shapes", multiple=True, metavar="images:SHAPE",
        help="In place of ranges, trtexec's shapes: images:1x2x3x392x518, of 8-bit pixels images:1x2x392x518x3.",
    ),
    click.option("--opt-shapes", multiple=True, metavar="images:SHAPE", help="[default: --max-shapes]"),
    click.option("--max-shapes", multiple=True, metavar="images:SHAPE", help="[default: --opt-shapes]"),
    click.option(
        "--view-chunk", type=click.IntRange(min=1),
        help=f"With --split heads: views that the engine of the heads takes at a time.  [default: {VIEW_CHUNK}]",
    ),
    click.option(
        "--part", metavar="ROLE", help="Of a split model: build the engine of this part alone, for the given shapes."
    ),
    click.option("--target", metavar="SM,...", help="TensorRT-RTX: GPUs, sm89,sm120.  [default: sm80,sm86,sm89,sm120]"),
    click.option("--workspace", metavar="SIZE", help="Most scratch memory of a layer: 4G.  [default: the builder's]"),
    click.option(
        "--optimization-level", type=click.IntRange(0, 5), help="0 builds quickest, 5 searches longest.  [default: the "
        "builder's]",
    ),
    click.option(
        "--timing-cache", type=click.Path(dir_okay=False, path_type=Path),
        help="TensorRT: file of kernel timings, read and added to.",
    ),
    click.option("--version-compatible", is_flag=True, help="TensorRT: an engine that later versions load."),
    click.option("--hardware-compatible", is_flag=True, help="TensorRT: an engine for every GPU from sm80 on."),
    click.option("--weight-streaming", is_flag=True, help="Allow weights to be streamed from the host's memory."),
    click.option("--strip-weights", is_flag=True, help="An engine without weights; whoever loads it puts them in."),
    click.option(
        "--plugin", type=click.Path(path_type=Path), metavar="PATH",
        help="TensorRT: library of the expert-mix plugin (docs/plugin.md); the engine then needs it wherever it runs.",
    ),
    click.option(
        "--accept", multiple=True, metavar="NAME",
        help=f"Let this finding of the audit stand; may be repeated: {', '.join(FINDINGS)}.",
    ),
    click.option("--no-cache", is_flag=True, help=f"Build in any case; keep no copy in the cache ({CACHE_VARIABLE})."),
)  # fmt: skip


def engine_options(command: _Command) -> _Command:
    """Add the options of the engine, as the keyword arguments of `EngineRequest.of`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True)
class EngineRequest:
    """What the command line asks of an engine."""

    builder: str
    shapes: ShapeFlags
    targets: tuple[Capability, ...] | None
    flags: BuildFlags
    plugin: PluginLibrary | None
    accept: tuple[str, ...]
    cached: bool
    part: str | None = None
    view_chunk: int | None = None

    @classmethod
    def of(
        cls,
        *,
        builder: str,
        target: str | None,
        workspace: str | None,
        timing_cache: Path | None,
        plugin: Path | None,
        accept: tuple[str, ...],
        no_cache: bool,
        part: str | None,
        view_chunk: int | None,
        **others: Any,
    ) -> "EngineRequest":
        """Read the texts of the options. Raises InputError."""
        if builder == "none":
            if given := given_flags(*_SHAPES):
                raise InputError(f"{given[0]} is a shape of an engine and --builder none builds none: leave one out")
            if given := given_flags(*_FLAGS):
                raise InputError(f"{given[0]} is a flag of an engine and --builder none builds none: leave one out")
        flags = BuildFlags(
            workspace_bytes=parse_size("--workspace", workspace) if workspace is not None else None,
            timing_cache=str(timing_cache.absolute()) if timing_cache else None,
            **{name: value for name, value in others.items() if name not in _SHAPES},
        )
        shapes = ShapeFlags(**{name: others[name] for name in _SHAPES})
        targets = parse_targets(target) if target is not None else None
        check_names(accept)
        library = PluginLibrary.of(plugin) if plugin else None
        if part and view_chunk is not None:
            raise InputError("--view-chunk is for the engines of all parts: with --part give --views")
        return cls(builder, shapes, targets, flags, library, accept, not no_cache, part, view_chunk)

    @property
    def wanted(self) -> bool:
        return self.builder != "none"

    def engines(self, file: "FileFacts") -> dict[str | None, tuple[ShapeProfile, ...]]:
        """The engines' shapes, by the role of the part; of a model that is one file, by None. Raises InputError."""
        roles = SPLITS[file.split] if file.split else ()
        if self.part and self.part not in roles:
            has = f"its parts are {', '.join(roles)}" if roles else "it is one file"
            raise InputError(f"--part {self.part}: the model has no such part, {has}")
        accepted = of_any_views(file.accepted, self.part) if self.part else file.accepted
        patch, size = file.config.patch_size, file.config.img_size
        profiles = read_profiles(self.shapes, accepted, patch, size, channels_last=file.channels_last)
        return {self.part: profiles} if self.part else engines_of(file.split, profiles, self.view_chunk)

    def check(self, file: "FileFacts", reporter: Reporter, *, exported: bool) -> None:
        """Refuse what cannot be built, and warn of limits that the shapes cross.

        exported   whether the ONNX file is there already; else it can be had without an engine, and the error says so

        Raises InputError, MissingExtraError or EngineError.
        """
        check_model_for_plugin(file.config, file.merged, self.plugin)
        try:
            check_request(
                self.builder,
                self.flags,
                self.targets,
                opset=file.opset,
                precision=file.precision,
                plugin=self.plugin,
            )
        except (EngineError, InputError) as error:
            if exported:
                raise
            raise type(error)(f"{error}; or export without an engine: --builder none") from error
        for line in _limits_crossed(file, self.engines(file)):
            reporter.line("warning", line)


@dataclass(frozen=True)
class FileFacts:
    """What of an ONNX file, there or to be exported, an engine depends on."""

    config: ModelConfig
    accepted: ShapeRanges
    precision: str
    opset: int
    merged: bool
    channels_last: bool
    split: str | None = None

    @classmethod
    def of(cls, manifest: Manifest) -> "FileFacts":
        channels_last = manifest.preprocessing.layout == CHANNELS_LAST
        return cls(
            manifest.config,
            manifest.shape_ranges,
            manifest.precision,
            manifest.opset,
            manifest.merged_experts,
            channels_last,
            manifest.split,
        )


def _limits_crossed(file: FileFacts, engines: Mapping[str | None, tuple[ShapeProfile, ...]]) -> dict[str, None]:
    """What `moe3d plan` warns of at the largest shapes, each line once."""
    type_of = PrecisionPolicy(file.precision).type_of
    form = planning.usual_form(type_of, None)
    setup = planning.Setup(file.config, file.precision, type_of, form, merged=file.merged)
    return dict.fromkeys(
        line
        for part, profiles in engines.items()
        for profile in profiles
        for line in planning.warnings_of(setup, profile.max, part)
    )


def engine_cache(on_note: Callable[[str], None]) -> EngineCache:
    """The cache of this user, or the one that the environment names."""
    folder = os.environ.get(CACHE_VARIABLE)
    return EngineCache(Path(folder) if folder else Path.home() / ".cache" / "moe3d" / "engines", on_note=on_note)


def build_engine(bundle: Bundle, request: EngineRequest, reporter: Reporter) -> tuple[Bundle, dict[str, Any]]:
    """Build and add the engines, telling how it goes; returns the bundle and what the report says of them.

    That is one object, or, of a split model, one for each role.
    """
    built: dict[str | None, dict[str, Any]] = {}
    for part, profiles in request.engines(FileFacts.of(bundle.manifest)).items():
        try:
            bundle, record = add_built_engine(
                bundle,
                request.builder,
                profiles,
                compute_capabilities=request.targets,
                flags=request.flags,
                plugin=request.plugin if part in WITH_HEADS else None,  # where the experts are
                accept=request.accept,
                part=part,
                cache=engine_cache(lambda line: reporter.line("cache", line)) if request.cached else None,
                progress=_Progress(reporter, expected_seconds(bundle, request.builder, part)),
                on_drop=lambda name: reporter.line("dropped", f"{name} was missing or damaged"),
            )
        except (Moe3dError, KeyboardInterrupt):
            without = f"the engine of its {part}" if part else "this engine"
            reporter.line("bundle", f"{bundle.path} is complete, without {without}")
            raise
        for label, text in _lines(record):
            reporter.line(label, text)
        built[part] = {"file": record.file, **record.build}
    return bundle, built[None] if None in built else {str(part): facts for part, facts in built.items()}


def expected_seconds(bundle: Bundle, builder: str, part: str | None = None) -> float | None:
    """What the longest build of an engine of this bundle took, by the builder if it is named; None without one.

    part   the part that it is of

    Nothing else tells: TensorRT-RTX spends most of a build in one step, and says nothing meanwhile.
    """
    engines = [engine for engine in bundle.manifest.engines if engine.part == part]
    records = [engine for engine in engines if builder in ("auto", engine.builder)]
    seconds = [engine.build.get("seconds") for engine in records]
    return max((float(value) for value in seconds if isinstance(value, (int, float))), default=None)


class _Progress:
    """The builder's phases as a bar and a time that is left; a line now and then where there is no terminal."""

    def __init__(self, reporter: Reporter, expected: float | None) -> None:
        self._reporter, self._expected = reporter, expected
        self._started = self._told = time.monotonic()

    def __call__(self, phase: str, step: int, total: int) -> None:
        now = time.monotonic()
        elapsed = now - self._started
        left = None if self._expected is None else max(0.0, self._expected - elapsed)
        detail = f"{phase} {step}/{total}"
        if left is not None:
            detail += f", about {left:.0f} s left" if left else f", longer than the last one ({self._expected:.0f} s)"
        share = (0, 0) if self._expected is None else (int(min(elapsed, self._expected)), int(self._expected) or 1)
        self._reporter.report(
            "engine", *share, detail, phase=phase, phase_step=step, phase_total=total, seconds=round(elapsed, 1),
            seconds_left=None if left is None else round(left, 1),
        )  # fmt: skip
        if not self._reporter.shows_bars and now - self._told >= _SIGN_OF_LIFE_SECONDS:
            self._told = now
            self._reporter.line("engine", f"{elapsed:6.0f} s   {detail}")


def _lines(record: EngineRecord) -> list[tuple[str, str]]:
    build = record.build
    capabilities = " ".join(f"sm{capability}" for capability in record.compute_capabilities)
    what = f"{record.builder} {record.builder_version}, {capabilities}"
    if build.get("from_cache"):
        engine = f"from the cache, SHA-256 checked; built in {build['seconds']:.1f} s   {what}"
    else:
        engine = f"{build['seconds']:6.1f} s   peak {build['peak_bytes'] / 1e9:.1f} GB   {what}"
    accepted = [("accepted", f"{name}: {text}") for name, text in accepted_findings(record).items()]
    notes = [*record.audit.get("notes", []), *record.audit.get("plan", {}).get("notes", [])]
    return [
        (record.part or "engine", engine),
        ("audit", record.audit["summary"]),
        *accepted,
        *(("note", note) for note in notes),
    ]

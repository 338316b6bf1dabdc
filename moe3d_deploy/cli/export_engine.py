"""The engine side of `moe3d export`: its options, what is checked before any work, the build and its progress."""

import os
import time
from collections.abc import Callable
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
from moe3d_deploy.engines.build import check_request
from moe3d_deploy.engines.cache import EngineCache
from moe3d_deploy.engines.options import parse_size, parse_targets
from moe3d_deploy.engines.profiles import WHOLE_SHAPES, ShapeFlags, read_profiles
from moe3d_deploy.engines.shapes import AXES, ShapeProfile
from moe3d_deploy.errors import EngineError, InputError, Moe3dError
from moe3d_deploy.export.contract import layout
from moe3d_deploy.export.precision import PrecisionPolicy
from moe3d_deploy.manifest import EngineRecord, Manifest, ShapeRanges
from moe3d_deploy.trt import BuildFlags, Capability

_Command = TypeVar("_Command", bound=Callable[..., Any])

CHANNELS_LAST = layout("uint8")
CACHE_VARIABLE = "MOE3D_CACHE"
_SIGN_OF_LIFE_SECONDS = 30.0  # between lines where no bar can be shown

_SHAPES = (*AXES, *WHOLE_SHAPES)
_FLAGS = (
    "target", "workspace", "optimization_level", "timing_cache", "version_compatible", "hardware_compatible",
    "weight_streaming", "strip_weights", "no_cache",
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
    cached: bool

    @classmethod
    def of(
        cls,
        *,
        builder: str,
        target: str | None,
        workspace: str | None,
        timing_cache: Path | None,
        no_cache: bool,
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
        return cls(builder, shapes, targets, flags, not no_cache)

    @property
    def wanted(self) -> bool:
        return self.builder != "none"

    def profiles(self, file: "FileFacts") -> tuple[ShapeProfile, ...]:
        """The shapes of the engine. Raises InputError."""
        config = file.config
        return read_profiles(
            self.shapes, file.accepted, config.patch_size, config.img_size, channels_last=file.channels_last
        )

    def check(self, file: "FileFacts", reporter: Reporter, *, exported: bool) -> None:
        """Refuse what cannot be built, and warn of limits that the shapes cross.

        exported   whether the ONNX file is there already; else it can be had without an engine, and the error says so

        Raises InputError, MissingExtraError or EngineError.
        """
        try:
            check_request(self.builder, self.flags, self.targets, opset=file.opset, precision=file.precision)
        except (EngineError, InputError) as error:
            if exported:
                raise
            raise type(error)(f"{error}; or export without an engine: --builder none") from error
        for line in _limits_crossed(file, self.profiles(file)):
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
        )


def _limits_crossed(file: FileFacts, profiles: tuple[ShapeProfile, ...]) -> dict[str, None]:
    """What `moe3d plan` warns of at the largest shapes, each line once."""
    type_of = PrecisionPolicy(file.precision).type_of
    form = planning.usual_form(type_of, None)
    setup = planning.Setup(file.config, file.precision, type_of, form, merged=file.merged)
    return dict.fromkeys(line for profile in profiles for line in planning.plan(setup, profile.max).warnings)


def engine_cache(on_note: Callable[[str], None]) -> EngineCache:
    """The cache of this user, or the one that the environment names."""
    folder = os.environ.get(CACHE_VARIABLE)
    return EngineCache(Path(folder) if folder else Path.home() / ".cache" / "moe3d" / "engines", on_note=on_note)


def build_engine(bundle: Bundle, request: EngineRequest, reporter: Reporter) -> tuple[Bundle, dict[str, Any]]:
    """Build and add the engine, telling how it goes; returns the bundle and the engine's part of the report."""
    try:
        profiles = request.profiles(FileFacts.of(bundle.manifest))
        bundle, record = add_built_engine(
            bundle,
            request.builder,
            profiles,
            compute_capabilities=request.targets,
            flags=request.flags,
            cache=engine_cache(lambda line: reporter.line("cache", line)) if request.cached else None,
            progress=_Progress(reporter, expected_seconds(bundle, request.builder)),
            on_drop=lambda name: reporter.line("dropped", f"{name} was missing or damaged"),
        )
    except (Moe3dError, KeyboardInterrupt):
        reporter.line("bundle", f"{bundle.path} is complete, without this engine")
        raise
    for label, text in _lines(record):
        reporter.line(label, text)
    return bundle, {"file": record.file, **record.build}


def expected_seconds(bundle: Bundle, builder: str) -> float | None:
    """What the longest build of an engine of this bundle took, by the builder if it is named; None without one.

    Nothing else tells: TensorRT-RTX spends most of a build in one step, and says nothing meanwhile.
    """
    records = [engine for engine in bundle.manifest.engines if builder in ("auto", engine.builder)]
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
    return [("engine", engine), ("audit", record.audit["summary"])]

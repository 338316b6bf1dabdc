"""What a builder can be asked for, and which versions have it: one table of rules, and the flags set by them.

Read in the sources of TensorRT's Python module, 8.6 to 11.1, and tried with TensorRT-RTX 1.4 to 1.7. No library is
loaded here.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from moe3d_deploy.cuda_driver import Capability
from moe3d_deploy.errors import EngineError, InputError
from moe3d_deploy.trt.installed import title

Version = tuple[int, ...]

OLDEST: dict[str, Version] = {"tensorrt": (10, 3), "tensorrt-rtx": (1, 0)}
"""The first that engines are built with here: 10.3 is JetPack 6's, and has strongly typed networks."""

ATTENTION_OPERATOR: dict[str, Version] = {"tensorrt": (10, 14), "tensorrt-rtx": (1, 0)}
"""The first that knows attention as an operator, opset 23."""

_EVERY: Version = (0,)
RTX_TARGETS: dict[Capability, Version] = {
    **dict.fromkeys(((7, 5), (8, 0), (8, 6), (8, 9), (12, 0)), _EVERY),
    (12, 1): (1, 5),
}
"""What TensorRT-RTX up to 1.7 builds for, and since when."""
_RTX_TARGETS_KNOWN_TO: Version = (1, 7)

_LEVELS = range(6)


@dataclass(frozen=True)
class BuildFlags:
    """What a builder is asked for besides shapes and GPUs; the defaults leave everything to it.

    workspace_bytes      the most scratch memory a layer may take
    optimization_level   0 (quickest build) to 5 (longest search)
    version_compatible   later versions of TensorRT can load the engine
    hardware_compatible  it runs on every GPU from Ampere (8.0) on, slower than one for its own
    weight_streaming     weights may stay in the host's memory and be streamed
    strip_weights        the engine has no weights: they are put in from the ONNX file where it is loaded
    timing_cache         file of kernel timings to read and to add to
    tf32                 let float32 products and convolutions use TF32; without it fp32 means fp32
    """

    workspace_bytes: int | None = None
    optimization_level: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    weight_streaming: bool = False
    strip_weights: bool = False
    timing_cache: str | None = None
    tf32: bool = False

    def __post_init__(self) -> None:
        if self.workspace_bytes is not None and self.workspace_bytes < 1:
            raise InputError(
                f"workspace of {self.workspace_bytes} bytes: give a positive number, or none for the builder's own"
            )
        if self.optimization_level is not None and self.optimization_level not in _LEVELS:
            raise InputError(f"optimization level {self.optimization_level}: levels are {_LEVELS[0]} to {_LEVELS[-1]}")

    def asked(self) -> dict[str, Any]:
        """The flags that are not the builder's own choice, as JSON values; a timing cache decides nothing."""
        default = asdict(BuildFlags())
        return {name: v for name, v in asdict(self).items() if v != default[name] and name != "timing_cache"}


class Rule(NamedTuple):
    """Of one flag: its name on the command line, the first version of each builder that has it (None: no version has),
    the names in the library that it needs, and what to do where no version has it."""

    flag: str
    tensorrt: Version | None
    rtx: Version | None
    needs: tuple[str, ...]
    instead: str = ""
    rtx_needs_gpu: bool = False

    def since(self, builder: str) -> Version | None:
        return self.rtx if builder == "tensorrt-rtx" else self.tensorrt


RULES: dict[str, Rule] = {
    "workspace_bytes": Rule("--workspace", (8, 4), _EVERY, ("MemoryPoolType.WORKSPACE",)),
    "optimization_level": Rule("--optimization-level", (8, 6), _EVERY, ("IBuilderConfig.builder_optimization_level",)),
    "version_compatible": Rule(
        "--version-compatible", (8, 6), None, ("BuilderFlag.VERSION_COMPATIBLE",), "build again for each version"
    ),
    "hardware_compatible": Rule(
        "--hardware-compatible", (8, 6), None,
        ("IBuilderConfig.hardware_compatibility_level", "HardwareCompatibilityLevel.AMPERE_PLUS"),
        "name the GPUs with --target",
    ),
    "weight_streaming": Rule("--weight-streaming", (10, 0), _EVERY, ("BuilderFlag.WEIGHT_STREAMING",)),
    "strip_weights": Rule("--strip-weights", (10, 0), _EVERY, ("BuilderFlag.STRIP_PLAN",), rtx_needs_gpu=True),
    "timing_cache": Rule(
        "--timing-cache", (8, 0), None, ("IBuilderConfig.create_timing_cache",), "it times no kernels when it builds"
    ),
    "tf32": Rule("TF32", (8, 0), _EVERY, ("BuilderFlag.TF32",)),
}  # fmt: skip


def version_of(text: str) -> Version:
    """`10.16.1.11` as numbers; what follows the numbers is left out."""
    parts = []
    for part in text.split("."):
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        parts.append(int(digits))
    return tuple(parts)


def check_version(builder: str, version: str) -> None:
    """Raise EngineError for a builder that is too old to build any engine here."""
    if version_of(version) < OLDEST[builder]:
        raise EngineError(
            f"{title(builder)} {version} is too old: engines are built by {_shown(OLDEST[builder])} or newer, whose "
            "networks are strongly typed; update it"
        )


def knows_opset(builder: str, version: str, opset: int) -> bool:
    """Whether this version parses the opset: from 23 on it has to know attention as an operator."""
    return opset < 23 or version_of(version) >= ATTENTION_OPERATOR[builder]


def check_flags(builder: str, version: str, flags: BuildFlags, *, gpu: bool = True) -> None:
    """Refuse what this version of a builder does not have; the message says which has it.

    gpu   whether this machine has one

    Raises InputError for what no version of the builder has, EngineError for what this one lacks.
    """
    check_version(builder, version)
    for name in _wanted(flags):
        rule = RULES[name]
        since = rule.since(builder)
        if since is None:
            others = [f"{title(b)} {_shown(v)} or newer" for b in OLDEST if b != builder and (v := rule.since(b))]
            raise InputError(
                f"{rule.flag}: no {title(builder)} has it, {' and '.join(others)} does; leave it out, {rule.instead}"
            )
        if version_of(version) < since:
            raise EngineError(
                f"{rule.flag}: {title(builder)} {version} does not have it, {_shown(since)} or newer does; update it, "
                "or leave the flag out"
            )
        if rule.rtx_needs_gpu and builder == "tensorrt-rtx" and not gpu:
            raise EngineError(
                f"{rule.flag}: {title(builder)} {version} needs a GPU for it and none is visible; leave it out, or "
                "build on a machine with one"
            )


def check_targets(version: str, targets: Sequence[Capability]) -> None:
    """Refuse compute capabilities that this TensorRT-RTX does not build for, as far as that is known without it.

    Raises InputError for one that none builds for, EngineError for one that this version lacks.
    """
    for target in targets:
        since, name = RTX_TARGETS.get(target), "sm{}{}".format(*target)
        if since is None and version_of(version)[:2] <= _RTX_TARGETS_KNOWN_TO:
            known = ", ".join("sm{}{}".format(*other) for other in RTX_TARGETS)
            raise InputError(
                f"--target {name}: TensorRT-RTX {version} builds for {known}; for another GPU build with TensorRT on "
                "its machine"
            )
        if since is not None and version_of(version) < since:
            raise EngineError(
                f"--target {name}: TensorRT-RTX {version} does not build for it, {_shown(since)} or newer does; "
                "update it, or leave the target out"
            )


def apply_flags(trt: Any, builder: str, config: Any, flags: BuildFlags) -> None:
    """Set the flags on an IBuilderConfig of the loaded library `trt`; TF32, on by default, is set or cleared.

    The timing cache is not set here: `timing` does. Raises EngineError for what the library does not have after all.
    """
    for name in _wanted(flags):
        for place in RULES[name].needs:
            owner, _, member = place.partition(".")
            if not hasattr(getattr(trt, owner, None), member):
                since = RULES[name].since(builder)
                raise EngineError(
                    f"{RULES[name].flag}: {title(builder)} {trt.__version__} has no {place}, which came with "
                    f"{_shown(since or ())}; leave the flag out, or use another version"
                )
    (config.set_flag if flags.tf32 else config.clear_flag)(trt.BuilderFlag.TF32)
    if flags.workspace_bytes is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, flags.workspace_bytes)
    if flags.optimization_level is not None:
        config.builder_optimization_level = flags.optimization_level
    if flags.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if flags.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if flags.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if flags.strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)


def _wanted(flags: BuildFlags) -> list[str]:
    default = asdict(BuildFlags())
    return [name for name, value in asdict(flags).items() if value != default[name]]


def _shown(version: Version) -> str:
    return ".".join(map(str, version)) if any(version) else "every version"

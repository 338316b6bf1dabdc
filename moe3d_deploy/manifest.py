"""The manifest of a bundle: `manifest.json` as a tree of frozen dataclasses, read strictly.

It knows the fields and their rules (docs/bundle.md) and opens no file; `bundle` does.
"""

import dataclasses
import json
import re
import types
import typing
from dataclasses import dataclass, field
from typing import Any, TypeVar

from moe3d_deploy import strict_json
from moe3d_deploy.config import IMAGE_MEAN, IMAGE_STD, ModelConfig
from moe3d_deploy.errors import BundleError, InputError
from moe3d_deploy.strict_json import MAX_DEPTH, show

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
BUILDERS = ("tensorrt", "tensorrt-rtx")

_T = TypeVar("_T")
_NAME_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ABSOLUTE = re.compile(r"[/\\~]|[A-Za-z]:[/\\]|file:")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_MAY_BE_ABSENT = {"may_be_absent": True}  # of a field: its key is left out where it has nothing to say


def check_name(name: str, what: str) -> None:
    """Raise BundleError, naming `what` holds it, unless `name` may name a file of a bundle.

    Relative, parts joined by `/`, each of ASCII letters, digits and `_ . + -`, starting with none of `. + -`.
    """
    parts = name.split("/")
    _require(not _ABSOLUTE.match(name), what, f"{show(name)} is an absolute path")
    _require("\\" not in name, what, f"{show(name)} has a backslash")
    _require(".." not in parts, what, f"{show(name)} leads out of its folder by '..'")
    _require("" not in parts, what, f"{show(name)} has an empty part")
    good = all(_NAME_PART.fullmatch(part) for part in parts)
    _require(good, what, f"{show(name)} is no file name of a bundle (ASCII letters, digits and _ . + -)")
    _require(name != MANIFEST_NAME, what, f"{name} cannot be the manifest itself")


@dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 of one file."""

    size: int
    sha256: str

    def __post_init__(self) -> None:
        _require(self.size >= 0, "size", "must not be negative")
        _require(bool(_SHA256.fullmatch(self.sha256)), "sha256", "must be 64 lower-case hex digits")


@dataclass(frozen=True)
class Checkpoint:
    """Where the weights come from. `sha256` is None for weights that have no file, such as seeded ones."""

    origin: str
    sha256: str | None
    licence: str

    def __post_init__(self) -> None:
        _require(not _ABSOLUTE.match(self.origin), "origin", "must be a base name, not a path of one machine")
        if self.sha256 is not None:
            _require(bool(_SHA256.fullmatch(self.sha256)), "sha256", "must be 64 lower-case hex digits")


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a view: `size` and `patch_size` in pixels, mean and std of RGB in [0,1]."""

    mode: str
    size: int
    patch_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    layout: str

    @classmethod
    def of(cls, config: ModelConfig) -> "Preprocessing":
        """VGGT's default: its crop loader at the model's own size. The graph itself normalises by mean and std."""
        return cls("crop", config.img_size, config.patch_size, IMAGE_MEAN, IMAGE_STD, "BS3HW")

    def __post_init__(self) -> None:
        _require(self.size > 0 and self.patch_size > 0, "size", "and patch_size must be positive")
        _require(min(self.std) > 0, "std", "must be positive")


@dataclass(frozen=True)
class Tensor:
    """One input or output; a `shape` entry is a symbol such as "B" or a number."""

    name: str
    dtype: str
    shape: tuple[str | int, ...]
    meaning: str

    def __post_init__(self) -> None:
        _require(self.dtype in ("float32", "uint8"), "dtype", f"must be float32 or uint8, not {show(self.dtype)}")
        for size in self.shape:
            good = size > 0 if isinstance(size, int) else bool(_SYMBOL.fullmatch(size))
            _require(good, "shape", f"has {show(size)}, neither a symbol nor a positive number")


@dataclass(frozen=True)
class Range:
    """Values min, min + step, ... up to max; `max` None is unbounded."""

    min: int
    max: int | None
    step: int = 1

    def __post_init__(self) -> None:
        _require(self.min > 0 and self.step > 0, "min", "and step must be positive")
        _require(self.max is None or self.max >= self.min, "max", "must not be below min")


@dataclass(frozen=True)
class ShapeRanges:
    """What the ONNX file accepts: scenes, views, and pixels of height and width."""

    batch: Range
    views: Range
    height: Range
    width: Range

    @classmethod
    def of(cls, config: ModelConfig) -> "ShapeRanges":
        """Everything that a model takes: any number of scenes and views, sides in whole patches."""
        pixels = Range(min=config.patch_size, max=None, step=config.patch_size)
        return cls(batch=Range(1, None), views=Range(1, None), height=pixels, width=pixels)


@dataclass(frozen=True)
class Profile:
    """One optimisation profile of an engine; each of min, opt, max is (B, S, H, W)."""

    min: tuple[int, int, int, int]
    opt: tuple[int, int, int, int]
    max: tuple[int, int, int, int]

    def __post_init__(self) -> None:
        ordered = all(0 < a <= b <= c for a, b, c in zip(self.min, self.opt, self.max, strict=True))
        _require(ordered, "min", "<= opt <= max must hold for each of B, S, H, W, all positive")


@dataclass(frozen=True)
class EngineRecord:
    """One engine. `compute_capabilities` are 10 x major + minor (89 is 8.9); `plugin` None is a plugin-free engine."""

    file: str
    builder: str
    builder_version: str
    compute_capabilities: tuple[int, ...]
    precision: str
    profiles: tuple[Profile, ...]
    plugin: dict[str, Any] | None = None
    audit: dict[str, Any] = field(default_factory=dict)
    build: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_name(self.file, "file")
        _require(self.file.startswith("engines/"), "file", f"must lie in engines/, not {show(self.file)}")
        _require(self.builder in BUILDERS, "builder", f"must be one of {', '.join(BUILDERS)}")
        _require(bool(self.compute_capabilities), "compute_capabilities", "must not be empty")
        _require(min(self.compute_capabilities) > 0, "compute_capabilities", "must be positive")
        _require(bool(self.profiles), "profiles", "must not be empty")


@dataclass(frozen=True)
class Verification:
    """What was compared with PyTorch; docs/bundle.md gives the usual form of the inner fields.

    `quality` is empty, and its key absent from the JSON form, where depth was not compared with the truth of scenes.
    """

    status: str
    limits: dict[str, Any] = field(default_factory=dict)
    cases: tuple[dict[str, Any], ...] = ()
    headroom: dict[str, Any] = field(default_factory=dict)
    quality: dict[str, Any] = field(default_factory=dict, metadata=_MAY_BE_ABSENT)

    def __post_init__(self) -> None:
        _require(self.status in ("passed", "skipped"), "status", "must be passed or skipped")


@dataclass(frozen=True)
class Manifest:
    """Everything a reader has to know of a bundle, field by field in docs/bundle.md."""

    name: str
    created_by: dict[str, str]
    model_config: dict[str, Any]
    checkpoint: Checkpoint
    preprocessing: Preprocessing
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    precision: str
    opset: int
    shape_ranges: ShapeRanges
    merged_experts: bool
    verification: Verification
    engines: tuple[EngineRecord, ...] = ()
    files: dict[str, FileEntry] = field(default_factory=dict)
    model_file: str = "model.onnx"
    format_version: int = FORMAT_VERSION

    @property
    def only_in_tensorrt(self) -> bool:
        """Whether the ONNX file holds bfloat16, for which ONNX Runtime has no kernels on a CPU: an engine runs it."""
        return self.precision.partition("-")[0] == "bf16"

    @property
    def config(self) -> ModelConfig:
        """`model_config` as a ModelConfig."""
        return ModelConfig.from_dict(self.model_config)

    @classmethod
    def from_json(cls, text: str, source: str = MANIFEST_NAME) -> "Manifest":
        """Read and check the JSON form; whatever is wrong with `text` is a BundleError that names `source`."""
        try:
            values = strict_json.parse(text.encode("utf-8", "surrogatepass"))
        except strict_json.JsonError as error:
            raise BundleError(f"{source} {error}; copy the bundle again or export it again") from None
        version = values.get("format_version") if isinstance(values, dict) else None
        if type(version) is int and version != FORMAT_VERSION:
            age = "update moe3d-deploy" if version > FORMAT_VERSION else "export the bundle again"
            raise BundleError(f"{source} has format_version {version}; this version reads {FORMAT_VERSION}: {age}")
        try:
            manifest = _read(cls, values, "")
            manifest._check_across_fields()
        except BundleError as error:
            raise BundleError(f"{source}: {error}; copy the bundle again or export it again") from None
        return manifest

    def to_json(self) -> str:
        """The JSON form: sorted keys, indented by 2, a newline at the end.

        Raises BundleError for what `from_json` would refuse.
        """
        try:
            values = dataclasses.asdict(self)
        except RecursionError:
            raise BundleError(f"{MANIFEST_NAME} is nested more than {MAX_DEPTH} deep") from None
        if not self.verification.quality:
            del values["verification"]["quality"]
        try:
            strict_json.check_values(values)
        except strict_json.JsonError as error:
            raise BundleError(f"{MANIFEST_NAME} {error}") from None
        text = json.dumps(values, sort_keys=True, indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        Manifest.from_json(text)
        return text

    def _check_across_fields(self) -> None:
        try:
            self.config  # noqa: B018
        except InputError as error:
            raise BundleError(f"model_config: {error}") from None
        for name in self.files:
            check_name(name, "files:")
        _require(self.opset > 0, "opset", "must be positive")
        for kind, tensors in (("inputs", self.inputs), ("outputs", self.outputs)):
            _require(bool(tensors), kind, "must not be empty")
            _require(len({tensor.name for tensor in tensors}) == len(tensors), kind, "has a name twice")
        _require("/" not in self.model_file, "model_file", "must lie in the bundle folder itself")
        _require(self.model_file.endswith(".onnx"), "model_file", "must end in .onnx")
        _require(self.model_file in self.files, "model_file", f"{show(self.model_file)} is not among the files")
        engines = [engine.file for engine in self.engines]
        _require(len(set(engines)) == len(engines), "engines", "has a file twice")
        for name in engines:
            _require(name in self.files, "engines", f"{show(name)} is not among the files")


def _require(condition: bool, key: str, rule: str) -> None:
    if not condition:
        raise BundleError(f"{key} {rule}")


def _read(cls: type[_T], values: Any, where: str) -> _T:
    """Build dataclass `cls` from a JSON object that has exactly its fields, but for those that may be absent."""
    if not isinstance(values, dict):
        raise BundleError(f"{where or 'the top level'} must be an object, not {show(values)}")
    hints = typing.get_type_hints(cls)
    prefix = where + "." if where else ""
    for key in values:
        _require(key in hints, f"{prefix}{show(key)}", "is unknown")
    optional = {f.name for f in dataclasses.fields(cls) if f.metadata == _MAY_BE_ABSENT}  # type: ignore[arg-type]
    for key in hints:
        _require(key in values or key in optional, prefix + key, "is missing")
    arguments = {key: _convert(hint, values[key], prefix + key) for key, hint in hints.items() if key in values}
    try:
        return cls(**arguments)
    except BundleError as error:
        raise BundleError(f"{prefix}{error}") from None


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` as the type that `hint` names; int, float, bool and str are never mixed up."""
    if isinstance(hint, types.UnionType):
        arms = typing.get_args(hint)
        if value is None and type(None) in arms:
            return None
        hint = next((arm for arm in arms if arm is type(value)), arms[0])
    origin, items = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _read(typing.cast(type, hint), value, where)
    if origin is tuple:
        _require(isinstance(value, list), where, f"must be a list, not {show(value)}")
        kinds = items[:1] * len(value) if items[-1] is ... else items
        _require(len(value) == len(kinds), where, f"must have {len(kinds)} entries, not {len(value)}")
        return tuple(_convert(kind, v, f"{where}[{i}]") for i, (kind, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is dict:
        _require(isinstance(value, dict), where, f"must be an object, not {show(value)}")
        if items[1] is Any:
            return value
        return {_convert(str, k, where): _convert(items[1], v, f"{where}[{show(k)}]") for k, v in value.items()}
    if hint is float and type(value) is int:
        value = float(value)
    _require(type(value) is hint, where, f"must be {hint.__name__}, not {show(value)}")
    if hint is str:
        good = value != "" and not _CONTROL.search(value)
        _require(good, where, f"must be non-empty text without control characters, not {show(value)}")
    return value

"""The manifest of a bundle: `manifest.json` as a tree of frozen dataclasses, read strictly.

It knows the fields and their rules (docs/bundle.md) and opens no file; `bundle` does.
"""

import dataclasses
import json
import re
from dataclasses import dataclass, field
from typing import Any

from moe3d_deploy import strict_json
from moe3d_deploy.config import IMAGE_MEAN, IMAGE_STD, ModelConfig
from moe3d_deploy.errors import BundleError, InputError
from moe3d_deploy.strict_fields import MAY_BE_ABSENT as _MAY_BE_ABSENT
from moe3d_deploy.strict_fields import read as _read
from moe3d_deploy.strict_fields import require as _require
from moe3d_deploy.strict_json import MAX_DEPTH, show

SINGLE_FILE_VERSION = 1  # what a bundle of one ONNX file has: readers of old take it
FORMAT_VERSION = 2  # the newest, of a model that is split over several files
FORMAT_VERSIONS = (SINGLE_FILE_VERSION, FORMAT_VERSION)
MANIFEST_NAME = "manifest.json"
PIECE_BYTES = 1 << 26  # of a large file, each with a digest of its own
BUILDERS = ("tensorrt", "tensorrt-rtx")

SPLITS = {"heads": ("aggregator", "heads"), "encoder": ("encoder", "decoder")}
"""How a model is split: the roles of its parts, in the order they run."""
PER_VIEW = ("encoder", "heads")
"""The roles whose graphs look at each view by itself: any views may be run together, and in any number."""
WITH_HEADS = (None, "heads", "decoder")
"""The roles whose graphs have the dense heads, and so the experts; None is a model in one file."""

_NAME_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_ABSOLUTE = re.compile(r"[/\\~]|[A-Za-z]:[/\\]|file:")


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
    """Size in bytes and SHA-256 of one file; of a file of more than PIECE_BYTES also that of each such piece."""

    size: int
    sha256: str
    pieces: tuple[str, ...] = field(default=(), metadata=_MAY_BE_ABSENT)

    def __post_init__(self) -> None:
        _require(self.size >= 0, "size", "must not be negative")
        for key, digest in [("sha256", self.sha256), *(("pieces", digest) for digest in self.pieces)]:
            _require(bool(_SHA256.fullmatch(digest)), key, "must be 64 lower-case hex digits")
        if self.pieces:
            count = -(-self.size // PIECE_BYTES)
            _require(len(self.pieces) == count, "pieces", f"must have {count} digests for {self.size} bytes")


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

    def __contains__(self, value: int) -> bool:
        return self.min <= value <= (value if self.max is None else self.max) and (value - self.min) % self.step == 0


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

    def takes(self, shape: tuple[int, int, int, int]) -> bool:
        """Whether the file takes images of `shape` (B, S, H, W)."""
        axes = (self.batch, self.views, self.height, self.width)
        return all(size in axis for size, axis in zip(shape, axes, strict=True))


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
    part: str | None = field(default=None, metadata=_MAY_BE_ABSENT)  # role of the part it runs; None: the whole model

    def __post_init__(self) -> None:
        check_name(self.file, "file")
        _require(self.file.startswith("engines/"), "file", f"must lie in engines/, not {show(self.file)}")
        _require(self.builder in BUILDERS, "builder", f"must be one of {', '.join(BUILDERS)}")
        _require(bool(self.compute_capabilities), "compute_capabilities", "must not be empty")
        _require(min(self.compute_capabilities) > 0, "compute_capabilities", "must be positive")
        _require(bool(self.profiles), "profiles", "must not be empty")


@dataclass(frozen=True)
class Part:
    """One ONNX file of a split model. A tensor that one part gives and a later one takes has one name in both."""

    role: str
    file: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        roles = [role for split in SPLITS.values() for role in split]
        _require(self.role in roles, "role", f"must be one of {', '.join(roles)}, not {show(self.role)}")
        for kind, tensors in (("inputs", self.inputs), ("outputs", self.outputs)):
            _check_tensors(kind, tensors)

    @property
    def per_view(self) -> bool:
        """Whether it looks at each view by itself."""
        return self.role in PER_VIEW


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
    format_version: int = SINGLE_FILE_VERSION
    parts: tuple[Part, ...] = field(default=(), metadata=_MAY_BE_ABSENT)

    @property
    def split(self) -> str | None:
        """How the model is split, a key of SPLITS; None for one file."""
        roles = tuple(part.role for part in self.parts)
        return next((name for name, split in SPLITS.items() if split == roles), None)

    @property
    def model_files(self) -> tuple[str, ...]:
        """The ONNX files, in the order they run."""
        return tuple(part.file for part in self.parts) or (self.model_file,)

    def part(self, role: str) -> Part:
        """The part of a role. Raises InputError for one that this bundle does not have."""
        found = next((part for part in self.parts if part.role == role), None)
        if found is None:
            roles = ", ".join(part.role for part in self.parts)
            has = f"its parts are {roles}" if roles else "its model is one file"
            raise InputError(f"bundle of {self.name} has no part {role!r}: {has}")
        return found

    @property
    def only_in_tensorrt(self) -> bool:
        """Whether the ONNX file holds bfloat16, for which ONNX Runtime has no kernels on a CPU: an engine runs it."""
        return self.precision.partition("-")[0] == "bf16"

    @property
    def only_in_onnxruntime(self) -> bool:
        """Whether the ONNX file holds products in 8 bits, in the form that ONNX Runtime has kernels for on a CPU."""
        return self.precision == "int8"

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
        if type(version) is int and version not in FORMAT_VERSIONS:
            age = "update moe3d-deploy" if version > FORMAT_VERSION else "export the bundle again"
            read = " and ".join(map(str, FORMAT_VERSIONS))
            raise BundleError(f"{source} has format_version {version}; this version reads {read}: {age}")
        try:
            manifest = _read(cls, values, "")
            _check_keys_of_version(values)
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
        for entry in values["files"].values():
            if not entry["pieces"]:
                del entry["pieces"]
        if not self.parts:
            del values["parts"]
        for engine in values["engines"]:
            if engine["part"] is None:
                del engine["part"]
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
            _check_tensors(kind, tensors)
        self._check_model_file("model_file", self.model_file)
        engines = [engine.file for engine in self.engines]
        _require(len(set(engines)) == len(engines), "engines", "has a file twice")
        for name in engines:
            _require(name in self.files, "engines", f"{show(name)} is not among the files")
        if self.format_version == FORMAT_VERSION or self.parts:
            self._check_parts()

    def _check_model_file(self, key: str, name: str) -> None:
        _require("/" not in name, key, "must lie in the bundle folder itself")
        _require(name.endswith(".onnx"), key, "must end in .onnx")
        _require(name in self.files, key, f"{show(name)} is not among the files")

    def _check_parts(self) -> None:
        """A split model: its two roles in order, and every tensor that one takes is given by one before it."""
        _require(self.format_version == FORMAT_VERSION, "parts", f"need format_version {FORMAT_VERSION}")
        splits = " or ".join(", ".join(roles) for roles in SPLITS.values())
        _require(self.split is not None, "parts", f"must have the roles {splits}, in this order")
        _require(self.model_file == self.parts[0].file, "model_file", "must be the first part's file")
        _require(len(set(self.model_files)) == len(self.parts), "parts", "has a file twice")
        there = {tensor.name: tensor for tensor in self.inputs}
        for index, part in enumerate(self.parts):
            self._check_model_file(f"parts[{index}].file", part.file)
            for tensor in part.inputs:
                where, name = f"parts[{index}].inputs", show(tensor.name)
                _require(tensor.name in there, where, f"has {name}, which neither the model takes nor a part before")
                _require(_fits(tensor, there[tensor.name]), where, f"has another {name} than is given")
            there |= {tensor.name: tensor for tensor in part.outputs}
        for tensor in self.outputs:
            _require(tensor.name in there, "outputs", f"has {show(tensor.name)}, which no part gives")
        roles = [part.role for part in self.parts]
        for index, engine in enumerate(self.engines):
            _require(engine.part in roles, f"engines[{index}].part", f"must be one of {', '.join(roles)}")


def _fits(taken: Tensor, given: Tensor) -> bool:
    """Whether one tensor can be the other: the same type and axes, of which one may be fixed where it is free there."""
    if taken.dtype != given.dtype or len(taken.shape) != len(given.shape):
        return False
    return all(
        a == b or isinstance(a, str) != isinstance(b, str) for a, b in zip(taken.shape, given.shape, strict=True)
    )


def _check_tensors(kind: str, tensors: tuple[Tensor, ...]) -> None:
    _require(bool(tensors), kind, "must not be empty")
    _require(len({tensor.name for tensor in tensors}) == len(tensors), kind, "has a name twice")


def _check_keys_of_version(values: dict[str, Any]) -> None:
    """The keys that came with a split model are unknown in the version before it, and required in its own."""
    single = values["format_version"] == SINGLE_FILE_VERSION
    held = {"parts": "parts" in values}
    held |= {f"engines[{index}].part": "part" in engine for index, engine in enumerate(values["engines"])}
    for key, there in held.items():
        _require(not (single and there), key, f"is unknown in format_version {SINGLE_FILE_VERSION}")
        _require(single or there, key, "is missing")

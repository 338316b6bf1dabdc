"""Model configuration: every size of VGGT and of the MoE3D head, as JSON-able frozen dataclasses.

The JSON form is that of a checkpoint's `config.json`. Nothing here touches weights or torch.
"""

import dataclasses
import types
import typing
from dataclasses import dataclass
from typing import Any, TypeVar

from moe3d_deploy.errors import InputError

IMAGE_MEAN = (0.485, 0.456, 0.406)  # of RGB in [0, 1]; the graph normalises, not its user
IMAGE_STD = (0.229, 0.224, 0.225)

_LARGEST_NUMBER = 1e12  # beyond any size; also keeps NaN, inf and integers too long for a float out

_T = TypeVar("_T")


@dataclass(frozen=True)
class VitConfig:
    """The per-view DINOv2 encoder. Defaults are ViT-L with registers."""

    embed_dim: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_register_tokens: int = 4
    init_values: float = 1.0  # LayerScale at initialisation, for training only


@dataclass(frozen=True)
class AggregatorConfig:
    """The alternating attention: `depth` pairs of a frame block and a global block."""

    embed_dim: int = 1024
    depth: int = 24
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_register_tokens: int = 4
    rope_freq: float = 100.0
    init_values: float = 0.01  # LayerScale at initialisation, for training only


@dataclass(frozen=True)
class CameraHeadConfig:
    dim_in: int = 2048
    trunk_depth: int = 4
    num_heads: int = 16
    num_iterations: int = 4


@dataclass(frozen=True)
class DptHeadConfig:
    """The depth head and the point head; they differ only in their output channels."""

    dim_in: int = 2048
    features: int = 256
    out_channels: tuple[int, int, int, int] = (256, 512, 1024, 1024)
    intermediate_layer_idx: tuple[int, int, int, int] = (4, 11, 17, 23)


@dataclass(frozen=True)
class MoeConfig:
    """The expert head: K experts and a gate on the depth head's full-resolution features."""

    num_experts: int = 4
    hidden_channels: int = 32
    gate_hidden_channels: int = 32
    temperature: float = 1.0


@dataclass(frozen=True)
class ModelConfig:
    """All sizes of one model. `moe` None is plain VGGT; `point_head` says whether the weights hold one."""

    img_size: int = 518
    patch_size: int = 14
    vit: VitConfig = VitConfig()
    aggregator: AggregatorConfig = AggregatorConfig()
    camera_head: CameraHeadConfig = CameraHeadConfig()
    dpt_head: DptHeadConfig = DptHeadConfig()
    moe: MoeConfig | None = None
    point_head: bool = True

    def __post_init__(self) -> None:
        _check_sizes(self)

    @property
    def token_dim(self) -> int:
        """Channels of an aggregator output: frame and global features side by side."""
        return 2 * self.aggregator.embed_dim

    @property
    def pos_embed_grid(self) -> int:
        """Side of the stored position-embedding grid."""
        return self.img_size // self.patch_size

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ModelConfig":
        """Read the JSON form; an unknown key or a value of the wrong type raises InputError.

        `preset` is ignored, `moe` absent means none, `point_head` absent means there is one.
        """
        if isinstance(values, dict):
            values = {key: value for key, value in values.items() if key != "preset"}
        return _read(cls, values, "model config")

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; `from_dict` of it gives an equal config."""
        return _plain(dataclasses.asdict(self))


def _read(cls: type[_T], values: Any, where: str) -> _T:
    """Build dataclass `cls` from JSON `values`, with its own defaults for absent keys."""
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected an object, got {type(values).__name__}")
    hints = typing.get_type_hints(cls)
    if unknown := sorted(str(key) for key in values if key not in hints):
        raise InputError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(hints)}")
    return cls(**{key: _convert(hints[key], value, f"{where}.{key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    if isinstance(hint, types.UnionType):  # `X | None`
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not type(None))
    if dataclasses.is_dataclass(hint):
        return _read(typing.cast(type, hint), value, where)
    if typing.get_origin(hint) is tuple:
        items = typing.get_args(hint)
        if not isinstance(value, (list, tuple)) or len(value) != len(items):
            raise InputError(f"{where}: expected a list of {len(items)} integers, got {value!r}")
        return tuple(_convert(item, v, f"{where}[{i}]") for i, (item, v) in enumerate(zip(items, value, strict=True)))
    if hint is bool and isinstance(value, bool):
        return value
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint in (int, float) and is_number and abs(value) < _LARGEST_NUMBER and hint(value) == value:
        return hint(value)
    raise InputError(f"{where}: expected {hint.__name__}, got {value!r}")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _check_sizes(c: ModelConfig) -> None:
    def require(condition: bool, message: str) -> None:
        if not condition:
            raise InputError(f"model config: {message}")

    for name in ("img_size", "patch_size"):
        require(getattr(c, name) > 0, f"{name} must be positive")
    require(c.img_size % c.patch_size == 0, "img_size must be a multiple of patch_size")
    parts: list[Any] = [c.vit, c.aggregator, c.camera_head, c.dpt_head] + ([c.moe] if c.moe else [])
    for part in parts:
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if isinstance(value, (int, float)):
                require(value > 0, f"{field.name} must be positive, got {value}")
    for name, blocks in (("vit", c.vit), ("aggregator", c.aggregator)):
        width = blocks.mlp_ratio * blocks.embed_dim
        require(width >= 1, f"{name}: mlp_ratio {blocks.mlp_ratio} leaves its MLP without a channel")
    require(c.vit.embed_dim == c.aggregator.embed_dim, "vit.embed_dim and aggregator.embed_dim must be equal")
    for name, width, heads in (
        ("vit", c.vit.embed_dim, c.vit.num_heads),
        ("aggregator", c.aggregator.embed_dim, c.aggregator.num_heads),
        ("camera_head", c.camera_head.dim_in, c.camera_head.num_heads),
    ):
        require(width % heads == 0, f"{name}: width {width} is not a multiple of {heads} heads")
    require(
        (c.aggregator.embed_dim // c.aggregator.num_heads) % 4 == 0,
        "aggregator: the head width must be a multiple of 4 for 2D rotary embedding",
    )
    for name in ("camera_head", "dpt_head"):
        require(getattr(c, name).dim_in == c.token_dim, f"{name}.dim_in must be {c.token_dim} (2 x embed_dim)")
    require(c.dpt_head.features % 8 == 0, "dpt_head.features must be a multiple of 8")
    require(
        all(w > 0 and w % 4 == 0 for w in c.dpt_head.out_channels),
        "dpt_head.out_channels must be multiples of 4",
    )
    require(
        all(0 <= i < c.aggregator.depth for i in c.dpt_head.intermediate_layer_idx),
        f"dpt_head.intermediate_layer_idx must lie in 0..{c.aggregator.depth - 1}",
    )


_TINY = ModelConfig(
    img_size=224,
    patch_size=7,
    vit=VitConfig(embed_dim=128, depth=4, num_heads=4),
    aggregator=AggregatorConfig(embed_dim=128, depth=4, num_heads=4, init_values=0.1),
    camera_head=CameraHeadConfig(dim_in=256, trunk_depth=2, num_heads=4),
    dpt_head=DptHeadConfig(
        dim_in=256, features=64, out_channels=(48, 96, 128, 128), intermediate_layer_idx=(0, 1, 2, 3)
    ),
    moe=MoeConfig(hidden_channels=16, gate_hidden_channels=16),
    point_head=False,
)

PRESETS: dict[str, ModelConfig] = {
    "vggt-1b": ModelConfig(),
    "moe3d-1b": ModelConfig(moe=MoeConfig()),
    "moe3d-tiny": _TINY,
}

"""A model's sizes, read from the shapes of its tensors; and which config these make where no config.json is there.

Shapes tell every width and depth, the number of experts and whether there is a point head. They do not tell what UNTOLD
names: that comes from a preset of the same backbone, or there is no config.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe3d_deploy.checkpoint_files import CONFIG_FILE
from moe3d_deploy.config import PRESETS, ModelConfig, MoeConfig
from moe3d_deploy.errors import CheckpointError, InputError

Shapes = Mapping[str, tuple[int, ...]]

UNTOLD = (
    "vit.num_heads",
    "camera_head.num_heads",
    "camera_head.num_iterations",
    "aggregator.rope_freq",
    "dpt_head.intermediate_layer_idx",
    "moe.temperature",
)
_BACKBONE = ("aggregator.embed_dim", "aggregator.depth", "aggregator.num_heads")

# Beyond any model: a config must not make us build a million blocks only to say that they are not in the weights.
_LARGEST_COUNT = 1000  # blocks, experts, iterations
_LARGEST_WIDTH = 65536  # channels, tokens, pixels
_COUNT_FIELDS = ("depth", "trunk_depth", "num_experts", "num_iterations", "num_register_tokens")
_UNBOUNDED = ("rope_freq", "temperature", "init_values")

_VIT = r"aggregator\.patch_embed\."
_PAIR = r"aggregator\.(?:frame|global)_blocks\.\d+\."
_HEADS = r"(?:depth|point)_head\."
_INDEX = r"(\d{1,3})\."

_AXIS_OF = {
    "patch_size": (rf"{_VIT}patch_embed\.proj\.weight", 3),
    "vit.embed_dim": (rf"{_VIT}(?:blocks\.\d+\.)?norm\d?\.(?:weight|bias)", 0),
    "vit.num_register_tokens": (rf"{_VIT}register_tokens", 1),
    "aggregator.embed_dim": (rf"{_PAIR}norm[12]\.(?:weight|bias)", 0),
    "aggregator.num_register_tokens": (r"aggregator\.register_token", 2),
    "camera_head.dim_in": (r"camera_head\.(?:token|trunk)_norm\.(?:weight|bias)", 0),
    "dpt_head.dim_in": (rf"{_HEADS}norm\.(?:weight|bias)", 0),
    "dpt_head.features": (rf"{_HEADS}scratch\.layer[1-4]_rn\.weight", 0),
}
_AXIS_OF_EXPERTS = {
    "moe.hidden_channels": (r"depth_head\.experts\.\d+\.0\.(?:weight|bias)", 0),
    "moe.gate_hidden_channels": (r"depth_head\.gate\.0\.(?:weight|bias)", 0),
}
_COUNT_OF = {
    "vit.depth": rf"{_VIT}blocks\.{_INDEX}",
    "aggregator.depth": rf"aggregator\.(?:frame|global)_blocks\.{_INDEX}",
    "camera_head.trunk_depth": rf"camera_head\.trunk\.{_INDEX}",
    "moe.num_experts": rf"depth_head\.experts\.{_INDEX}",
}


@dataclass(frozen=True)
class Contradiction:
    """A size of which the config says one thing and the tensors another."""

    field: str
    in_config: Any
    in_tensors: Any

    def __str__(self) -> str:
        return f"{self.field} is {_shown(self.in_config)} in the config, {_shown(self.in_tensors)} in the tensors"


def stored_sizes(shapes: Shapes) -> dict[str, Any]:
    """What the tensors say of a config: dotted field -> value. A field of which no tensor speaks is left out.

    Where several tensors have a size, most of them decide: one misshapen tensor does not make another model.
    """
    sizes: dict[str, Any] = {}
    for field, pattern in _COUNT_OF.items():
        sizes[field] = _count(shapes, pattern)
    sizes["point_head"] = any(name.startswith("point_head.") for name in shapes)
    axes = _AXIS_OF | (_AXIS_OF_EXPERTS if sizes["moe.num_experts"] else {})
    for field, (pattern, axis) in axes.items():
        sizes[field] = _most_common(shapes, pattern, axis)
    widths = tuple(_most_common(shapes, rf"{_HEADS}projects\.{i}\.(?:weight|bias)", 0) for i in range(4))
    sizes["dpt_head.out_channels"] = widths if None not in widths else None

    for part, block in (("vit", rf"{_VIT}blocks\.\d+\."), ("aggregator", _PAIR)):
        hidden = _most_common(shapes, rf"{block}mlp\.fc1\.(?:weight|bias)", 0)
        sizes[f"{part}.mlp_ratio"] = _ratio(hidden, sizes[f"{part}.embed_dim"])
    head_width = _most_common(shapes, rf"{_PAIR}attn\.[qk]_norm\.(?:weight|bias)", 0)
    sizes["aggregator.num_heads"] = _quotient(sizes["aggregator.embed_dim"], head_width)
    positions = _most_common(shapes, rf"{_VIT}pos_embed", 1)  # of a square grid and the class token
    if positions and sizes["patch_size"] and (grid := math.isqrt(positions - 1)) ** 2 == positions - 1:
        sizes["img_size"] = grid * sizes["patch_size"]
    return {field: value for field, value in sizes.items() if value is not None}


def contradictions(config: ModelConfig, shapes: Shapes) -> list[Contradiction]:
    """Where `config` and the tensors disagree, experts first."""
    said, stored = _flat(config), stored_sizes(shapes)
    if not said["moe.num_experts"] or not stored["moe.num_experts"]:  # then their widths are no second problem
        stored = {field: value for field, value in stored.items() if field not in _AXIS_OF_EXPERTS}
    found = [Contradiction(f, said[f], value) for f, value in stored.items() if not _agree(f, said, value)]
    return sorted(found, key=lambda item: not item.field.startswith("moe."))


def with_sizes(config: ModelConfig, shapes: Shapes) -> ModelConfig:
    """`config` with every size that the tensors tell. Raises InputError where these make no model."""
    values = config.to_dict()
    sizes = stored_sizes(shapes)
    experts = sizes.pop("moe.num_experts")
    moe = (values["moe"] or dataclasses.asdict(MoeConfig())) | {"num_experts": experts}
    values["moe"] = moe if experts else None
    for field, size in sizes.items():
        part, _, leaf = field.rpartition(".")
        (values[part] if part else values)[leaf] = size
    corrected = ModelConfig.from_dict(values)
    check_modest(corrected)
    return corrected


def infer_config(label: str, shapes: Shapes) -> tuple[ModelConfig, str | None]:
    """The config of weights that have none beside them, and the one line that says what in it is assumed.

    What the shapes do not tell is that of the preset with the same backbone. There is no such line for VGGT-1B itself,
    whose published weights are complete without a config. `label` names the weights. Raises CheckpointError where no
    preset fits. Where tensors are missing the config may be any: the check against it then says which.
    """
    sizes = stored_sizes(shapes)
    if not all(sizes.get(field) for field in _BACKBONE):
        return _or_vggt(shapes), None
    alike = [name for name, preset in PRESETS.items() if all(_flat(preset)[f] == sizes[f] for f in _BACKBONE)]
    experts = bool(sizes["moe.num_experts"])
    if not alike:
        untold = ", ".join(field for field in UNTOLD if experts or not field.startswith("moe."))
        backbone = ", ".join(f"{field} {sizes[field]}" for field in _BACKBONE)
        raise CheckpointError(
            f"{label}: no {CONFIG_FILE}, and no preset has its sizes ({backbone}), so the weights alone do not tell "
            f"{untold}; put their {CONFIG_FILE} beside them"
        )
    name = next((name for name in alike if bool(PRESETS[name].moe) == experts), alike[0])
    preset = _flat(PRESETS[name])
    try:
        config = with_sizes(PRESETS[name], shapes)
    except InputError as error:
        raise CheckpointError(
            f"{label}: no {CONFIG_FILE}, and the sizes of its tensors make no model ({error}); put their {CONFIG_FILE} "
            f"beside them"
        ) from error
    unlike = [f"{field} {_shown(value)}" for field, value in sizes.items() if not _agree(field, preset, value)]
    if name == "vggt-1b" and unlike in ([], ["point_head false"]):
        return config, None
    values = _flat(config)
    assumed = ", ".join(f"{field} {_shown(values[field])}" for field in UNTOLD if field in values)
    but = f" (but {', '.join(unlike)})" if unlike else ""
    return config, (
        f"{label}: no {CONFIG_FILE}; its tensors have the sizes of {name}{but}, and what they do not tell is taken "
        f"from there: {assumed}; if that is wrong, put a {CONFIG_FILE} beside it"
    )


def _or_vggt(shapes: Shapes) -> ModelConfig:
    try:
        return with_sizes(PRESETS["vggt-1b"], shapes)
    except InputError:
        return PRESETS["vggt-1b"]


def check_modest(config: ModelConfig) -> None:
    """Raise InputError for a size beyond any model, which building it would not survive."""
    for field, value in _flat(config).items():
        leaf = field.rpartition(".")[2]
        largest = _LARGEST_COUNT if leaf in _COUNT_FIELDS else _LARGEST_WIDTH
        sizes = value if isinstance(value, tuple) else (value,)
        if leaf not in _UNBOUNDED and max(sizes) > largest:
            raise InputError(f"model config: {field} is {max(sizes):.4g}, beyond any model (at most {largest})")


def _flat(config: ModelConfig) -> dict[str, Any]:
    """Dotted field -> value; a config without experts has 0 of them."""
    flat: dict[str, Any] = {}
    for key, value in config.to_dict().items():
        if isinstance(value, dict):
            flat |= {f"{key}.{leaf}": tuple(v) if isinstance(v, list) else v for leaf, v in value.items()}
        elif key != "moe":
            flat[key] = value
    return {"moe.num_experts": 0} | flat


def _agree(field: str, said: Mapping[str, Any], value: Any) -> bool:
    if field not in said:
        return False
    if field.endswith(".mlp_ratio"):  # what counts is the channels it makes
        width = said[field.replace("mlp_ratio", "embed_dim")]
        return int(said[field] * width) == int(value * width)
    return bool(said[field] == value)


def _count(shapes: Shapes, pattern: str) -> int:
    """How many numbered parts there are, counted to the highest number."""
    return 1 + max((int(match[1]) for name in shapes if (match := re.match(pattern, name))), default=-1)


def _most_common(shapes: Shapes, pattern: str, axis: int) -> int | None:
    found = Counter(s[axis] for name, s in shapes.items() if len(s) > axis and re.fullmatch(pattern, name))
    return found.most_common(1)[0][0] if found else None


def _quotient(value: int | None, divisor: int | None) -> int | None:
    return value // divisor if value and divisor and value % divisor == 0 else None


def _ratio(hidden: int | None, width: int | None) -> float | None:
    """The ratio of which a block makes `hidden` channels: it rounds down, so that of the next float may be needed."""
    if not hidden or not width:
        return None
    ratio = hidden / width
    return ratio if int(ratio * width) == hidden else math.nextafter(ratio, math.inf)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return f"{value:g}" if isinstance(value, float) else str(value)

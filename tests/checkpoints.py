"""Small checkpoints to open and to spoil: one file, several shards, with a config beside them or without."""

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from models import golden_config
from safetensors.torch import save_file
from torch import Tensor

from moe3d_deploy.checkpoint import WeightSource, seeded_source
from moe3d_deploy.config import PRESETS, ModelConfig

NORM = "camera_head.token_norm.weight"
GAMMA = "aggregator.frame_blocks.0.ls1.gamma"

# The least with the backbone of a preset, so that it opens without a config.
LEAST = dataclasses.replace(
    PRESETS["moe3d-tiny"],
    img_size=28,
    vit=dataclasses.replace(PRESETS["moe3d-tiny"].vit, depth=1, mlp_ratio=0.25),
    aggregator=dataclasses.replace(PRESETS["moe3d-tiny"].aggregator, mlp_ratio=0.25),
    camera_head=dataclasses.replace(PRESETS["moe3d-tiny"].camera_head, trunk_depth=1),
    dpt_head=dataclasses.replace(PRESETS["moe3d-tiny"].dpt_head, features=16, out_channels=(4, 8, 12, 16)),
)


@functools.cache
def small() -> WeightSource:
    """Seeded weights of the golden files' model, which has a point head and no experts."""
    return seeded_source("small", golden_config())


def tensors(source: WeightSource) -> dict[str, Tensor]:
    return {name: source.tensor(name) for name in source.shapes()}


def write_folder(folder: Path, weights: Mapping[str, Tensor], config: ModelConfig | None) -> Path:
    """`folder` as a checkpoint of one file."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(weights), folder / "model.safetensors")
    write_config(folder, config)
    return folder


def write_config(folder: Path, config: ModelConfig | None) -> None:
    if config:
        (folder / "config.json").write_text(json.dumps(config.to_dict()))


def shard_name(number: int, count: int) -> str:
    return f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def write_shards(
    folder: Path,
    weights: Mapping[str, Tensor],
    config: ModelConfig | None = None,
    *,
    count: int = 3,
    edit: Callable[[dict[str, Any]], object] = lambda index: None,
) -> Path:
    """`folder` as a checkpoint of `count` shards, dealt out in turn; `edit` may spoil the index. Returns the index."""
    folder.mkdir(parents=True, exist_ok=True)
    place = {name: shard_name(i % count, count) for i, name in enumerate(weights)}
    for shard in set(place.values()):
        save_file({name: weights[name] for name in weights if place[name] == shard}, folder / shard)
    total = sum(tensor.nbytes for tensor in weights.values())
    index: dict[str, Any] = {"metadata": {"total_size": total}, "weight_map": place}
    edit(index)
    write_config(folder, config)
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    return path

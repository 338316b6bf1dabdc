"""What the training tests share: a model of a few thousand parameters, short runs of it, and what they leave."""

import dataclasses
import functools
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
from torch import Tensor

from moe3d_deploy.checkpoint import save_checkpoint, seeded_source
from moe3d_deploy.config import (
    AggregatorConfig,
    CameraHeadConfig,
    DptHeadConfig,
    ModelConfig,
    MoeConfig,
    VitConfig,
)
from moe3d_deploy.training import scene_cache
from moe3d_deploy.training.loop import Result, train
from moe3d_deploy.training.options import TrainOptions
from moe3d_deploy.training.state import State, load_state

TINY = ModelConfig(
    img_size=28,
    vit=VitConfig(embed_dim=16, depth=1, num_heads=2, mlp_ratio=1.0, num_register_tokens=1),
    aggregator=AggregatorConfig(embed_dim=16, depth=1, num_heads=2, mlp_ratio=1.0, num_register_tokens=1),
    camera_head=CameraHeadConfig(dim_in=32, trunk_depth=1, num_heads=2, num_iterations=2),
    dpt_head=DptHeadConfig(dim_in=32, features=8, out_channels=(4, 4, 4, 4), intermediate_layer_idx=(0, 0, 0, 0)),
    moe=MoeConfig(num_experts=2, hidden_channels=4, gate_hidden_channels=4),
    point_head=False,
)

SHORT = TrainOptions(
    source="unset", train="all", from_scratch=True, steps=6, batch=2, shapes=((28, 28),), views=(1, 2), scene_views=2,
    scenes=6, workers=0, log_every=1, save_every=100, validate_every=0, depth_loss="log", learning_rate=3e-3,
    device="cpu",
)  # fmt: skip

FLAGS = [
    "--train=all", "--from-scratch", "--batch=2", "--shapes=28x28", "--views=1:2", "--scene-views=2", "--scenes=6",
    "--workers=0", "--log-every=1", "--validate-every=0", "--depth-loss=log", "--learning-rate=3e-3", "--device=cpu",
]  # fmt: skip
"""SHORT for the command line, without its steps and saves."""


def tiny_checkpoint(folder: Path) -> Path:
    """A checkpoint of TINY with seeded weights."""
    save_checkpoint(seeded_source("tiny", TINY), folder)
    return folder


def short(source: Path, **changes: Any) -> TrainOptions:
    return dataclasses.replace(SHORT, source=str(source), **changes)


def run(options: TrainOptions, path: Path) -> tuple[Result, list[str]]:
    """Train; the result, and the lines that a person sees."""
    lines: list[str] = []

    def on_event(event: dict[str, Any]) -> None:
        if "label" in event:
            lines.append(f"{event['label']}: {event['text']}")

    with mock.patch.object(scene_cache, "render_scene", _rendered_once):
        return train(options, path, on_event), lines


_rendered_once = functools.cache(scene_cache.render_scene)  # most of the time of a short run is spent on scenes


def state_of(path: Path) -> State:
    state = load_state(path / "state")
    assert state is not None
    return state


def weights_of(path: Path) -> dict[str, Tensor]:
    """Those of the run's checkpoint."""
    return safetensors.torch.load((path / "checkpoint" / "model.safetensors").read_bytes())


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Equal to the bit."""
    assert one.keys() == other.keys()
    assert [name for name in one if not one[name].equal(other[name])] == []

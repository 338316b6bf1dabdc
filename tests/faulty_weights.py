"""Checkpoints that float32 computes and 16 bits do not."""

from dataclasses import replace
from pathlib import Path

from checkpoints import tensors, write_folder
from models import golden_config

from moe3d_deploy.checkpoint import seeded_source
from moe3d_deploy.config import MoeConfig
from moe3d_deploy.export.source import SourceSpec

CONFIG = replace(golden_config(), moe=MoeConfig(num_experts=3, hidden_channels=8, gate_hidden_channels=8))


def with_overflow(folder: Path, *blocks: str) -> SourceSpec:
    """A checkpoint in whose `blocks` the hidden values of the MLP pass 65,504, the end of fp16."""
    source = seeded_source("small", CONFIG)
    weights = tensors(source)
    for block in blocks:
        weights[f"{block}.norm2.weight"] *= 1e2
        weights[f"{block}.norm2.bias"] *= 1e2
        weights[f"{block}.mlp.fc1.weight"] *= 1e4
        weights[f"{block}.mlp.fc2.weight"] *= 1e-6
    return SourceSpec(str(write_folder(folder, weights, source.config)))

"""What the model tests share: golden weights and files, small models, and the project's measure of equality."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from moe3d_deploy.checkpoint import load_model, seeded_source
from moe3d_deploy.config import ModelConfig, MoeConfig
from moe3d_deploy.model import MoE3D
from moe3d_deploy.model.dpt import DptHead
from moe3d_deploy.seeded import seeded_tensor

DATA = Path(__file__).parent / "data"
GOLDEN_TINY = ("1x2x3x56x56", "1x3x3x70x98", "2x1x3x42x84")

# Limits of max|a - b| / max|b| of an array, float32. Rounding in another order is 0.5e-6 to 2.5e-6 on the small model
# and up to 5e-6 on the full one; the smallest known mistake (tanh GELU) is 1e-4.
PARITY_LIMIT = 2e-5  # the project's, against the reference
ROUNDING = 5e-6  # the small model against itself in another order: twice what was measured


def read_golden(name: str) -> dict[str, Any]:
    """The arrays of tests/data/golden_<name>.npz; text as str."""
    with np.load(DATA / f"golden_{name}.npz") as file:
        arrays = {key: file[key] for key in file}
    return {key: str(array) if array.dtype.kind == "U" else array for key, array in arrays.items()}


def golden_config() -> ModelConfig:
    """The small configuration that all golden files but the full-size one use."""
    return ModelConfig.from_dict(json.loads(read_golden("camera_head_2x3")["config"]))


def golden_model(config: ModelConfig, overrides: Mapping[str, np.ndarray] | None = None) -> MoE3D:
    """A model with the golden files' weights; `overrides` replaces some of them."""
    with torch.device("meta"):
        model = MoE3D(config)
    fill(model, "", overrides)
    return model.eval()


def fill(module: nn.Module, prefix: str, overrides: Mapping[str, np.ndarray] | None = None) -> None:
    """Give `module`, whose keys start with `prefix` in a whole model, the golden files' weights."""
    overrides = overrides or {}
    tensors = {}
    for name, tensor in module.state_dict().items():
        key = prefix + name
        values = overrides[key] if key in overrides else seeded_tensor(key, tensor.shape)
        tensors[name] = torch.from_numpy(values)
    module.load_state_dict(tensors, assign=True)
    module.requires_grad_(False)


def small_model(moe: MoeConfig | None = None, *, point_head: bool = True) -> MoE3D:
    """Seeded weights of the golden configuration. Unlike the golden weights they give valid cameras for any image."""
    config = dataclasses.replace(golden_config(), moe=moe, point_head=point_head)
    return load_model(seeded_source("small", config))


def depth_head(moe: MoeConfig | None) -> DptHead:
    """The golden configuration's depth head alone, with seeded weights: VGGT's, or K different experts and a gate."""
    config = golden_config()
    with torch.device("meta"):
        head = DptHead(config.dpt_head, config.patch_size, 2, moe)
    fill(head, "depth_head.")
    return head.eval()


def random_images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def golden_outputs(model: MoE3D, images: Tensor) -> dict[str, Tensor]:
    """Everything that the golden files hold, under their names (patch tokens, aggregator outputs, pose, maps)."""
    with torch.inference_mode():
        features = model.features(images)
        poses = model.camera_head(features["aggregated"][-1][:, :, 0])
        out = model(images, outputs=("world_points", "point_map", "point_map_conf"))
    return {
        "patch_tokens": features["patch_tokens"],
        **{f"agg_{i:02}": tokens for i, tokens in enumerate(features["aggregated"])},
        "pose_enc_iters": torch.stack(poses),
        "extrinsic": out["extrinsics"],
        "intrinsic": out["intrinsics"],
        "depth": out["depth"][..., None],
        "depth_conf": out["depth_conf"],
        "world_points": out["point_map"],
        "world_points_conf": out["point_map_conf"],
        "unprojected_points": out["world_points"],
    }


def relative_error(actual: Tensor | np.ndarray, expected: Tensor | np.ndarray) -> float:
    """max|a - b| / max|b| in float64; the shapes must be equal."""
    a, b = (np.asarray(x, np.float64) for x in (actual, expected))
    assert a.shape == b.shape
    return float(np.abs(a - b).max() / np.abs(b).max())

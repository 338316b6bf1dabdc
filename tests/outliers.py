"""Models with heavy tails: some channels of some weights far above the rest, as trained VGGT has them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from moe3d_deploy.checkpoint import save_checkpoint, seeded_source
from moe3d_deploy.config import ModelConfig
from moe3d_deploy.export import verify
from moe3d_deploy.export.verify import Shape

SHAPES: tuple[Shape, ...] = ((1, 1, 2, 3), (1, 3, 3, 2))


def _tokens(tensors: dict[str, Tensor], factor: float) -> None:
    for name in ("camera_token", "register_token"):
        tensors[f"aggregator.{name}"][..., :4] *= factor


def _layer_scale(tensors: dict[str, Tensor], factor: float) -> None:
    for name in ("frame_blocks.0.ls1", "global_blocks.0.ls2"):
        tensors[f"aggregator.{name}.gamma"][:4] *= factor


def _rows(layer: str, rows: slice) -> Callable[[dict[str, Tensor], float], None]:
    def scale(tensors: dict[str, Tensor], factor: float) -> None:
        for kind in ("weight", "bias"):
            tensors[f"{layer}.{kind}"][rows] *= factor

    return scale


PLACES: dict[str, Callable[[dict[str, Tensor], float], None]] = {
    "camera and register tokens": _tokens,
    "LayerScale": _layer_scale,
    "a row of qkv": _rows("aggregator.frame_blocks.0.attn.qkv", slice(-1, None)),  # the last channel of v
    "rows of fc2": _rows("aggregator.frame_blocks.0.mlp.fc2", slice(0, 4)),
    "the gate": _rows("depth_head.gate.0", slice(0, 2)),
}


def checkpoint(folder: Path, config: ModelConfig, place: str, factor: float) -> Path:
    """A checkpoint of seeded weights with outliers of `factor` at `place`."""
    source = seeded_source("outliers", config)
    save_checkpoint(source, folder)
    tensors = load_file(folder / "model.safetensors")
    PLACES[place](tensors, factor)
    save_file(tensors, folder / "model.safetensors")
    return folder


def request(source: Path, folder: Path, precision: str) -> dict[str, Any]:
    """What the stages of a verification are asked, of the default outputs."""
    return {
        "source": {"source": str(source), "seed": 0, "allow_pickle": False},
        "policy": {"precision": precision},
        "merge": True,
        "input": "float32",
        "outputs": [],
        "names": ["depth", "depth_conf", "extrinsics", "intrinsics"],
        "shapes": [list(shape) for shape in SHAPES],
        "patch_size": 14,
        "folder": str(folder),
    }


def rounded(source: Path, folder: Path, precision: str) -> list[dict[str, Any]]:
    """The 16-bit run against the float32 reference, as an export does it. Raises ExportError where that refuses.

    The reference is of the first call for `folder`.
    """
    asked = request(source, folder, precision)
    if not (folder / "reference_0.npz").exists():
        verify.reference({**asked, "policy": {"precision": "fp32"}}, lambda event: None)
    shares = verify.rounded(asked, lambda event: None)["shares"]
    verify.headroom_report(shares, precision)
    cases = verify.check(folder, SHAPES, asked["names"], ["rounded"], precision)
    for index in range(len(SHAPES)):
        assert np.isfinite(verify._read(folder, "rounded", index, ["depth"])["depth"]).all()
    return cases

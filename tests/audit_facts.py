"""What a build reports of an engine, and the manifest of its bundle, for the tests of the audit."""

import dataclasses
from typing import Any

from manifests import example_manifest

from moe3d_deploy import trt
from moe3d_deploy.config import PRESETS
from moe3d_deploy.manifest import Manifest, Tensor

POINTS = Tensor("point_map", "float32", ("B", "S", "H", "W", 3), "points of the point head")


def manifest_of(preset: str, precision: str, **changes: Any) -> Manifest:
    config = PRESETS[preset]
    changes = {"merged_experts": config.moe is not None} | changes
    return dataclasses.replace(
        example_manifest(), name=preset, precision=precision, model_config=config.to_dict(), **changes
    )


def facts(matmul: dict[str, int], convolution: dict[str, int], fused: int | None, **changes: Any) -> dict[str, Any]:
    """What a build reports; `changes` are of the network."""
    network = trt.NetworkFacts(True, {"SOFTMAX": 1}, matmul, convolution, {}, (), {"ExpertMix": 1})
    return {
        "tf32": False,
        "network": dataclasses.asdict(dataclasses.replace(network, **changes)),
        "compiled": None if fused is None else {"layers": {}, "fused_attention": fused},
        "activation_memory_bytes": [1_000_000],
        "executed": False,
    }


FULL = facts({"fp16": 432, "fp32": 116}, {"fp16": 32}, 72)  # measured, as are the figures of moe3d-tiny below

"""Loading a checkpoint needs the memory of the model and one tensor, not of two models."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest

from moe3d_deploy.checkpoint import open_checkpoint, save_checkpoint, seeded_source
from moe3d_deploy.config import PRESETS, AggregatorConfig, CameraHeadConfig, ModelConfig, VitConfig

_MEASURE_PEAK = """
import sys, torch
from moe3d_deploy.checkpoint import load_model, open_checkpoint
torch.set_num_threads(1)
def kib(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
source = open_checkpoint(sys.argv[1])
before = kib("VmRSS")
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew
model = load_model(source, dtype_of=lambda name: getattr(torch, sys.argv[2]))
print((kib("VmHWM") - before) * 1024, sum(p.nbytes for p in model.parameters()))
"""


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder of 274 MB."""
    config = ModelConfig(
        img_size=224,
        vit=VitConfig(embed_dim=512, depth=6, num_heads=8),
        aggregator=AggregatorConfig(embed_dim=512, depth=5, num_heads=8),
        camera_head=CameraHeadConfig(dim_in=1024, trunk_depth=1, num_heads=8),
        dpt_head=dataclasses.replace(PRESETS["moe3d-tiny"].dpt_head, dim_in=1024, intermediate_layer_idx=(0, 1, 2, 4)),
        point_head=False,
    )
    folder = tmp_path_factory.mktemp("medium")
    save_checkpoint(seeded_source("medium", config), folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_loading_needs_the_memory_of_the_model_and_one_tensor(medium: Path, dtype: str) -> None:
    largest = 4 * max(math.prod(shape) for shape in open_checkpoint(medium).shapes().values())

    command = [sys.executable, "-c", _MEASURE_PEAK, str(medium), dtype]
    result = subprocess.run(command, capture_output=True, text=True, check=True)

    peak, model = map(int, result.stdout.split())
    assert model > {"float32": 240e6, "float16": 120e6}[dtype]
    # 20 MB: the module tree, code pages touched for the first time, and the allocator's unused rest;
    # 3 to 8 MB were seen.
    assert peak < model + largest + 20e6

"""fp16 with heavy-tailed weights: within the limits, or refused with the place and a remedy that does help."""

import dataclasses
import re
from pathlib import Path

import models
import outliers
import pytest
from exports import MOE

from moe3d_deploy.config import ModelConfig, MoeConfig
from moe3d_deploy.errors import ExportError

TENSOR = (
    r"^verification failed: tensor '(.+)' reaches \S+ of its 16-bit range, the limit is 0\.5; nothing was written\."
)
ERROR = r"^verification failed: 16-bit PyTorch at .*: depth is off by \S+ \((max|mean) relative\), the limit is "


@pytest.mark.parametrize("factor", [100.0, 1000.0])
@pytest.mark.parametrize("place", outliers.PLACES)
def test_outliers_of_trained_size_pass_or_are_refused_with_a_remedy_that_helps(
    place: str, factor: float, tmp_path: Path
) -> None:
    check(MOE, place, factor, tmp_path)


def test_outliers_in_the_golden_configuration(tmp_path: Path) -> None:
    moe = MoeConfig(num_experts=4, hidden_channels=8, gate_hidden_channels=8)
    check(dataclasses.replace(models.golden_config(), moe=moe), "LayerScale", 1000.0, tmp_path)


def check(config: ModelConfig, place: str, factor: float, folder: Path) -> None:
    source = outliers.checkpoint(folder / "checkpoint", config, place, factor)
    refusal = refused(source, folder, "fp16")
    if refusal is None:
        return
    assert re.search(TENSOR, refusal) or re.search(ERROR, refusal), refusal
    assert re.search(r"--precision (fp16-fp32heads|bf16|fp32)", refusal), refusal
    assert refused(source, folder, "bf16") is None


def refused(source: Path, folder: Path, precision: str) -> str | None:
    try:
        outliers.rounded(source, folder, precision)
    except ExportError as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("place", "tensor", "remedy"),
    [
        ("a row of qkv", "aggregator.frame_blocks.0.attn.qkv:", "bf16"),
        ("rows of fc2", "aggregator.frame_blocks.0.mlp.fc2:", "bf16"),
        ("the gate", "depth_head.merged.conv:", "fp16-fp32heads"),
    ],
)
def test_an_overflow_names_the_tensor_and_the_precision_that_has_the_range(
    place: str, tensor: str, remedy: str, tmp_path: Path
) -> None:
    """2^17 is past what half can hold of sums of a few."""
    source = outliers.checkpoint(tmp_path / "checkpoint", MOE, place, 2.0**17)
    refusal = refused(source, tmp_path, "fp16")

    found = refusal and re.search(TENSOR, refusal)
    assert found, refusal
    assert found[1].startswith(tensor)
    assert found.string.endswith("Try --precision fp16-fp32heads if it belongs to a head, else --precision bf16")
    assert refused(source, tmp_path, remedy) is None

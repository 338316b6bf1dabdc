"""The predicted activation memory against TensorRT-RTX's `Total Activation Memory`, at shapes nobody could run here.

Building reserves nothing, so a model of few channels reaches gigabytes by its views and pixels alone. The bound of
15 % is the project's; the prediction has no constant that was fitted.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import splits
from exports import MOE, bundle, merged

from moe3d_deploy.bundle import Bundle
from moe3d_deploy.engines.attention_memory import forms_of
from moe3d_deploy.engines.shapes import ShapeProfile
from moe3d_deploy.memory import activation_bytes
from moe3d_deploy.trt import build_engine

BOUND = 0.15
SMALLEST_BYTES = 256e6
TOLD = {"fused": "fused", "explicit": "in memory"}


@pytest.mark.parametrize(
    ("precision", "form", "shape"),
    [
        ("fp16", "fused", (1, 48, 392, 518)),
        ("fp16", "fused", (2, 100, 154, 518)),
        ("fp32", "explicit", (1, 24, 280, 392)),
        ("fp32", "explicit", (3, 12, 252, 252)),
    ],
)
def test_an_engine_needs_what_was_predicted(
    precision: str, form: str, shape: tuple[int, int, int, int], tmp_path: Path
) -> None:
    path = bundle().exported.path if precision == "fp16" else merged().path
    profile = ShapeProfile((1, 1, 14, 14), (1, 2, 140, 140), shape)

    built = build_engine(path, tmp_path / "x.plan", profile, builder="tensorrt-rtx", compute_capabilities=[(8, 9)])

    (reported,) = built.activation_memory_bytes
    assert reported > SMALLEST_BYTES
    assert activation_bytes(MOE, shape, form=form, precision=precision) == pytest.approx(reported, rel=BOUND)
    assert forms_of(MOE, shape, precision).told_by(reported) == TOLD[form]


@pytest.mark.parametrize(
    ("split", "role", "form", "shape"),
    [
        (splits.heads, "aggregator", "explicit", (1, 24, 280, 392)),
        (splits.plain_heads, "heads", "fused", (1, 48, 392, 518)),
        (splits.encoder, "encoder", "fused", (2, 100, 266, 518)),
        (splits.encoder, "decoder", "fused", (1, 48, 392, 518)),
    ],
)
def test_an_engine_of_a_part_needs_what_was_predicted(
    split: Callable[[], Bundle], role: str, form: str, shape: tuple[int, int, int, int], tmp_path: Path
) -> None:
    """Explicit in fp32, fused in fp16. Heads with their default outputs: more of them take more."""
    precision = "fp32" if form == "explicit" else "fp16"
    path = split().part_paths[role]
    profile = ShapeProfile((1, 1, 14, 14), (1, 2, 140, 140), shape)

    built = build_engine(path, tmp_path / "x.plan", profile, builder="tensorrt-rtx", compute_capabilities=[(8, 9)])

    (reported,) = built.activation_memory_bytes
    assert reported > SMALLEST_BYTES
    predicted = activation_bytes(MOE, shape, form=form, precision=precision, part=role)
    assert predicted == pytest.approx(reported, rel=BOUND)
    if role in ("aggregator", "decoder"):
        assert forms_of(MOE, shape, precision, role).told_by(reported) == TOLD[form]

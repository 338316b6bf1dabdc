"""Engines of the export's variants: built by TensorRT-RTX without a GPU, and audited; and what is refused at once."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from moe3d_deploy import trt
from moe3d_deploy.bundle import Bundle
from moe3d_deploy.cli.main import export_main
from moe3d_deploy.engines.add import add_built_engine
from moe3d_deploy.engines.build import resolve_builder
from moe3d_deploy.engines.shapes import ShapeProfile
from moe3d_deploy.errors import EngineError, InputError
from moe3d_deploy.manifest import MANIFEST_NAME, Profile

pytest.importorskip("tensorrt_rtx", reason="builds engines: pip install 'moe3d-deploy[rtx]'")
variants = pytest.importorskip("variants", reason="exports a model: pip install 'moe3d-deploy[export]'")
pytestmark = pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")


# ---- built


def test_bf16_with_8_bit_pixels_builds_and_its_attention_is_fused(tmp_path: Path, capsys: Any) -> None:
    """By the command; the file's own sizes are the engine's where no flag says otherwise."""
    bundle = variants.copy(variants.brain(), tmp_path)
    assert export_main([str(bundle.path), "--builder", "tensorrt-rtx", "--views", "1:2:3"]) == 0
    (record,) = Bundle.open(bundle.path).manifest.engines
    assert record.profiles == (Profile((1, 1, 28, 42), (1, 2, 28, 42), (1, 3, 28, 42)),)
    assert record.precision == "bf16"
    assert record.file.startswith("engines/small_1-2-3x28x42_bf16_sm80-86-89-120_rtx")
    # 3 blocks of 4 linear layers; the products of attention are in its 3 operators
    assert record.audit["summary"].startswith("bf16 matmuls 12 of ")
    assert record.audit["summary"].endswith(
        ", fp32 convolutions 32 of 32, ExpertMix as function, attention fused 3 of 3, not executed"
    )
    assert record.audit["attention_operators"] == {"bf16": 3}
    assert f"audit        {record.audit['summary']}\n" in capsys.readouterr().err


@pytest.mark.full
def test_fp16_with_attention_as_an_operator_builds_and_is_fused(tmp_path: Path) -> None:
    bundle = variants.copy(variants.operator(), tmp_path)
    shapes = ShapeProfile.from_ranges(views="2", height="28:42", width="42")
    _, record = add_built_engine(bundle, "tensorrt-rtx", shapes, compute_capabilities=[(8, 9)])
    assert record.audit["summary"].startswith("fp16 matmuls 12 of ")
    # The depth head's 32 and the point head's 30 + 2; of them the last of each is float32, the merged tail none.
    assert "convolutions 63 of 64, ExpertMix as function, attention fused 3 of 3" in record.audit["summary"]


def test_another_profile_than_the_fixed_size_is_refused_before_the_build(tmp_path: Path, capsys: Any) -> None:
    bundle = variants.copy(variants.brain(), tmp_path)
    assert export_main([str(bundle.path), "--builder", "tensorrt-rtx", "--height", "28:56"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "moe3d-export: --height 28:56: the file fixes height at 28 (--static), leave --height out"
    )


# ---- refused


NO_KERNEL = (
    "opset 23 has attention as one operator, and in float32 TensorRT has no kernel for that: export with --opset 20 or "
    "a 16-bit --precision"
)


def test_float32_attention_as_an_operator_gets_no_engine(tmp_path: Path, capsys: Any) -> None:
    """From a checkpoint before the export, from a bundle before the build; the file alone can be had."""
    flags = ["--precision", "fp32", "--opset", "23", "--builder", "tensorrt-rtx"]
    assert export_main(["moe3d-tiny", "-o", str(tmp_path / "bundle"), *flags]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"moe3d-export: {NO_KERNEL}; or export without an engine: --builder none"
    assert not (tmp_path / "bundle").exists()

    bundle = variants.copy(variants.brain(), tmp_path)
    manifest = dataclasses.replace(bundle.manifest, precision="fp32")
    (bundle.path / MANIFEST_NAME).write_text(manifest.to_json())
    with pytest.raises(InputError) as caught:
        add_built_engine(bundle, "tensorrt-rtx", ShapeProfile.from_ranges(views="2", height="28", width="42"))
    assert str(caught.value) == NO_KERNEL


@pytest.fixture
def gpu_with_tensorrt(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What is installed, for a test to change; there is a GPU."""
    installed = {"tensorrt": "10.3.0.26", "tensorrt-rtx": "1.7.1.116"}
    monkeypatch.setattr(trt, "available", lambda: installed)
    monkeypatch.setattr(trt, "visible_gpus", lambda: [(8, 9)])
    monkeypatch.setattr(trt, "require", lambda builder: None)
    return installed


@pytest.mark.parametrize(
    ("version", "opset", "auto"),
    [
        ("10.3.0.26", 20, "tensorrt"),
        ("10.3.0.26", 23, "tensorrt-rtx"),
        ("10.13.3.9", 23, "tensorrt-rtx"),
        ("10.14.1.48", 23, "tensorrt"),
        ("11.4.0.106", 23, "tensorrt"),
    ],
)
def test_auto_takes_a_tensorrt_that_knows_the_opset(
    version: str, opset: int, auto: str, gpu_with_tensorrt: dict[str, str]
) -> None:
    gpu_with_tensorrt["tensorrt"] = version
    assert resolve_builder("auto", opset=opset) == auto


def test_a_tensorrt_that_does_not_know_the_opset_is_refused(gpu_with_tensorrt: dict[str, str]) -> None:
    assert resolve_builder("tensorrt", opset=20) == "tensorrt"
    with pytest.raises(EngineError) as caught:
        resolve_builder("tensorrt", opset=23)
    assert str(caught.value) == (
        "TensorRT 10.3.0.26 does not know opset 23, whose attention operator came with 10.14: update it, or export "
        "with --opset 20"
    )
    del gpu_with_tensorrt["tensorrt-rtx"]
    with pytest.raises(EngineError, match=r"^TensorRT 10.3.0.26 does not know opset 23"):
        resolve_builder("auto", opset=23)
    gpu_with_tensorrt["tensorrt"] = "10.14.1.48"
    assert resolve_builder("tensorrt", opset=23) == "tensorrt"


def test_the_first_tensorrt_with_attention_is_not_a_guess_of_text_order() -> None:
    assert trt.knows_opset("tensorrt", "10.14", 23)
    assert not trt.knows_opset("tensorrt", "10.9.0.34", 23)  # as text it would come after

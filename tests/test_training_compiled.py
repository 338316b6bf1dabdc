"""Compiled transformer blocks: the same run up to rounding, and a clear word where there is no compiler."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from trainings import TINY, run, short, tiny_checkpoint

from moe3d_deploy.errors import Moe3dError
from moe3d_deploy.training import compiled
from moe3d_deploy.training.compiled import compile_blocks
from moe3d_deploy.training.initialise import new_model
from moe3d_deploy.training.logs import read_log


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++, which is not installed")
def test_a_compiled_run_is_the_plain_one_up_to_rounding(tmp_path: Path) -> None:
    """Two steps with one and two views, so two lengths, and validations, which have no gradients: every kind of block
    is compiled, or torch would raise. The attention of the plain run is torch's fused one.
    """
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for name, compile_it in (("plain", False), ("compiled", True)):
        assert counters["stats"]["unique_graphs"] == 0
        run(short(checkpoint, steps=2, compile=compile_it, validate_every=1, validation_scenes=1), tmp_path / name)
    graphs = counters["stats"]["unique_graphs"]
    assert 8 <= graphs <= 32, "4 places of blocks, with gradients and without; some more for a length of 1"
    plain, compiled_ = (read_log(tmp_path / name / "train.jsonl", "step") for name in ("plain", "compiled"))
    for one, other in zip(plain, compiled_, strict=True):
        for key in ("loss", "camera", "gradient_norm"):
            assert one[key] == pytest.approx(other[key], rel=1e-3)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++, which is not installed")
def test_too_many_variants_of_a_block_end_the_run_instead_of_running_it_uncompiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "_MOST_VARIANTS", 1)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        run(short(tiny_checkpoint(tmp_path / "tiny"), steps=1, compile=True), tmp_path / "run")


@pytest.mark.parametrize(("device", "triton", "text"), [
    ("cpu", True, "--compile needs a C++ compiler and finds none: install g++, or leave --compile out"),
    ("cuda", True, "--compile needs a C compiler and finds none: install gcc, or leave --compile out"),
    ("cuda", False, "--compile needs Triton on CUDA: pip install triton, or leave --compile out"),
])  # fmt: skip
def test_without_what_compiles_the_run_does_not_start(
    device: str, triton: bool, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if triton else None)
    with pytest.raises(Moe3dError) as caught:
        compile_blocks(new_model(TINY, 0), torch.device(device))
    assert str(caught.value) == text

"""Compiled transformer blocks: the same run up to rounding, and a clear word where there is no compiler."""

import shutil
from pathlib import Path

import pytest
import torch
from trainings import TINY, run, short, tiny_checkpoint

from moe3d_deploy.errors import Moe3dError
from moe3d_deploy.training.compiled import compile_blocks
from moe3d_deploy.training.initialise import new_model
from moe3d_deploy.training.logs import read_log


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++, which is not installed")
def test_a_compiled_run_is_the_plain_one_up_to_rounding(tmp_path: Path) -> None:
    """Two steps with one and two views, so two lengths. The attention of the plain run is torch's fused one."""
    checkpoint = tiny_checkpoint(tmp_path / "tiny")
    for name, compiled in (("plain", False), ("compiled", True)):
        run(short(checkpoint, steps=2, compile=compiled), tmp_path / name)
    plain, compiled_ = (read_log(tmp_path / name / "train.jsonl", "step") for name in ("plain", "compiled"))
    for one, other in zip(plain, compiled_, strict=True):
        for key in ("loss", "camera", "gradient_norm"):
            assert one[key] == pytest.approx(other[key], rel=1e-3)


def test_without_a_compiler_the_run_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(Moe3dError, match=r"--compile needs a C\+\+ compiler .*: install g\+\+, or leave --compile out"):
        compile_blocks(new_model(TINY, 0), torch.device("cpu"))

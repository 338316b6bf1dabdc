"""A whole bundle with an engine, its checkpoint, a photograph, and a command that must be refused.

A test file takes these fixtures by `pytest_plugins = ["survival_fixtures"]`.
"""

import functools
import shutil
from pathlib import Path

import exports
import numpy as np
import pytest
from PIL import Image
from survival import Printed, Refused

from moe3d_deploy.bundle import Bundle
from moe3d_deploy.cli.main import main

VIEWS = "1:2:4"  # of the engine


@functools.cache
def _with_engine() -> Path:
    """One bundle with one engine for the whole run."""
    path = exports.new_folder("survival") / "small"
    shutil.copytree(exports.bundle().path, path)
    assert main(["export", str(path), "--views", VIEWS]) == 0
    return path


@pytest.fixture(scope="session")
def finished() -> Path:
    """A whole bundle without an engine, not to be changed."""
    return exports.bundle().path


@pytest.fixture
def good(tmp_path: Path) -> Path:
    """A copy of a whole bundle with an engine, alone in its folder; the engine needs TensorRT-RTX."""
    pytest.importorskip("tensorrt_rtx", reason="builds an engine: pip install 'moe3d-deploy[rtx]'")
    return Path(shutil.copytree(_with_engine(), tmp_path / "work" / "bundle"))


@pytest.fixture
def plain(finished: Path, tmp_path: Path) -> Path:
    """A copy of a whole bundle without an engine, alone in its folder."""
    return Path(shutil.copytree(finished, tmp_path / "work" / "bundle"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of the checkpoint that the bundles are of, alone in its folder."""
    return Path(shutil.copytree(exports.checkpoint(), tmp_path / "weights" / "small"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A photograph of 84x56 pixels."""
    path = tmp_path / "photo.png"
    noise = np.random.default_rng(0).integers(0, 255, (7, 12, 3), dtype=np.uint8)
    Image.fromarray(np.kron(noise, np.ones((8, 7, 1), np.uint8))).save(path)
    return path


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], printed: Printed) -> Refused:
    """refused(*arguments, names=..., code=2): run `moe3d` here; it has to end so, with one line that has `names`."""

    def run(*arguments: object, names: str = "", code: int = 2) -> str:
        capsys.readouterr()
        ended = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
        assert ended == code, err
        assert "Traceback" not in err
        assert [line for line in lines if line.startswith("moe3d: ")] == lines[-1:], err
        assert len(lines[-1]) < 1000, "a line for a person"
        assert names in lines[-1]
        assert "internal error" not in lines[-1]
        printed(lines[-1], ended)
        return lines[-1]

    return run


def engine_of(bundle: Path) -> Path:
    """The file of the bundle's one engine."""
    opened = Bundle.open(bundle, verify="sizes")
    (record,) = opened.manifest.engines
    return opened.engine_path(record)

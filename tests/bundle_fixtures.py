"""A small bundle.

A test file takes this fixture by `pytest_plugins = ["bundle_fixtures"]`.
"""

from pathlib import Path

import pytest
from bundles import build_old, write_bundle
from manifests import example_engine

from moe3d_deploy.bundle import add_engine


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A good bundle with one engine, alone in its folder."""
    path = tmp_path / "work" / "bundle"
    path.parent.mkdir()
    write_bundle(path)
    add_engine(path, example_engine(), build_old)
    return path

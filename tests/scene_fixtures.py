"""Two photographs as a batch, and results of random values for them.

A test file takes these fixtures by `pytest_plugins = ["scene_fixtures"]`.
"""

from pathlib import Path

import pytest
from scenes import Arrays, random_result, two_photographs

from moe3d_deploy.images import ImageBatch


@pytest.fixture
def batch(tmp_path: Path) -> ImageBatch:
    return two_photographs(tmp_path)


@pytest.fixture
def result(batch: ImageBatch) -> Arrays:
    return random_result(batch)

"""Which options the folder of a run takes, and who holds it. Going on with a run: test_training_loop.py."""

from pathlib import Path

import pytest
from trainings import TINY, run, short, tiny_checkpoint

from moe3d_deploy.errors import InputError
from moe3d_deploy.training.run_folder import open_run


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "tiny")


def test_a_run_that_has_saved_nothing_takes_other_options(checkpoint: Path, tmp_path: Path) -> None:
    """As when the first ones failed: 7 pixels are no patch of 14, and the remedy is another --shapes."""
    patch = TINY.patch_size
    with pytest.raises(InputError, match="change --shapes"):
        run(short(checkpoint, shapes=((patch // 2, patch),)), tmp_path / "run")
    with pytest.raises(InputError, match="use fewer scenes, or --feature-cache auto or off"):
        run(short(checkpoint, train="head", from_scratch=False, feature_cache="memory", scenes=10**7), tmp_path / "run")
    assert run(short(checkpoint, steps=1), tmp_path / "run")[0].step == 1
    with pytest.raises(InputError, match="is a run with steps 1, here it is 2"):
        run(short(checkpoint, steps=2), tmp_path / "run")


def test_a_stream_that_would_block_is_not_taken_for_another_process(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError, match=r"^stderr$"), open_run(tmp_path / "run", short(checkpoint)):
        raise BlockingIOError("stderr")

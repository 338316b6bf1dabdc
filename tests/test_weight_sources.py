"""What seeded sources say about themselves."""

import pytest

from moe3d_deploy.config import PRESETS
from moe3d_deploy.errors import InputError
from moe3d_deploy.weight_sources import model_shapes, seeded_source


def test_a_seeded_digest_stands_for_name_seed_and_config() -> None:
    tiny = PRESETS["moe3d-tiny"]
    sources = [
        seeded_source("moe3d-tiny", tiny),
        seeded_source("moe3d-tiny", tiny, seed=1),
        seeded_source("other", tiny),
        seeded_source("moe3d-tiny", PRESETS["vggt-1b"]),
    ]

    assert len({source.sha256() for source in sources}) == 4
    assert sources[0].sha256() == seeded_source("moe3d-tiny", tiny).sha256()


def test_a_config_that_is_no_preset_is_not_called_one() -> None:
    assert seeded_source("moe3d-tiny", PRESETS["moe3d-tiny"], 3).origin == "preset:moe3d-tiny seed 3"
    assert seeded_source("mine", PRESETS["moe3d-tiny"], 3).origin == "seeded:mine seed 3"


def test_a_negative_seed_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="seed -2 is negative"):
        seeded_source("moe3d-tiny", PRESETS["moe3d-tiny"], -2)


def test_model_shapes_can_be_changed_by_the_caller() -> None:
    shapes = model_shapes(PRESETS["moe3d-tiny"])
    shapes.clear()

    assert model_shapes(PRESETS["moe3d-tiny"])["depth_head.gate.2.weight"] == (4, 16, 1, 1)

"""Validation during training: the evaluation's measures; what cannot be judged is a figure and no end of the run."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from judged_scenes import box_scene, itself
from torch import Tensor
from trainings import TINY, short, tiny_checkpoint

from moe3d_deploy.checkpoint import load_model, seeded_source
from moe3d_deploy.evaluation import model_predictor
from moe3d_deploy.metrics import scene_quality
from moe3d_deploy.training.options import TrainOptions
from moe3d_deploy.training.scene_cache import StoredScene
from moe3d_deploy.training.validation import FIRST_SEED, SPLIT, held_out_scenes, validate

CPU = torch.device("cpu")


def stored(views: int = 2) -> StoredScene:
    scene = box_scene(views=views)
    truth = (torch.from_numpy(scene.truth[name]) for name in ("depth", "extrinsics", "intrinsics"))
    return StoredScene(torch.from_numpy(scene.images), *truth)


class Gives:
    """A model that gives the same for any images of one scene."""

    def __init__(self, prediction: dict[str, Any]) -> None:
        self.prediction = prediction

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        assert images.shape[:3] == (1, len(self.prediction["depth"]), 3)
        return {name: torch.from_numpy(np.float32(array))[None] for name, array in self.prediction.items()}


def figures(prediction: dict[str, Any], count: int = 1) -> dict[str, float]:
    return validate(Gives(prediction), [stored(len(prediction["depth"]))] * count, CPU)  # type: ignore[arg-type]


def test_the_truth_in_another_scale_is_perfect() -> None:
    assert figures(itself(box_scene(), 5.0)) == pytest.approx({"abs_rel": 0, "delta1": 1, "auc30": 1}, abs=1e-6)


def test_the_scale_is_the_ratio_of_the_medians() -> None:
    """Medians 3 and 2, so the prediction becomes 7.5, 1.5, 1.5, 4.5: errors 6.5, 1/4, 5/8, 7/16, ratios above 1.25.

    The lower medians would give 2 / 1, the median of the ratios 7 / 3.
    """
    camera = torch.eye(3)[None]
    true = StoredScene(torch.zeros(1, 3, 2, 2), torch.tensor([[[1.0, 2], [4, 8]]]), torch.eye(3, 4)[None], camera)
    found = validate(Gives({"depth": np.array([[[5, 1], [1, 3]]]), "extrinsics": np.eye(3, 4)[None]}), [true], CPU)  # type: ignore[arg-type]
    assert found == pytest.approx({"abs_rel": (6.5 + 1 / 4 + 5 / 8 + 7 / 16) / 4, "delta1": 0})


def test_figures_are_those_of_the_evaluation_of_a_model() -> None:
    """Two scenes, a model with seeded weights."""
    model = load_model(seeded_source("tiny", TINY))
    scenes = [stored(), StoredScene(*(part.flip(0) for part in stored()))]
    expected = []
    for scene in scenes:
        truth = {name: getattr(scene, name).numpy() for name in ("depth", "extrinsics", "intrinsics")}
        expected.append(scene_quality(model_predictor(model)(scene.images.numpy()), truth, points=False))
    assert validate(model, scenes, CPU) == pytest.approx(
        {key: np.mean([quality[key] for quality in expected]) for key in ("abs_rel", "delta1", "auc30")}
    )


def test_a_single_view_has_no_camera_figure() -> None:
    assert figures(itself(box_scene(views=1))).keys() == {"abs_rel", "delta1"}


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("count", [1, 2])
def test_depth_that_overflows_is_a_figure_and_no_end(value: float, count: int) -> None:
    prediction = itself(box_scene())
    prediction["depth"][1, 20, 20] = value
    found = figures(prediction, count)
    assert math.isnan(found["abs_rel"])
    assert math.isnan(found["delta1"])
    assert found["auc30"] == 1


def test_depth_without_a_scale_is_a_figure_and_no_end() -> None:
    assert math.isnan(figures({**itself(box_scene()), "depth": np.zeros((2, 28, 42))})["abs_rel"])


def test_depth_near_the_largest_float_is_judged() -> None:
    """Scaled by 10 it is beyond a float32, which the measures do not compute in."""
    prediction = itself(box_scene(), 0.1)
    prediction["depth"][0, 20, 20] = 3e38
    assert figures(prediction)["abs_rel"] == pytest.approx(3e39 / 4 / (2 * 1167))


def test_cameras_that_are_none_are_a_figure_and_no_end() -> None:
    found = figures({**itself(box_scene()), "extrinsics": np.full((2, 3, 4), np.nan)})
    assert math.isnan(found["auc30"])
    assert found["delta1"] == 1


def test_scenes_are_held_out_and_of_the_run_s_first_shape_and_most_views(tmp_path: Path) -> None:
    """None of them is a scene that the evaluation judges, which begins at seed 0."""
    from moe3d_deploy.training.scenes import SceneOptions, render_scene

    options: TrainOptions = short(tiny_checkpoint(tmp_path / "tiny"), validation_scenes=2)
    scenes, notes = held_out_scenes(options)
    assert notes == []
    assert FIRST_SEED == 1_000_000
    for seed, scene in enumerate(scenes, FIRST_SEED):
        true = render_scene(seed, SceneOptions(28, 28, 2, SPLIT))
        assert scene.images.shape == (2, 3, 28, 28)
        torch.testing.assert_close(scene.images, true.images / 255)
        assert torch.equal(scene.depth, true.depth)

"""Figures over scenes, and what changes between two predictors on the same ones."""

import gc
import math
import re
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest
from judged_scenes import box_scene, itself
from sessions import of_checkpoint

from moe3d_deploy.config import ModelConfig
from moe3d_deploy.errors import InputError, Moe3dError
from moe3d_deploy.evaluation import (
    Evaluation,
    EvaluationScene,
    SceneResult,
    compare,
    evaluate,
    model_predictor,
    native_size,
    rendered_scene,
    rendered_scenes,
)
from moe3d_deploy.evaluation import scenes as evaluation_scenes
from moe3d_deploy.evaluation.measures import in_order, measure
from moe3d_deploy.manifest import Range, ShapeRanges


def of(*metrics: dict[str, float], experts: list[Any] | None = None) -> Evaluation:
    """An evaluation of scenes called 0, 1, ..."""
    maps = experts or [None] * len(metrics)
    return Evaluation(tuple(SceneResult(str(i), m, e) for i, (m, e) in enumerate(zip(metrics, maps, strict=True))))


def of_key(key: str, values: Any) -> Evaluation:
    return of(*({key: float(value)} for value in values))


# ---- one predictor


def test_the_truth_as_prediction_is_perfect_in_any_scale() -> None:
    scene = box_scene()
    evaluation = evaluate(lambda images: itself(scene, 3.0), [scene], points=False)
    found = {key: summary.mean for key, summary in evaluation.summary().items()}
    assert found["abs_rel"] == pytest.approx(0, abs=1e-6)
    assert found["boundary_f1"] == found["delta1"] == found["edge_miou"] == found["auc30"] == 1
    assert found["flying"] == 0
    assert "accuracy_mean" not in found


def test_an_error_of_half_the_pixels_is_the_abs_rel_of_the_hand() -> None:
    """Less than half of the pixels, or the median would follow them: 40 % of 1176 at depth 4 are 10 % too deep."""
    scene = box_scene(views=1)
    depth = np.full((1, 28, 42), 4, np.float32)
    scene = EvaluationScene("flat", scene.images, {**scene.truth, "depth": depth})
    wrong = depth.copy().reshape(-1)
    wrong[:470] *= 1.1
    prediction = {**scene.truth, "depth": wrong.reshape(depth.shape)}
    (result,) = evaluate(lambda images: prediction, [scene], points=False).results
    assert result.metrics["abs_rel"] == pytest.approx(0.1 * 470 / 1176, rel=1e-5)


def test_points_are_measured_where_asked_for() -> None:
    scene = box_scene()
    (result,) = evaluate(lambda images: itself(scene), [scene]).results
    assert result.metrics["accuracy_mean"] == pytest.approx(0, abs=1e-6)


def test_the_summary_by_hand() -> None:
    evaluation = of({"abs_rel": 0.1, "auc30": 0.9}, {"abs_rel": 0.4, "auc30": 0.2}, {"abs_rel": 0.1})
    summary = evaluation.summary()
    assert list(summary) == ["abs_rel", "auc30"]
    assert summary["abs_rel"] == (pytest.approx(0.2), 0.1, 3, "1", 0.4)
    assert summary["auc30"] == (pytest.approx(0.55), pytest.approx(0.55), 2, "1", 0.2)  # scene 2 has none


def test_the_worst_is_the_largest_error_or_the_smallest_score_or_nobody() -> None:
    evaluation = of(
        {"flying": 0.1, "boundary_f1": 0.1, "gate_entropy": 1.0}, {"flying": 0.3, "boundary_f1": 0.4, "gate_entropy": 0}
    )
    assert {key: summary[3:] for key, summary in evaluation.summary().items()} == {
        "boundary_f1": ("0", 0.1), "flying": ("1", 0.3), "gate_entropy": (None, None),
    }  # fmt: skip


def test_every_figure_of_a_scene_has_a_plain_name() -> None:
    scene = box_scene()
    weights = np.full((2, 3, 28, 42), 1 / 3, np.float32)
    (result,) = evaluate(lambda images: {**itself(scene), "expert_weights": weights}, [scene]).results
    assert [key for key in result.metrics if measure(key).name == key] == []
    assert in_order(set(result.metrics))[0] == "abs_rel"
    assert measure("expert_share_2").text(1 / 3) == "33.33 %"


def test_the_strongest_expert_of_each_pixel_is_kept() -> None:
    scene = box_scene()
    weights = np.full((2, 3, 28, 42), 0.25, np.float32)
    weights[:, 2] = 0.5
    weights[1, 0, :, :5], weights[1, 2, :, :5] = 0.5, 0.25
    (result,) = evaluate(lambda images: {**itself(scene), "expert_weights": weights}, [scene], points=False).results
    expected = np.full((2, 28, 42), 2)
    expected[1, :, :5] = 0
    np.testing.assert_array_equal(result.experts, expected)


def test_one_scene_is_in_memory_at_a_time() -> None:
    alive: list[weakref.ref[Any]] = []

    def scenes() -> Iterator[EvaluationScene]:
        for index in range(3):
            gc.collect()
            assert [ref for ref in alive[:-1] if ref() is not None] == []  # the loop itself still names the last one
            scene = box_scene(str(index))
            alive.append(weakref.ref(scene))
            yield scene

    assert len(evaluate(lambda images: itself(box_scene()), scenes(), points=False).results) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"depth": np.full((2, 28, 42), np.nan)},
            "the predicted depth is not finite and above 0 at 2352 of 2352 pixels",
        ),
        ({"depth": np.zeros((2, 28, 42))}, "the predicted depth is not finite and above 0 at 2352 of 2352 pixels"),
        ({"depth": np.ones((2, 28, 28))}, r"the model gives depth \(2, 28, 28\) for a truth of \(2, 28, 42\)"),
        (
            {"extrinsics": np.full((2, 3, 4), np.inf)},
            "the prediction cannot be judged: predicted extrinsics hold 24 values that are NaN or infinite of 24",
        ),
        (
            {"extrinsics": np.ones((2, 3, 4))},
            "the prediction cannot be judged: predicted extrinsics of view 0 hold no rotation",
        ),
        (
            {"extrinsics": np.eye(3, 4)[None]},
            "the prediction cannot be judged: there are predicted extrinsics of 1 views and depth of 2",
        ),
        (
            {"intrinsics": np.full((2, 3, 3), np.nan)},
            "the prediction cannot be judged: predicted intrinsics hold NaN or a focal length that is not above 0",
        ),
        (
            {"intrinsics": np.tile(np.diag([-30.0, -30, 1]), (2, 1, 1))},  # of a field of view beyond half a turn
            "the prediction cannot be judged: predicted intrinsics hold NaN or a focal length that is not above 0",
        ),
        (
            {"expert_weights": np.full((2, 3, 28, 42), np.nan)},
            "the prediction cannot be judged: expert weights are negative, NaN or not of sum 1 at 2352 of 2352 pixels",
        ),
    ],
)
def test_a_prediction_that_cannot_be_judged_is_a_failure_of_its_scene(change: dict[str, Any], message: str) -> None:
    scene = box_scene("17")
    with pytest.raises(Moe3dError, match=rf"^scene 17: {message}") as caught:
        evaluate(lambda images: {**itself(scene), **change}, [scene])
    assert caught.value.exit_code == 1


def test_a_truth_that_cannot_be_used_is_bad_input_of_its_scene() -> None:
    scene = box_scene("17")
    wrong = EvaluationScene("17", scene.images, {**scene.truth, "depth": np.zeros_like(scene.truth["depth"])})
    with pytest.raises(InputError, match=r"^scene 17: none of 2352 pixels is valid"):
        evaluate(lambda images: itself(scene), [wrong])


def test_images_that_the_model_refuses_are_named_with_their_scene() -> None:
    with pytest.raises(InputError, match=r"^scene box: images: height is 30; accepted are 14 and more"):
        evaluate(of_checkpoint().run, [box_scene(height=30)])


def test_no_scene_is_bad_input() -> None:
    with pytest.raises(InputError, match="there is no scene to evaluate on"):
        evaluate(lambda images: {}, [])


def test_a_model_in_torch_is_a_predictor_as_its_session_is() -> None:
    images = box_scene().images
    expected, found = of_checkpoint().run(images), model_predictor(exports.load(), ["expert_weights"])(images)
    assert found["expert_weights"].shape == (2, 2, 28, 42)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array)


# ---- two predictors on the same scenes


def test_changes_by_hand() -> None:
    """AbsRel as a share of the reference's mean, (0.22 - 0.2) / 0.2; the others as differences of the means."""
    before = of({"abs_rel": 0.1, "boundary_f1": 0.5, "flying": 0.02}, {"abs_rel": 0.3, "boundary_f1": 0.7, "flying": 0})
    after = of({"abs_rel": 0.14, "boundary_f1": 0.5, "flying": 0.01}, {"abs_rel": 0.3, "boundary_f1": 0.6, "flying": 0})
    changes = compare(before, after).changes
    assert changes["abs_rel"][:3] == pytest.approx((0.2, 0.22, 0.1))
    assert changes["boundary_f1"][:3] == pytest.approx((0.6, 0.55, -0.05))
    assert changes["flying"][:3] == pytest.approx((0.01, 0.005, -0.005))
    assert changes["abs_rel"].typical == pytest.approx((0.04 + 0) / 2 / 0.2)
    assert changes["boundary_f1"].typical == pytest.approx(0.05)


def test_changes_to_either_side_cancel_in_the_mean_and_not_in_the_typical_one() -> None:
    """5 % of 0.1 more in half of the scenes, 5 % of 0.1 less in the others."""
    found = compare(of_key("abs_rel", [0.1] * 4), of_key("abs_rel", [0.105, 0.095, 0.105, 0.095]))
    assert found.changes["abs_rel"].change == pytest.approx(0)
    assert found.changes["abs_rel"].typical == pytest.approx(0.05)
    assert found.to_dict()["changes"]["abs_rel"]["typical"] == pytest.approx(0.05)


def test_a_measure_counts_on_scenes_where_both_have_it() -> None:
    before = of({"abs_rel": 0.1, "boundary_f1": 0.5}, {"abs_rel": 0.3}, {"abs_rel": 0.2, "boundary_f1": 0.9})
    after = of({"abs_rel": 0.1, "boundary_f1": 0.4}, {"abs_rel": 0.3, "boundary_f1": 0.1}, {"abs_rel": 0.2})
    changes = compare(before, after).changes
    assert changes["boundary_f1"][:3] == pytest.approx((0.5, 0.4, -0.1))


def test_the_interval_is_that_of_the_pairs_not_of_the_scenes() -> None:
    """Every scene changes by the same, however much the scenes differ: nothing is uncertain."""
    values = np.random.default_rng(3).uniform(0, 1, 20)
    change = compare(of_key("boundary_f1", values), of_key("boundary_f1", values - 0.01)).changes["boundary_f1"]
    assert (change.low, change.high) == pytest.approx((-0.01, -0.01))


def test_the_interval_is_the_normal_one_where_there_are_many_scenes() -> None:
    """Of a mean of 400 independent differences: mean +- 1.96 s / sqrt(400), to the noise of 2000 draws."""
    rng = np.random.default_rng(5)
    before, step = rng.uniform(0, 1, 400), rng.normal(0.002, 0.03, 400)
    change = compare(of_key("flying", before), of_key("flying", before + step)).changes["flying"]
    half = 1.96 * step.std() / math.sqrt(400)
    assert change.change == pytest.approx(step.mean())
    assert change.low == pytest.approx(step.mean() - half, abs=0.15 * half)
    assert change.high == pytest.approx(step.mean() + half, abs=0.15 * half)


def test_equal_evaluations_have_equal_intervals_and_one_scene_has_none() -> None:
    before, after = of_key("abs_rel", [0.1, 0.2, 0.5]), of_key("abs_rel", [0.1, 0.3, 0.4])
    assert compare(before, after) == compare(before, after)
    alone = compare(of_key("abs_rel", [0.1]), of_key("abs_rel", [0.2])).changes["abs_rel"]
    assert alone == (0.1, 0.2, pytest.approx(1.0), None, None, pytest.approx(1.0))


def test_a_perfect_reference_has_no_share() -> None:
    for found, expected in ((0.0, 0.0), (0.1, math.inf)):
        change = compare(of_key("abs_rel", [0.0]), of_key("abs_rel", [found])).changes["abs_rel"]
        assert (change.change, change.typical) == (expected, expected)


def test_experts_agree_over_all_pixels_of_scenes_where_both_tell_them() -> None:
    maps = [np.array([[[0, 1], [2, 2]]], np.uint8), np.array([[[0, 0]]], np.uint8), np.zeros((1, 1, 9), np.uint8)]
    other = [np.array([[[0, 1], [2, 3]]], np.uint8), np.array([[[0, 1]]], np.uint8), None]
    before, after = (of({}, {}, {}, experts=experts) for experts in (maps, other))
    assert compare(before, after).experts_agree == 4 / 6
    assert compare(before, of({}, {}, {})).experts_agree is None


def test_other_scenes_cannot_be_compared() -> None:
    with pytest.raises(InputError, match="on the same scenes in the same order"):
        compare(of_key("abs_rel", [0.1, 0.2]), of_key("abs_rel", [0.1]))


def test_the_python_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    for name in ("before", "after"):
        shutil.copytree(exports.checkpoint(), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "docs/evaluation.md", "exec"), {})
    assert capsys.readouterr().out.endswith(", +0.00 %\n")


# ---- rendered scenes


def test_a_rendered_scene_is_what_the_renderer_gives_in_the_network_s_form() -> None:
    from moe3d_deploy.training.scenes import SceneOptions, render_scene

    scene = rendered_scene(3, split="test-seeds", views=2, height=28, width=42)
    true = render_scene(3, SceneOptions(28, 42, 2, "test-seeds"))
    assert scene.name == "3"
    assert scene.images.dtype == np.float32
    np.testing.assert_array_equal(np.rint(scene.images * 255), true.images.numpy())
    for name in ("depth", "extrinsics", "intrinsics"):
        np.testing.assert_array_equal(scene.truth[name], getattr(true, name).numpy())


def test_up_of_rendered_scenes_is_where_their_cameras_have_it() -> None:
    """Cameras look at the horizon more than at floor or ceiling, so their images' downward axis points down."""
    scenes = list(rendered_scenes(range(3), split="test-seeds", views=1, height=14, width=14))
    down = np.mean([scene.truth["extrinsics"][0, 1, :3] for scene in scenes], axis=0)
    assert {scene.up for scene in scenes} == {(0, 0, 1)}
    assert down @ [0, 0, 1] < -0.7


def test_the_splits_are_the_renderer_s() -> None:
    from moe3d_deploy.training.scenes import SPLITS

    assert sorted(evaluation_scenes.SPLITS) == sorted(SPLITS)


@pytest.mark.parametrize(
    ("width", "fixed", "expected"),
    [
        (518, (None, None), (392, 518)),  # 388.5 / 14 = 27.75 -> 28 patches
        (252, (None, None), (196, 252)),
        (14, (None, None), (14, 14)),
        (252, (None, 42), (28, 42)),  # 2.25 patches
        (252, (154, 518), (154, 518)),
    ],
)
def test_a_model_s_own_size_is_that_of_photographs(
    width: int, fixed: tuple[int | None, int | None], expected: tuple[int, int]
) -> None:
    free = ShapeRanges.of(ModelConfig())
    height, wide = (Range(size, size) if size else free.height for size in fixed)
    assert native_size(width, 14, ShapeRanges(free.batch, free.views, height, wide)) == expected

"""The GPU checks of training and of scenes, the CPU in the GPU's place: what they run, and what they call wrong."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recorder import Recorder
from trainings import short, tiny_checkpoint

from moe3d_deploy.benchmarks import checks_training
from moe3d_deploy.errors import Moe3dError
from moe3d_deploy.training import compiled, feature_cache, trainee
from moe3d_deploy.training.optimizers import Optimizers
from moe3d_deploy.training.options import TrainOptions
from moe3d_deploy.training.scenes import Scene, SceneOptions

CPU = torch.device("cpu")
SMALL = SceneOptions(28, 42, 2)


@pytest.fixture
def run(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path)


def options(tmp_path: Path, **changes: Any) -> TrainOptions:
    source = tiny_checkpoint(tmp_path / "tiny")
    return short(source, steps=3, batch=2, scenes=2, validate_every=2, validation_scenes=1, **changes)


def test_a_training_that_resumes_and_keeps_features_passes(
    run: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU all pairs are equal to the bit. The last run reads one of two samples and computes the other."""
    computed, kept = [], feature_cache.frozen_levels
    monkeypatch.setattr(
        feature_cache, "frozen_levels", lambda model, images: computed.append(len(images)) or kept(model, images)
    )
    checks_training.train_in_every_form(run, options(tmp_path))
    assert (run.failures, run.notes) == ([], [])
    assert computed == [1] * (2 + 2 + 1), "in memory, on disk before the stop, and what was removed"
    pairs = ("float32, one step", "resumed", "features on disk")
    assert {name: run.figures[name]["off"] for name in pairs} == dict.fromkeys(pairs, 0)
    assert [len(run.figures[name]["losses"]) for name in pairs] == [1, 3, 3]
    assert run.figures["samples_per_second"] > 0


def test_an_optimizer_that_forgets_on_resuming_fails(
    run: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restore = Optimizers.restore

    def forgetting(self: Optimizers, tensors: dict[str, torch.Tensor]) -> None:
        restore(self, {name: torch.zeros_like(t) if "exp_avg." in name else t for name, t in tensors.items()})

    monkeypatch.setattr(Optimizers, "restore", forgetting)
    monkeypatch.setattr(checks_training, "BFLOAT16_LIMIT", 1e-6)  # this model learns little in three steps
    checks_training.train_in_every_form(run, options(tmp_path))
    assert {failure.split(":")[0] for failure in run.failures} == {"resumed", "features on disk"}
    assert run.failures[0].startswith("resumed: a loss or a gradient's norm is off by ")
    assert run.failures[0].endswith(", limit 1e-06")


def test_a_device_that_computes_something_else_fails(
    run: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TF32, say: 1 % in every weight of the second run, which is the device's."""
    made, new_model = [], trainee.new_model

    def spoilt(config: Any, seed: int) -> Any:
        made.append(new_model(config, seed))
        with torch.no_grad():
            for parameter in made[-1].parameters():
                parameter.mul_(1.01 if len(made) == 2 else 1)
        return made[-1]

    monkeypatch.setattr(trainee, "new_model", spoilt)
    checks_training.train_in_every_form(run, options(tmp_path))
    assert [failure.split(":")[0] for failure in run.failures] == ["float32, one step"]


def test_without_a_compiler_the_rest_is_checked_and_a_note_says_so(
    run: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(device: torch.device) -> None:
        raise Moe3dError("--compile needs Triton on CUDA: pip install triton, or leave --compile out")

    monkeypatch.setattr(compiled, "require_tools", missing)
    checks_training.train_in_every_form(run, options(tmp_path, compile=True))
    assert run.failures == []
    assert run.notes == [
        "nothing was compiled: --compile needs Triton on CUDA: pip install triton, or leave --compile out"
    ]


def test_scenes_of_one_device_are_equal(run: Recorder) -> None:
    checks_training.compare_scenes(run, CPU, SMALL, range(3))
    assert run.failures == []
    assert run.figures["worst"] == {"depth": 0, "other_surface": 0, "other_colour": 0}
    assert run.figures["views_per_second"] > 0


def deeper(scene: Scene) -> Scene:
    return dataclasses.replace(scene, depth=scene.depth * 1.001)


def elsewhere(scene: Scene) -> Scene:
    return dataclasses.replace(scene, surfaces=scene.surfaces.roll(1, -1))


@pytest.mark.parametrize(("change", "text"), [
    (deeper, "depth is off by 0.001, limit 0.0001"), (elsewhere, "of a scene's pixels hit other surfaces, limit 0.001"),
])  # fmt: skip
def test_scenes_that_differ_fail(
    change: Callable[[Scene], Scene], text: str, run: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    render = checks_training.render_scene

    def rendered(seed: int, options: SceneOptions, device: Any) -> Scene:
        scene = render(seed, options, device)
        return scene if device == "cpu" else change(scene)  # the reference names its device, the check has an object

    monkeypatch.setattr(checks_training, "render_scene", rendered)
    checks_training.compare_scenes(run, CPU, SMALL, range(2))
    (failure,) = run.failures
    assert failure.endswith(text)

"""The depth heads of a comparison: what they cost, that they are the model's own, and that they train on equal data."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from judged_scenes import box_scene
from models import small_model
from torch.utils.flop_counter import FlopCounterMode
from trainings import TINY

from moe3d_deploy.benchmarks.heads import pool as pool_module
from moe3d_deploy.benchmarks.heads import training
from moe3d_deploy.benchmarks.heads.pool import Pool, build_pool, view_order
from moe3d_deploy.benchmarks.heads.scores import judge, predictions
from moe3d_deploy.benchmarks.heads.training import LastStage, TrainedHead, fresh_stage, train_heads
from moe3d_deploy.benchmarks.heads.variants import (
    Plan,
    Trial,
    Variant,
    flops_per_pixel,
    parameters,
    references,
    variants,
)
from moe3d_deploy.checkpoint import load_model, seeded_source
from moe3d_deploy.config import PRESETS, ModelConfig, MoeConfig
from moe3d_deploy.errors import InputError, Moe3dError
from moe3d_deploy.training.data import make_sample, plan_sample, scene_store
from moe3d_deploy.training.forward import head_forward
from moe3d_deploy.training.options import TrainOptions
from moe3d_deploy.training.targets import normalised_targets

SINGLE, MOE = Variant("single", "one branch", 6), Variant("moe4", "experts", 3, 4, 3)
PLAN = Plan(height=28, width=42, views=2, scenes=2, steps=7, batch=2)


def pool(views: int = 4, channels: int = 4) -> Pool:
    """Random features, whose first channel is the logarithm of the depth; a corner without truth."""
    stream = torch.Generator().manual_seed(0)
    features = torch.randn(views, channels, 8, 10, generator=stream)
    depth = (0.5 * features[:, 0]).exp()
    depth[:, :2, :2] = 0
    return Pool(features, depth)


def trained(
    heads: list[Variant], seed: int = 0, data: Pool | None = None, rate: float = 2e-3, **changes: Any
) -> dict[str, TrainedHead]:
    found: dict[str, TrainedHead] = {}
    train_heads(
        [Trial("l2", seed, head, rate) for head in heads],
        data or pool(),
        dataclasses.replace(PLAN, **changes),
        lambda _: None,
        lambda trial, head: found.update({trial.variant.name: head}),
    )
    return found


def test_the_heads_of_the_small_preset_by_hand() -> None:
    """A branch of h channels on C = 32: 2 (9 C h + 2 h) = 580 h FLOP per pixel, the gate's 1x1 has 4 outputs."""
    config = PRESETS["moe3d-tiny"]
    found = {v.name: (v.hidden, v.experts, flops_per_pixel(config, v)) for v in variants(config, 5e-4)}
    of_experts = 4 * 580 * 16 + 2 * (9 * 32 * 16 + 4 * 16)
    assert found == {
        "single": (32, 1, 580 * 32),
        "narrow": (16, 1, 580 * 16),
        "wide": (80, 1, 580 * 80),
        "moe4": (16, 4, of_experts),
        "moe4-entropy": (16, 4, of_experts),
    }
    assert abs(580 * 80 - of_experts) < 0.01 * of_experts
    assert [v.entropy_weight for v in variants(config, 5e-4)] == [0, 0, 0, 0, 5e-4]


@pytest.mark.parametrize("config", [PRESETS["moe3d-tiny"], ModelConfig()], ids=["tiny", "no experts"])
def test_costs_are_those_of_the_modules_that_are_trained(config: ModelConfig) -> None:
    channels, side = config.dpt_head.features // 2, 4
    for variant in variants(config, 5e-4):
        stage = LastStage(channels, variant)
        with FlopCounterMode(display=False) as counter:
            stage(torch.zeros(1, channels, side, side))
        assert counter.get_total_flops() == side**2 * flops_per_pixel(config, variant), variant.name
        assert sum(p.numel() for p in stage.parameters()) == parameters(config, variant), variant.name


def test_without_experts_they_are_as_wide_as_those_of_moe3d() -> None:
    found = {variant.name: variant for variant in variants(ModelConfig(), 5e-4)}
    assert list(found) == ["single", "wide", "moe4", "moe4-entropy"]  # one expert is as wide as VGGT's head
    assert (found["moe4"].hidden, found["moe4"].gate_hidden, found["wide"].hidden) == (32, 32, 160)
    assert references(found) == ["single", "wide"]


def test_the_papers_pair_is_a_branch_of_the_size_of_one_expert() -> None:
    names = [variant.name for variant in variants(PRESETS["moe3d-tiny"], 5e-4)]
    assert references(names) == ["narrow", "single", "wide"]


def test_experts_of_which_no_single_head_has_the_flops_are_refused() -> None:
    """C = 4: 76 FLOP per channel; 4 experts of 4 channels and their gate have 1536, 20 channels 1.04 % less."""
    with pytest.raises(
        InputError, match=r"^a single head 20 channels wide costs 1520 FLOP per pixel and 4 experts 1536"
    ):
        variants(TINY, 5e-4)


def test_a_head_with_the_weights_of_a_model_is_that_models_head() -> None:
    for moe in (None, MoeConfig(num_experts=4, hidden_channels=8, gate_hidden_channels=4)):
        model = small_model(moe, point_head=False)
        variant = Variant("moe4", "", 8, 4, 4) if moe else Variant("single", "", 32)
        stage = LastStage(model.config.dpt_head.features // 2, variant)
        own = model.depth_head.state_dict()
        renamed = {name.replace("scratch.output_conv2", "experts.0"): tensor for name, tensor in own.items()}
        stage.load_state_dict({name: renamed[name] for name in stage.state_dict()})
        scene = box_scene()
        found = predictions(model, {"own": stage}, scene)["own"]
        with torch.inference_mode():
            outputs = ("expert_weights",) if moe else ()
            expected = model(torch.from_numpy(scene.images), outputs=outputs)
        assert found.keys() == {"depth", "extrinsics", "intrinsics", *outputs}
        for name, values in found.items():
            assert np.array_equal(values, expected[name][0].numpy()), name
        with torch.inference_mode():  # what losses read of it, too: its two views are two scenes here
            levels, _, grid = model.backbone(torch.from_numpy(scene.images)[None])
            of_training = head_forward(model, [level[:, None] for level in levels], grid)
            of_stage = stage(model.depth_head.features(levels, grid))
        for name, values in of_training._asdict().items():
            ours = getattr(of_stage, name)
            assert torch.equal(ours, values) if isinstance(values, torch.Tensor) else ours == values, name


def test_fresh_heads_predict_one_and_weight_their_experts_equally() -> None:
    stage = fresh_stage(4, MOE, 0)
    outputs = stage(pool().features)
    assert float((outputs.depth.detach() - 1).abs().max()) < 0.2
    assert outputs.weights is not None
    assert torch.equal(outputs.weights, torch.full_like(outputs.weights, 0.25))
    assert not stage.experts[0][0].weight.equal(stage.experts[1][0].weight)  # type: ignore[index]


def test_the_heads_with_and_without_entropy_loss_start_equal_and_seeds_do_not() -> None:
    one, other = (fresh_stage(4, v, 5).state_dict() for v in (MOE, dataclasses.replace(MOE, name="moe4-entropy")))
    assert all(one[name].equal(other[name]) for name in one)
    assert not one["experts.0.0.weight"].equal(fresh_stage(4, MOE, 6).state_dict()["experts.0.0.weight"])


def test_every_head_of_every_seed_sees_the_same_views_in_the_same_order(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[int, list[bytes]] = {}
    real = LastStage.forward

    def forward(self: LastStage, features_NCHW: torch.Tensor) -> Any:
        seen.setdefault(id(self), []).append(features_NCHW.numpy().tobytes())
        return real(self, features_NCHW)

    monkeypatch.setattr(LastStage, "forward", forward)
    kept = [trained([SINGLE, MOE], seed) for seed in (0, 1)]  # ids stay theirs
    orders = list(seen.values())
    assert len(orders) == 2 * len(kept)
    assert len(orders[0]) == PLAN.steps
    assert all(order == orders[0] for order in orders)
    assert len(set(orders[0])) > 1


def test_all_views_are_seen_once_before_one_comes_again() -> None:
    order = view_order(dataclasses.replace(PLAN, steps=6, batch=2), 4).flatten().tolist()
    assert [sorted(order[start : start + 4]) for start in (0, 4, 8)] == [[0, 1, 2, 3]] * 3
    assert order[:4] != order[4:8] or order[4:8] != order[8:]


def test_a_head_does_not_depend_on_those_beside_it_nor_on_the_number_of_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "usable_cores", lambda: 1)
    alone = trained([MOE])["moe4"]
    monkeypatch.setattr(training, "usable_cores", lambda: 3)
    beside = trained([SINGLE, MOE, dataclasses.replace(MOE, name="other")])["moe4"]
    assert all(alone.stage.state_dict()[name].equal(tensor) for name, tensor in beside.stage.state_dict().items())
    assert alone.curves["depth"].equal(beside.curves["depth"])
    assert alone.curves["entropy"].shape == (PLAN.steps,)


def test_losses_fall_and_the_entropy_loss_lowers_the_entropy() -> None:
    """The depth is a function of one channel, which both heads can learn."""
    decided = dataclasses.replace(MOE, name="decided", entropy_weight=0.3)
    heads = trained([SINGLE, MOE, decided], steps=120, rate=1e-2)
    for head in heads.values():
        assert float(head.curves["depth"][-10:].mean()) < 0.3 * float(head.curves["depth"][:10].mean())
    assert "entropy" not in heads["single"].curves
    entropies = {name: float(heads[name].curves["entropy"][-10:].mean()) for name in ("moe4", "decided")}
    assert entropies["decided"] < 0.5 * entropies["moe4"]
    # 0 log 0: the first step's gate is uniform
    assert float(heads["moe4"].curves["entropy"][0]) == pytest.approx(np.log(4), rel=1e-5)


def test_a_loss_that_is_not_finite_names_head_and_step() -> None:
    spoilt = pool()
    spoilt.depth[int(view_order(PLAN, 4)[0, 0]), 5, 5] = torch.inf
    with pytest.raises(Moe3dError) as error:
        trained([SINGLE], data=spoilt)
    assert str(error.value) == (
        "step 1: the loss of the head single at a learning rate of 0.002 is inf; leave out this --learning-rate, or "
        "use a smaller one"
    )


def test_each_head_has_one_thread_and_what_comes_after_has_its_own_again(monkeypatch: pytest.MonkeyPatch) -> None:
    before, seen = torch.get_num_threads(), []
    real = LastStage.forward

    def forward(self: LastStage, features_NCHW: torch.Tensor) -> Any:
        seen.append(torch.get_num_threads())
        return real(self, features_NCHW)

    monkeypatch.setattr(LastStage, "forward", forward)
    torch.set_num_threads(2)
    try:
        trained([SINGLE, MOE])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(seen) == {1}


def test_a_head_that_fails_ends_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = 4_000
    real, done = training.train_head, [0]

    def train_head(trial: Trial, data: Pool, plan: Plan, on_step: Any) -> TrainedHead:
        if trial.variant is SINGLE:
            raise Moe3dError("spoilt")

        def counted(step: int) -> None:
            on_step(step)
            done.append(step)

        return real(trial, data, plan, counted)

    monkeypatch.setattr(training, "train_head", train_head)
    with pytest.raises(Moe3dError, match=r"^spoilt$"):
        trained([MOE, SINGLE], steps=steps)
    assert done[-1] < steps


def test_the_learning_rate_is_that_of_the_trial() -> None:
    """The first step of Adam moves a weight by the rate, here that of the warm-up's end: 7 steps have none."""
    for rate in (1e-3, 4e-3):
        stage = trained([SINGLE], rate=rate, steps=1)["single"].stage
        moved = stage.experts[0][2].bias.detach()[0]  # type: ignore[index]
        assert abs(float(moved)) == pytest.approx(rate, rel=1e-3)


def test_the_pool_holds_the_models_features_and_normalised_depth_of_training_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load_model(seeded_source("tiny", TINY))
    done: list[int] = []
    found = build_pool(model, PLAN, done.append, lambda note: pytest.fail(note))
    assert done == [1, 2]
    options = TrainOptions(
        source="x", batch=1, scenes=2, scene_views=2, views=(2, 2), shapes=((28, 42),)
    )  # what `moe3d train` would draw with seed 0
    for number in (0, 1):
        plan = plan_sample(options, number)
        sample = make_sample(plan, scene_store(options, 28, 42).get(plan.seed)[0])
        with torch.inference_mode():
            levels, _, grid = model.backbone(sample.images[None])
            features = model.depth_head.features(levels, grid)
        views = slice(2 * number, 2 * number + 2)
        assert found.features[views].equal(features)
        targets = normalised_targets(*(part[None] for part in (sample.depth, sample.extrinsics, sample.intrinsics)))
        batch, truth = found.batch(torch.arange(views.start, views.stop))
        assert batch.equal(features)
        assert truth.depth[:, 0].equal(targets.depth[0])
        assert truth.valid.equal(truth.depth > 0)


def test_features_that_do_not_fit_into_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "available_memory_bytes", lambda: 10**9)
    plan = Plan(scenes=300, views=4, height=126, width=168)  # 1200 views of 32 maps of 4 bytes: 3.25 GB
    with pytest.raises(InputError) as error:
        pool_module.require_memory(PRESETS["moe3d-tiny"], plan)
    assert str(error.value) == (
        "the features of 300 scenes take 3.3 GB, of memory 1.0 GB are free; use fewer --scenes, or a smaller "
        "--height and --width"
    )
    monkeypatch.setattr(pool_module, "available_memory_bytes", lambda: 5 * 10**9)
    pool_module.require_memory(PRESETS["moe3d-tiny"], plan)


def test_figures_are_those_of_the_heads_alone() -> None:
    """Cameras are the frozen model's, the same for all heads: they are not judged. A gate is."""
    model = small_model(None, point_head=False)
    channels = model.config.dpt_head.features // 2
    heads = {"single": fresh_stage(channels, SINGLE, 0), "moe4": fresh_stage(channels, MOE, 0)}
    scores = judge(model, heads, [box_scene("a"), box_scene("b")], lambda done: None)
    assert list(scores["single"]) == ["a", "b"]
    single, moe = scores["single"]["a"], scores["moe4"]["a"]
    assert {"abs_rel", "delta1", "boundary_f1", "edge_miou", "flying"} < single.keys()
    assert moe.keys() - single.keys() == {
        "gate_entropy", "effective_experts", *(f"expert_share_{k}" for k in range(4))
    }  # fmt: skip
    assert "auc30" not in single
    assert moe["gate_entropy"] == pytest.approx(np.log(4))
    assert moe["effective_experts"] == pytest.approx(4)

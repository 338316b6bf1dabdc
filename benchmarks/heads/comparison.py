"""A comparison of depth heads: train what its folder lacks, choose learning rates, judge, and draw."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moe3d_deploy.benchmarks.heads import variants as heads
from moe3d_deploy.benchmarks.heads.pictures import edge_sheet, encoded, most_edges, point_sheet
from moe3d_deploy.benchmarks.heads.pool import Pool, build_pool
from moe3d_deploy.benchmarks.heads.scores import Scores, judge, predictions
from moe3d_deploy.benchmarks.heads.statistics import HeadResult, comparison
from moe3d_deploy.benchmarks.heads.training import TrainedHead, train_heads
from moe3d_deploy.benchmarks.heads.variants import Plan, Trial, Variant
from moe3d_deploy.benchmarks.heads.work import VALIDATION, WorkFolder
from moe3d_deploy.cli.progress import Progress
from moe3d_deploy.evaluation import rendered_scene, rendered_scenes
from moe3d_deploy.evaluation.scenes import HELD_OUT
from moe3d_deploy.files import atomic_write
from moe3d_deploy.model import MoE3D
from moe3d_deploy.training import validation

SHOWN = (heads.SINGLE, heads.WIDE, heads.MOE, heads.MOE_ENTROPY)  # in the pictures
PICTURES = ("comparison_edges.png", "comparison_points.png")
_TUNED_SEED = 0  # the seed of weights by which a head's learning rate is chosen


class HeadComparison:
    """Of the heads `variants` on the features of `model`; everything that takes long is kept in `work`."""

    def __init__(
        self,
        model: MoE3D,
        plan: Plan,
        variants: Sequence[Variant],
        losses: Sequence[str],
        rates: Sequence[float],
        seeds: int,
        work: WorkFolder,
    ) -> None:
        self.model, self.plan, self.variants, self.losses, self.work = model, plan, variants, losses, work
        self.rates, self.seeds = rates, range(seeds)
        self.progress = Progress()

    def run(self) -> None:
        """Train every head at every rate from one seed, choose its rate, train the other seeds at that, judge all."""
        tried = [
            Trial(loss, _TUNED_SEED, v, rate) for loss in self.losses for v in self.variants for rate in self.rates
        ]
        pool = self._train("rates", tried, None)
        self._judge(tried, VALIDATION, validation.SPLIT, validation.FIRST_SEED, self.plan.validation)
        kept = [self._trial(loss, seed, v) for loss in self.losses for seed in self.seeds for v in self.variants]
        self._train("heads", kept, pool)
        del pool
        for split in HELD_OUT:
            self._judge(kept, split, split, 0, self.plan.judged)

    def report(self, model: Mapping[str, Any]) -> dict[str, Any]:
        """`plan`, `variants` and `comparisons` of a finished run, from its folder alone; `model` is the report's."""
        return {
            "plan": {**dataclasses.asdict(self.plan), "seeds": len(self.seeds), "learning_rates": list(self.rates)},
            "variants": [self._facts(variant) for variant in self.variants],
            "comparisons": [
                comparison(
                    {v.name: [self._result(self._trial(loss, seed, v)) for seed in self.seeds] for v in self.variants},
                    {v.name: self._rates(loss, v) for v in self.variants},
                    loss,
                    self.plan,
                    model,
                )
                for loss in self.losses
            ],
        }

    def draw(self, folder: Path) -> dict[str, Any]:
        """Write the pictures of the first loss and seed, and say what they show.

        The scene is that whose boundary F1 with the single head is the median of the held-out seeds.
        """
        plan, split, loss, seed = self.plan, HELD_OUT[0], self.losses[0], self.seeds[0]
        chosen = {v.name: self._trial(loss, seed, v) for v in self.variants if v.name in SHOWN}
        single = self.work.scores(chosen[heads.SINGLE], split)
        ranked = sorted(single, key=lambda name: (single[name].get(heads.PRIMARY, 0.0), int(name)))
        name = ranked[len(ranked) // 2]
        scene = rendered_scene(int(name), split=split, views=plan.views, height=plan.height, width=plan.width)
        found = predictions(self.model, {name: self._load(trial).stage for name, trial in chosen.items()}, scene)
        crop = most_edges(scene.truth["depth"])
        folder.mkdir(parents=True, exist_ok=True)
        for file, sheet in zip(PICTURES, (edge_sheet, point_sheet), strict=True):
            atomic_write(folder / file, encoded(sheet(scene, found, crop)))
        box = [crop.rows.start, crop.rows.stop, crop.columns.start, crop.columns.stop]
        return {"files": list(PICTURES), "loss": loss, "seed": seed, "split": split, "scene": int(name),
                "view": crop.view, "rows_columns": box}  # fmt: skip

    def _train(self, label: str, trials: Sequence[Trial], pool: Pool | None) -> Pool | None:
        """Those that the folder lacks; returns the pool where one was needed, for the next ones."""
        missing = [trial for trial in trials if not self.work.has(trial)]
        self.progress.line(label, f"{len(trials) - len(missing)} of {len(trials)} are trained")
        if not missing:
            return pool
        pool = pool or self._pool()
        started = time.monotonic()
        total = self.plan.steps * len(missing)
        train_heads(
            missing,
            pool,
            self.plan,
            lambda done: self.progress.report(label, done, total, f"{done} of {total} steps"),
            self._keep,
        )
        self.progress.line(label, f"{len(missing)} trained in {time.monotonic() - started:.0f} s")
        return pool

    def _keep(self, trial: Trial, head: TrainedHead) -> None:
        self.work.save(trial, head)
        self.progress.line("trained", str(trial))

    def _pool(self) -> Pool:
        plan, started = self.plan, time.monotonic()
        pool = build_pool(
            self.model,
            plan,
            lambda done: self.progress.report("features", done, plan.scenes, f"of {plan.scenes} scenes"),
            lambda note: self.progress.line("note", note),
        )
        size = pool.features.nbytes / 1e9
        text = f"of {plan.scenes} scenes of {plan.views} views, {size:.2g} GB, {time.monotonic() - started:.0f} s"
        self.progress.line("features", text)
        return pool

    def _judge(self, trials: Sequence[Trial], scenes: str, split: str, first_seed: int, count: int) -> None:
        """All that lack figures on a set of scenes: the features of a scene serve all of them."""
        missing = {str(trial): trial for trial in trials if not self.work.judged(trial, scenes)}
        if not missing:
            return
        plan, started = self.plan, time.monotonic()
        found = judge(
            self.model,
            {name: self._load(trial).stage for name, trial in missing.items()},
            rendered_scenes(
                range(first_seed, first_seed + count),
                split=split,
                views=plan.views,
                height=plan.height,
                width=plan.width,
            ),
            lambda done: self.progress.report(scenes, done, count),
        )
        for name, trial in missing.items():
            self.work.save_scores(trial, scenes, found[name])
        seconds = time.monotonic() - started
        self.progress.line("judged", f"{len(missing)} heads on {count} scenes of {scenes}, {seconds:.0f} s")

    def _trial(self, loss: str, seed: int, variant: Variant) -> Trial:
        """At the learning rate that was chosen for the head."""
        return Trial(loss, seed, variant, self._rates(loss, variant)["chosen"])

    def _rates(self, loss: str, variant: Variant) -> dict[str, Any]:
        """`tried`: each `learning_rate` with its mean `abs_rel` on the validation scenes; `chosen`: the best one."""
        tried = [
            {
                "learning_rate": rate,
                "abs_rel": _mean(self.work.scores(Trial(loss, _TUNED_SEED, variant, rate), VALIDATION)),
            }
            for rate in self.rates
        ]
        return {"tried": tried, "chosen": min(tried, key=lambda rate: rate["abs_rel"])["learning_rate"]}

    def _facts(self, variant: Variant) -> dict[str, Any]:
        return {
            **dataclasses.asdict(variant),
            "flops_per_pixel": heads.flops_per_pixel(self.model.config, variant),
            "parameters": heads.parameters(self.model.config, variant),
        }

    def _result(self, trial: Trial) -> HeadResult:
        curves = {name: curve.numpy() for name, curve in self._load(trial).curves.items()}
        return HeadResult(curves, {split: self.work.scores(trial, split) for split in HELD_OUT})

    def _load(self, trial: Trial) -> TrainedHead:
        return self.work.load(trial, self.model.config.dpt_head.features // 2)


def _mean(scores: Scores) -> float:
    return sum(scene["abs_rel"] for scene in scores.values()) / len(scores)

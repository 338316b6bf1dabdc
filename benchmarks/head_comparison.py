"""Depth heads compared on the same frozen features: VGGT's single head, wider ones, and experts with a gate.

    python -m moe3d_deploy.benchmarks.head_comparison moe3d-tiny --out benchmarks/results/head_comparison.json

Trains only the last stage of the depth head, each kind from several seeds of fresh weights, and judges all of them on
held-out scenes. The same command again goes on where a killed run was. docs/comparison.md says what is compared.
"""

import dataclasses
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moe3d_deploy import costs
from moe3d_deploy.benchmarks import head_variants as heads
from moe3d_deploy.benchmarks.environment import environment
from moe3d_deploy.benchmarks.head_variants import Plan, Variant
from moe3d_deploy.bundle import is_bundle
from moe3d_deploy.cli.main import finish
from moe3d_deploy.cli.progress import Progress
from moe3d_deploy.errors import InputError, require
from moe3d_deploy.evaluation.scenes import HELD_OUT
from moe3d_deploy.files import atomic_write
from moe3d_deploy.training.options import DEPTH_LOSSES

if TYPE_CHECKING:
    from moe3d_deploy.benchmarks.head_report import HeadResult
    from moe3d_deploy.benchmarks.head_training import TrainedHead
    from moe3d_deploy.benchmarks.head_work import Key, WorkFolder
    from moe3d_deploy.model import MoE3D

FORMAT_VERSION = 1
SHOWN = (heads.SINGLE, heads.WIDE, heads.MOE, heads.MOE_ENTROPY)  # in the pictures
PICTURES = ("comparison_edges.png", "comparison_points.png")
_DEFAULT = Plan()
_COUNT = click.IntRange(min=1)


@click.command()
@click.argument("checkpoint")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="JSON file to write.")
@click.option("--seeds", type=_COUNT, default=3, show_default=True, help="Fresh sets of weights of each head.")
@click.option("--steps", type=_COUNT, default=_DEFAULT.steps, show_default=True)
@click.option("--batch", type=_COUNT, default=_DEFAULT.batch, show_default=True, help="Views of a step.")
@click.option("--scenes", type=_COUNT, default=_DEFAULT.scenes, show_default=True, help="Scenes to train on.")
@click.option("--count", type=_COUNT, default=_DEFAULT.judged, show_default=True, help="Scenes of each held-out split.")
@click.option("--views", type=click.IntRange(1, 8), default=_DEFAULT.views, show_default=True, help="Views of a scene.")
@click.option("--height", type=_COUNT, default=_DEFAULT.height, show_default=True, help="Pixels of a view.")
@click.option("--width", type=_COUNT, default=_DEFAULT.width, show_default=True)
@click.option(
    "--loss", "losses", multiple=True, type=click.Choice(DEPTH_LOSSES), default=("l2",), show_default=True,
    help="Depth loss; may be repeated, for a comparison with each.",
)  # fmt: skip
@click.option(
    "--learning-rate", type=click.FloatRange(min=0, min_open=True), default=_DEFAULT.learning_rate, show_default=True
)
@click.option(
    "--entropy-weight", type=click.FloatRange(min=0, max=1e-3, min_open=True, max_open=True),
    default=_DEFAULT.entropy_weight, show_default=True, help="Of the head that is trained with the entropy loss.",
)  # fmt: skip
@click.option(
    "--workdir", type=click.Path(path_type=Path),
    help="Trained heads and their figures; a further run goes on from there.  [default: OUT with .work for its suffix]",
)  # fmt: skip
@click.option("--pictures", type=click.Path(path_type=Path), help="Folder for the pictures.  [default: that of OUT]")
def main(
    checkpoint: str,
    out: Path,
    seeds: int,
    steps: int,
    batch: int,
    scenes: int,
    count: int,
    views: int,
    height: int,
    width: int,
    losses: tuple[str, ...],
    learning_rate: float,
    entropy_weight: float,
    workdir: Path | None,
    pictures: Path | None,
) -> None:
    """Compare depth heads on the frozen features of CHECKPOINT, a checkpoint or preset."""
    for package in ("torch", "safetensors", "scipy"):
        require(package)
    # Before torch is imported: threads that spin while they wait take the core of the process that makes samples.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from moe3d_deploy.benchmarks.head_report import comparison
    from moe3d_deploy.benchmarks.head_work import open_work
    from moe3d_deploy.checkpoint import load_model, open_checkpoint

    if is_bundle(checkpoint):
        raise InputError(f"{checkpoint} is a bundle, which holds no weights to train on; name its checkpoint instead")
    plan = Plan(height, width, views, scenes, steps, batch, learning_rate, entropy_weight, count)
    source = open_checkpoint(checkpoint)
    costs.check_shape(source.config, (1, views, height, width))
    variants = heads.variants(source.config, entropy_weight)
    model = load_model(source, point_head=False)
    with open_work(workdir or out.with_suffix(".work"), plan, source.sha256()) as work:
        run = _Run(model, plan, variants, tuple(dict.fromkeys(losses)), seeds, work)
        run.train()
        run.judge()
        report: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "environment": environment(),
            "model": {
                "name": source.name,
                "origin": source.origin,
                "sha256": source.sha256(),
                "licence": source.licence,
                "experts": source.config.moe.num_experts if source.config.moe else None,
            },
            "plan": {**dataclasses.asdict(plan), "seeds": seeds},
            "variants": [run.facts(variant) for variant in variants],
            "comparisons": [comparison(run.results(loss), loss, plan) for loss in run.losses],
        }
        report["pictures"] = run.draw(run.losses[0], pictures or out.parent)
        atomic_write(out, (json.dumps(report, indent=2) + "\n").encode("utf-8"))
    for found in report["comparisons"]:
        for sentence in found["finding"]:
            run.progress.line(found["loss"], sentence)


class _Run:
    def __init__(
        self,
        model: "MoE3D",
        plan: Plan,
        variants: Sequence[Variant],
        losses: Sequence[str],
        seeds: int,
        work: "WorkFolder",
    ) -> None:
        self.model, self.plan, self.variants, self.losses, self.work = model, plan, variants, losses, work
        self.seeds = range(seeds)
        self.progress = Progress()

    def train(self) -> None:
        """All heads that the folder lacks; those of a seed together."""
        from moe3d_deploy.benchmarks.head_pool import build_pool
        from moe3d_deploy.benchmarks.head_training import train_heads

        missing = {
            (loss, seed): found
            for loss in self.losses
            for seed in self.seeds
            if (found := [v for v in self.variants if not self.work.has(_key(loss, seed, v))])
        }
        heads_missing = sum(map(len, missing.values()))
        total = len(self.losses) * len(self.seeds) * len(self.variants)
        self.progress.line("heads", f"{total - heads_missing} of {total} are trained")
        if not missing:
            return
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
        for (loss, seed), found in missing.items():
            started = time.monotonic()
            label = f"{loss} seed {seed}"

            def on_step(step: int, depth: dict[str, float], label: str = label) -> None:
                detail = "  ".join(f"{name} {value:.4f}" for name, value in depth.items())
                self.progress.report(label, step, plan.steps, detail)

            for name, head in train_heads(found, pool, plan, loss, seed, on_step).items():
                self.work.save(_key(loss, seed, heads.by_name(found)[name]), head)
            seconds = time.monotonic() - started
            names = ", ".join(variant.name for variant in found)
            rate = f"{seconds / plan.steps:.3f} s/step"
            self.progress.line(label, f"{names}: {plan.steps} steps in {seconds:.0f} s, {rate}")

    def judge(self) -> None:
        """All heads whose figures the folder lacks, on both splits: the features of a scene serve all of them."""
        from moe3d_deploy.benchmarks.head_scores import judge
        from moe3d_deploy.evaluation import rendered_scenes

        missing = {
            key: self._load(loss, seed, variant).stage
            for loss in self.losses
            for seed in self.seeds
            for variant in self.variants
            if self.work.scores(key := _key(loss, seed, variant)) is None
        }
        if not missing:
            return
        plan, found, started = self.plan, {}, time.monotonic()
        stages = {str(key): stage for key, stage in missing.items()}
        for split in HELD_OUT:
            scenes = rendered_scenes(
                range(plan.judged), split=split, views=plan.views, height=plan.height, width=plan.width
            )
            found[split] = judge(
                self.model,
                stages,
                scenes,
                lambda done, split=split: self.progress.report(split, done, plan.judged),  # type: ignore[misc]
            )
        for key in missing:
            self.work.save_scores(key, {split: scores[str(key)] for split, scores in found.items()})
        seconds = time.monotonic() - started
        self.progress.line("judged", f"{len(missing)} heads on {plan.judged} scenes of each split, {seconds:.0f} s")

    def facts(self, variant: Variant) -> dict[str, Any]:
        return {
            **dataclasses.asdict(variant),
            "flops_per_pixel": heads.flops_per_pixel(self.model.config, variant),
            "parameters": heads.parameters(self.model.config, variant),
        }

    def results(self, loss: str) -> dict[str, list["HeadResult"]]:
        """Of every head, by name, what each seed gave: from the files of the folder alone."""
        from moe3d_deploy.benchmarks.head_report import HeadResult

        return {
            v.name: [
                HeadResult(
                    {name: curve.numpy() for name, curve in self._load(loss, seed, v).curves.items()},
                    self._scores(loss, seed, v),
                )
                for seed in self.seeds
            ]
            for v in self.variants
        }

    def draw(self, loss: str, folder: Path) -> dict[str, Any]:
        """Write the pictures of the first seed's heads, and say what they show.

        The scene is that whose boundary F1 with the single head is the median of the held-out seeds.
        """
        from moe3d_deploy.benchmarks.head_pictures import edge_sheet, encoded, most_edges, point_sheet
        from moe3d_deploy.benchmarks.head_scores import predictions
        from moe3d_deploy.evaluation import rendered_scene

        plan, split = self.plan, HELD_OUT[0]
        single = self._scores(loss, 0, self.variants[0])[split]
        ranked = sorted(single, key=lambda name: (single[name].get("boundary_f1", 0.0), int(name)))
        name = ranked[len(ranked) // 2]
        scene = rendered_scene(int(name), split=split, views=plan.views, height=plan.height, width=plan.width)
        chosen = [variant for variant in self.variants if variant.name in SHOWN]
        stages = {v.name: self._load(loss, 0, v).stage for v in chosen}
        found = predictions(self.model, stages, scene)
        crop = most_edges(scene.truth["depth"])
        folder.mkdir(parents=True, exist_ok=True)
        for file, draw in zip(PICTURES, (edge_sheet, point_sheet), strict=True):
            atomic_write(folder / file, encoded(draw(scene, found, crop)))
        box = [crop.rows.start, crop.rows.stop, crop.columns.start, crop.columns.stop]
        return {"files": list(PICTURES), "loss": loss, "seed": 0, "split": split, "scene": int(name),
                "view": crop.view, "rows_columns": box}  # fmt: skip

    def _load(self, loss: str, seed: int, variant: Variant) -> "TrainedHead":
        return self.work.load(_key(loss, seed, variant), variant, self.model.config.dpt_head.features // 2)

    def _scores(self, loss: str, seed: int, variant: Variant) -> dict[str, Any]:
        scores = self.work.scores(_key(loss, seed, variant))
        if scores is None:
            raise RuntimeError("figures are asked for before they are there")
        return scores


def _key(loss: str, seed: int, variant: Variant) -> "Key":
    from moe3d_deploy.benchmarks.head_work import Key

    return Key(loss, seed, variant.name)


if __name__ == "__main__":
    sys.exit(finish("head_comparison", lambda: main))

"""How good a model is on held-out scenes, and what deployment leaves of that.

    python -m moe3d_deploy.benchmarks.quality moe3d-tiny --out benchmarks/results/quality_tiny.json

Judges SOURCE in PyTorch on both held-out splits, then exports it in every precision and judges what comes of each on
the first split again: the file in ONNX Runtime (a bf16 file's float32 twin), and the 16-bit model in PyTorch with real
rounding. The form of the result is in docs/evaluation.md; `quality_table` and `deployment_table` make Markdown of it.
"""

import json
import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from moe3d_deploy.benchmarks.environment import environment, without_paths
from moe3d_deploy.child import ChildResult, run_in_child
from moe3d_deploy.cli.main import finish
from moe3d_deploy.cli.parameters import OutputFile
from moe3d_deploy.cli.progress import Progress
from moe3d_deploy.errors import ExportError, InputError, Moe3dError, require
from moe3d_deploy.evaluation import Evaluation, Summary, evaluate, native_size, rendered_scenes
from moe3d_deploy.evaluation.compare import Comparison
from moe3d_deploy.evaluation.measures import ALIGNMENT, in_order, measure
from moe3d_deploy.evaluation.scenes import HELD_OUT
from moe3d_deploy.export import quality
from moe3d_deploy.export.pipeline import ExportOptions, export_bundle
from moe3d_deploy.export.precision import PRECISIONS, PrecisionPolicy
from moe3d_deploy.export.source import SourceSpec
from moe3d_deploy.export.verify import LABELS, model_request
from moe3d_deploy.files import atomic_write
from moe3d_deploy.runtime.session import Session

FORMAT_VERSION = 1

# What a shipped moe3d-tiny is to reach with 4 views, in the mean over the scenes of either split. AbsRel and delta are
# what makes depth look like the scene, the AUC what makes clouds of several views fit together.
BARS = {"abs_rel": 0.08, "delta1": 0.93, "auc30": 0.5}


@click.command()
@click.argument("source")
@click.option("--out", required=True, type=OutputFile(), help="JSON file to write.")
@click.option("--count", type=click.IntRange(min=1), default=64, show_default=True, help="Scenes of each split.")
@click.option("--views", type=click.IntRange(1, 8), default=4, show_default=True)
@click.option("--precision", "precisions", multiple=True, default=("fp32", "fp16", "bf16", "int8"), show_default=True)
@click.option("--no-points", is_flag=True, help="Without the measures of point clouds, which take most of the time.")
@click.option("--seed", type=click.IntRange(min=0), help="Seeded random weights of a preset.")
@click.option("--workdir", type=click.Path(path_type=Path), help="Where the exports go for a while.")
def main(
    source: str,
    out: Path,
    count: int,
    views: int,
    precisions: tuple[str, ...],
    no_points: bool,
    seed: int | None,
    workdir: Path | None,
) -> None:
    """Judge SOURCE, a checkpoint or preset, and its exports."""
    require("scipy")
    if unknown := [name for name in precisions if name not in PRECISIONS]:
        raise InputError(f"--precision {unknown[0]}: no such precision; choose from {', '.join(PRECISIONS)}")
    if workdir and not workdir.is_dir():
        raise InputError(f"--workdir {workdir}: no such folder; create it")
    spec = SourceSpec(source, seed)
    opened = spec.open()
    height, width = native_size(opened.config.img_size, opened.config.patch_size)
    plan = quality.QualityPlan(count, views, height, width, split=HELD_OUT[0])
    outputs = quality.EXPERTS if opened.config.moe else ()
    progress = Progress()
    report: dict[str, Any] = {
        "format_version": FORMAT_VERSION,
        "environment": environment(),
        "model": {
            "name": opened.name,
            "origin": opened.origin,
            "sha256": opened.sha256(),
            "licence": opened.licence,
            "parameters": sum(math.prod(shape) for shape in opened.shapes().values()),
        },
        "scenes": {"count": count, "first_seed": 0, "views": views, "height": height, "width": width},
        "quality": _quality(spec, outputs, plan, not no_points, progress),
    }
    with tempfile.TemporaryDirectory(prefix="moe3d-quality-", dir=workdir) as folder:
        report["deployment"] = _deployment(spec, outputs, plan, precisions, Path(folder), progress)
    atomic_write(out, (json.dumps(report, indent=2, sort_keys=True) + "\n").encode("utf-8"))
    if failed := [row for row in report["deployment"] if "failed" in row]:
        raise Moe3dError(f"{failed[0]['precision']}: {failed[0]['failed']}")


def _quality(
    spec: SourceSpec, outputs: Sequence[str], plan: quality.QualityPlan, points: bool, progress: Progress
) -> list[dict[str, Any]]:
    """A row per split: every measure's mean, median, number of scenes and worst scene, in PyTorch float32."""
    session = Session.open(spec.source, backend="pytorch", seed=spec.seed, outputs=outputs)
    size = {"views": plan.views, "height": plan.height, "width": plan.width}
    rows = []
    for split, evaluation in judged_splits(session, plan.scenes, size, progress, points=points):
        summary = evaluation.summary()
        progress.line(split, f"AbsRel {summary['abs_rel'].mean:.4f} over {plan.scenes} scenes")
        metrics = {key: value._asdict() for key, value in summary.items()}
        rows.append({"split": split, "metrics": metrics, "bars": bars_of(summary)})
    return rows


def judged_splits(
    session: Session, count: int, size: Mapping[str, int], progress: Progress, *, points: bool
) -> Iterator[tuple[str, Evaluation]]:
    """A session's evaluation on scenes 0..count - 1 of each held-out split; `size` is views, height and width."""
    for split in HELD_OUT:
        yield (
            split,
            evaluate(
                session.run,
                rendered_scenes(range(count), split=split, **size),
                points=points,
                on_scene=lambda scene, *_, split=split: progress.report(split, int(scene.name) + 1, count),
            ),
        )


def bars_of(summary: Mapping[str, Summary]) -> dict[str, dict[str, Any]]:
    """The bars for the measures that there are, and whether the mean reaches them."""
    found = {}
    for key, bar in BARS.items():
        if key in summary:
            mean = summary[key].mean
            reached = mean <= bar if measure(key).better == "lower" else mean >= bar
            found[key] = {"bar": bar, "reached": reached}
    return found


def _deployment(
    spec: SourceSpec,
    outputs: Sequence[str],
    plan: quality.QualityPlan,
    precisions: Sequence[str],
    folder: Path,
    progress: Progress,
) -> list[dict[str, Any]]:
    """A row per precision and way to run it: what changes from PyTorch float32 on the same scenes."""

    def run(stage: str, function: str, request: dict[str, Any], total: int) -> ChildResult:
        return run_in_child(
            function,
            request,
            title=stage,
            on_event=lambda event: progress.report(stage, event["step"], total),
            failure=ExportError,
        )

    request: dict[str, Any] = {
        "source": asdict(spec),
        "merge": True,
        "input": "float32",
        "outputs": list(outputs),
        "folder": str(folder),
        "plan": asdict(plan),
    }
    before = quality.judge_reference(plan, request, run)
    rows: list[dict[str, Any]] = []
    for precision in precisions:
        policy = PrecisionPolicy(precision)
        kinds = quality.kinds_of(policy)
        kinds = ("twin", *kinds) if policy.has_twin else kinds
        options = ExportOptions(policy, outputs=tuple(outputs), verify=False)
        try:
            bundle = export_bundle(
                spec,
                folder / precision,
                options,
                on_event=lambda event: progress.report(event["stage"], event["step"], event["total"], event["detail"]),
            ).bundle
            more = {"policy": asdict(policy), **model_request(bundle)}
            found = quality.judge_deployed(kinds, plan, {**request, **more}, before, run)
        except ExportError as error:
            rows.append({"precision": precision, "failed": without_paths(str(error))})
            continue
        rows += [_row(precision, kind, comparison) for kind, comparison in found.items()]
        for row in rows[-len(found) :]:
            progress.line(precision, f"{row['label']}: AbsRel {100 * row['changes']['abs_rel']['change']:+.2g} %")
    return rows


def _row(precision: str, kind: str, comparison: Comparison) -> dict[str, Any]:
    return {
        "precision": precision,
        "run": kind,
        "label": LABELS[kind],
        **comparison.to_dict(),
        "limits": quality.limits_of(precision),
        "within_limits": not quality.beyond(comparison, precision),
    }


def quality_table(report: dict[str, Any]) -> str:
    """Every measure on both splits in Markdown, with the bars and whether each split reaches them."""
    splits, scenes = report["quality"], report["scenes"]
    heads = [f"{row['split']}: mean | median | worst (seed)" for row in splits]
    lines = [
        f"| | {' | '.join(heads)} | bar | reached |",
        f"|---|{'---:|---:|---:|' * len(splits)}---|---|",
    ]
    for key in in_order({key for row in splits for key in row["metrics"]}):
        cells = [_summary_cells(key, row["metrics"].get(key), scenes["count"]) for row in splits]
        lines.append(f"| {measure(key).name} | {' | '.join(cells)} | {_bar_cells(key, splits)} |")
    size = f"{scenes['views']} views of {scenes['width']}x{scenes['height']}"
    first, last = scenes["first_seed"], scenes["first_seed"] + scenes["count"] - 1
    model = report["model"]
    what = f"{model['name']} ({model['origin']}, {model['parameters'] / 1e6:.1f} M parameters) in PyTorch, float32"
    lines += ["", f"{what}; seeds {first}..{last} of each split, {size}. {ALIGNMENT}"]
    return "\n".join(lines)


def deployment_table(report: dict[str, Any]) -> str:
    """What each precision changes, in Markdown: of the mean, per scene, and how much may change per scene."""
    lines = [
        "| precision | run in | AbsRel | per scene (limit) | boundary F1 | per scene (limit) | flying points "
        "| strongest expert agrees | within limits |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in report["deployment"]:
        if "failed" in row:
            lines.append(f"| {row['precision']} | failed: {row['failed']} | | | | | | | |")
            continue
        changes = [_change_cells(key, row) for key in ("abs_rel", "boundary_f1")]
        flying, agree = row["changes"]["flying"], row["experts_agree"]
        lines.append(
            f"| {row['precision']} | {row['label']} | {' | '.join(changes)} "
            f"| {100 * flying['reference']:.2f} % -> {100 * flying['found']:.2f} % "
            f"| {'' if agree is None else f'{100 * agree:.2f} %'} | {'yes' if row['within_limits'] else 'no'} |"
        )
    scenes = report["scenes"]
    split = report["quality"][0]["split"]
    lines += ["", f"Changes from PyTorch in float32 on the {scenes['count']} scenes of {split}."]
    return "\n".join(lines)


def _summary_cells(key: str, found: dict[str, Any] | None, count: int) -> str:
    if found is None:
        return "| |"
    text = measure(key).text
    mean = text(found["mean"]) + (f" ({found['scenes']} scenes)" if found["scenes"] < count else "")
    worst = "" if found["worst"] is None else f"{text(found['worst_value'])} ({found['worst']})"
    return f"{mean} | {text(found['median'])} | {worst}"


def _bar_cells(key: str, splits: Sequence[dict[str, Any]]) -> str:
    bars = [row["bars"].get(key) for row in splits]
    stated = next((bar["bar"] for bar in bars if bar), None)
    if stated is None:
        return "|"
    side = "at most" if measure(key).better == "lower" else "at least"
    reached = ["not measured" if bar is None else "yes" if bar["reached"] else "no" for bar in bars]
    return f"{side} {measure(key).text(stated)} | {', '.join(reached)}"


def _change_cells(key: str, row: dict[str, Any]) -> str:
    if key not in row["changes"]:
        return "|"
    change = row["changes"][key]
    typical, limit = (quality.amount(key, value, sign=False) for value in (change["typical"], row["limits"][key]))
    return f"{quality.amount(key, change['change'])} | {typical} ({limit})"


if __name__ == "__main__":
    sys.exit(finish("quality", lambda: main))

"""`moe3d eval`: how good depth and cameras are, on rendered scenes with exact truth or on the user's own."""

import json
import re
import time
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from moe3d_deploy.cli.arguments import given_flags
from moe3d_deploy.cli.progress import Progress
from moe3d_deploy.errors import InputError, require
from moe3d_deploy.evaluation.scenes import SPLITS

if TYPE_CHECKING:
    from moe3d_deploy.evaluation import Evaluation, EvaluationScene, SceneResult
    from moe3d_deploy.runtime.session import Session

_OF_RENDERED = ("split", "count", "first_seed", "views", "photographs")


@click.command("eval", short_help="Measure the quality of SOURCE, a bundle, checkpoint or preset, on scenes with truth")
@click.argument("source")
@click.option(
    "--scenes", "split", type=click.Choice(SPLITS), default=SPLITS[0], show_default=True,
    help="Rendered scenes: held-out seeds, held-out kinds of objects, or those of training.",
)  # fmt: skip
@click.option("--count", type=click.IntRange(min=1), default=32, show_default=True, help="Rendered scenes.")
@click.option("--first-seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the first one.")
@click.option("--views", type=click.IntRange(1, 8), default=4, show_default=True, help="Views of a rendered scene.")
@click.option("--photographs", is_flag=True, help="Photographs on some surfaces of rendered scenes.")
@click.option(
    "--size", "sizes", multiple=True, metavar="WxH",
    help="Pixels of a view, such as 252x196, or with --data its width (crop) or longer side (pad) alone; may be "
    "repeated.  [default: the model's own]",
)  # fmt: skip
@click.option(
    "--data", type=click.Path(path_type=Path), metavar="FOLDER",
    help="Own scenes instead: a folder for each, with photographs and truth.npz (docs/evaluation.md).",
)  # fmt: skip
@click.option("--points", is_flag=True, help="Measure point clouds as well: takes seconds per scene.")
@click.option(
    "--pictures", type=click.Path(path_type=Path), metavar="FOLDER",
    help="Draw every scene, truth beside prediction, in a sub-folder of FOLDER for each kind of scenes and size.",
)  # fmt: skip
@click.option("--backend", type=click.Choice(["auto", "onnxruntime", "pytorch"]), default="auto", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), help="PyTorch presets only: seeded random weights.")
@click.option("--allow-pickle", is_flag=True, help="PyTorch only: read a .pt checkpoint (weights only).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of the tables.")
def evaluate_command(
    source: str,
    split: str,
    count: int,
    first_seed: int,
    views: int,
    photographs: bool,
    sizes: tuple[str, ...],
    data: Path | None,
    points: bool,
    pictures: Path | None,
    backend: str,
    seed: int | None,
    allow_pickle: bool,
    as_json: bool,
) -> None:
    """Measure the depth and the cameras of SOURCE on scenes with truth.

    \b
    moe3d eval bundle
    moe3d eval my-moe3d --scenes test-kinds --count 64 --json
    moe3d eval bundle --size 252x196 --size 168x126
    moe3d eval bundle --data my-scenes --pictures drawn
    """
    from moe3d_deploy.evaluation.measures import ALIGNMENT

    require("scipy")
    if data is not None and (given := given_flags(*_OF_RENDERED)):
        raise InputError(f"{given[0]} is for rendered scenes and --data brings others: leave one of them out")
    session = _open(source, backend, seed, allow_pickle)
    if data is None:
        require("torch")
        options = {"split": split, "views": views, "photographs": photographs}
        tasks = _rendered(session, range(first_seed, first_seed + count), options, sizes)
    else:
        tasks = _own(session, data, sizes)
    session.load()
    progress = Progress()
    runs = []
    for what, scenes in tasks:
        drawn = pictures / _picture_folder(what) if pictures else None
        evaluation = _evaluate(session, scenes, what["count"], points, drawn, progress)
        runs.append(_report(what, evaluation))
        if not as_json:
            click.echo("\n".join(_table(session, what, evaluation)))
    if as_json:
        click.echo(json.dumps({"model": session.name, "alignment": ALIGNMENT, "runs": runs}, indent=2))
    else:
        click.echo(ALIGNMENT)


_Task = tuple[dict[str, Any], "Iterable[EvaluationScene]"]
"""What the scenes of a run are, for people and JSON, and the scenes."""


def _open(source: str, backend: str, seed: int | None, allow_pickle: bool) -> "Session":
    """The session, not loaded yet; one over a checkpoint with experts gives their weights too."""
    from moe3d_deploy.bundle import is_bundle
    from moe3d_deploy.runtime.session import Session

    session = Session.open(source, backend=backend, seed=seed, allow_pickle=allow_pickle, load=False)
    if is_bundle(source) or session.config is None or session.config.moe is None:
        return session
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they have been told
        return Session.open(
            source, backend=backend, seed=seed, allow_pickle=allow_pickle, load=False, outputs=("expert_weights",)
        )


def _rendered(session: "Session", seeds: range, options: dict[str, Any], sizes: tuple[str, ...]) -> list[_Task]:
    """A task per size. Raises InputError for sizes that the session does not take."""
    from moe3d_deploy.evaluation import native_size, rendered_scenes

    fit = session.preprocessing
    tasks: list[_Task] = []
    for size in sizes or (None,):
        if size is None:
            height, width = native_size(fit.size, fit.patch_size, session.shapes)
        elif match := re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", size):
            width, height = int(match[1]), int(match[2])
        else:
            raise InputError(f"--size {size!r}: expected width x height in pixels, such as 252x196")
        session.check(np.zeros((options["views"], height, width, 3), np.uint8))
        of_size = {**options, "height": height, "width": width}
        what = {**of_size, "count": len(seeds), "first_seed": seeds.start}
        tasks.append((what, rendered_scenes(seeds, **of_size)))
    return tasks


def _own(session: "Session", folder: Path, sizes: tuple[str, ...]) -> list[_Task]:
    from moe3d_deploy.evaluation.folder import find_scenes, folder_scenes
    from moe3d_deploy.image_files import shown

    if wrong := [size for size in sizes if not re.fullmatch(r"[1-9][0-9]{0,4}", size)]:
        raise InputError(
            f"--size {wrong[0]!r}: with --data the height follows from the photographs; give the width (crop) or the "
            "longer side (pad) in pixels, such as 252"
        )
    scenes = find_scenes(folder)
    return [
        ({"folder": shown(folder.name), "count": len(scenes), "size": size}, folder_scenes(scenes, fit, size))
        for fit in [session.preprocessing]
        for size in [int(size) for size in sizes] or [fit.size]
    ]


def _evaluate(
    session: "Session",
    scenes: "Iterable[EvaluationScene]",
    count: int,
    points: bool,
    pictures: Path | None,
    progress: Progress,
) -> "Evaluation":
    from moe3d_deploy.evaluation import evaluate
    from moe3d_deploy.evaluation.pictures import write_pictures

    done = 0

    def on_scene(scene: "EvaluationScene", prediction: Mapping[str, np.ndarray], result: "SceneResult") -> None:
        nonlocal done
        done += 1
        progress.report("scenes", done, count, f"{result.name}: AbsRel {result.metrics['abs_rel']:.4f}")
        if pictures:
            write_pictures(scene, prediction, pictures)

    started = time.perf_counter()
    progress.report("scenes", 0, count)
    evaluation = evaluate(session.run, scenes, points=points, on_scene=on_scene)
    progress.line("scenes", f"{count} in {time.perf_counter() - started:.1f} s")
    return evaluation


def _picture_folder(what: dict[str, Any]) -> str:
    """Of a run's own, as scenes of other splits or sizes have the same names."""
    if "folder" in what:
        return f"size_{what['size']}"
    photographs = "_photographs" if what["photographs"] else ""
    return f"{what['split']}_{what['views']}_views_{what['width']}x{what['height']}{photographs}"


def _report(what: dict[str, Any], evaluation: "Evaluation") -> dict[str, Any]:
    return {
        "scenes": what,
        "metrics": {key: summary._asdict() for key, summary in evaluation.summary().items()},
        "results": [{"name": result.name, "metrics": result.metrics} for result in evaluation.results],
    }


def _table(session: "Session", what: dict[str, Any], evaluation: "Evaluation") -> list[str]:
    from moe3d_deploy.evaluation.measures import measure

    if "folder" in what:
        scenes = f"{what['count']} scenes of {what['folder']}, size {what['size']}"
    else:
        last = what["first_seed"] + what["count"] - 1
        scenes = f"{what['split']} seeds {what['first_seed']}..{last}, {what['views']} views of "
        scenes += f"{what['width']}x{what['height']}"
    rows = [("", "mean", "median", "scenes", "worst")]
    for key, summary in evaluation.summary().items():
        named = measure(key)
        values = (named.text(summary.mean), named.text(summary.median), str(summary.scenes), summary.worst or "")
        rows.append((named.name, *values))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return [f"{session.name}: {scenes}", *(line.rstrip() for line in lines)]

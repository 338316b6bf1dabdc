"""`moe3d train`: train the expert head of a checkpoint, or a whole model, on procedural scenes."""

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import click

from moe3d_deploy.cli.progress import Progress
from moe3d_deploy.errors import InputError, require
from moe3d_deploy.training.options import (
    AMP,
    DEPTH_LOSSES,
    FEATURE_CACHES,
    MOST_VIEWS,
    OPTIMIZERS,
    TRAINED_PARTS,
    TrainOptions,
)

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainOptions)}


def _option(name: str, help: str, **settings: Any) -> Any:
    """The flag of a field of TrainOptions, with its default."""
    default = _DEFAULTS[name]
    if "type" not in settings and default is not None:
        settings["type"] = type(default)
    shown = settings.pop("shown", None)
    text = shown or default
    if text is not None and "is_flag" not in settings:
        help += f"  [default: {text}]"
    return click.option(f"--{settings.pop('flag', name.replace('_', '-'))}", name, default=None, help=help, **settings)


def _switch(name: str, help: str) -> Any:
    flag = name.replace("_", "-")
    help += f"  [default: {'yes' if _DEFAULTS[name] else 'no'}]"
    return click.option(f"--{flag}/--no-{flag}", name, default=None, help=help)


@click.command("train", short_help="Train the expert head of a checkpoint, or a whole model")
@click.argument("source", required=False)
@click.option(
    "-o", "--output", required=True, metavar="RUN", type=click.Path(path_type=Path), help="Folder of the run."
)
@click.option("--resume", is_flag=True, help="Go on with the run in RUN as it is; SOURCE and options come from there.")
@_option(
    "train", "What is trained: experts and gate, all but the depth head, or all.", type=click.Choice(TRAINED_PARTS)
)
@click.option(
    "--from-scratch", is_flag=True, default=None, help="Start from fresh weights; of SOURCE only the sizes count."
)
@_option("steps", "Steps of the run, for which the learning rate is planned.")
@_option("batch", "Scenes of a step, over all micro-batches and processes.")
@_option("accumulate", "Micro-batches that a step is cut into, for less memory.")
@_option(
    "optimizer", "muon: for the matrices of the transformer blocks, AdamW for the rest.", type=click.Choice(OPTIMIZERS)
)
@_option("learning_rate", "The largest, after the warm-up; then it falls as a cosine.")
@_option("warmup", "Steps in which the learning rate rises.", type=int, shown="a twentieth")
@_option("final_rate", "Learning rate of the last step, as a share of the largest.")
@_option("weight_decay", "For matrices and kernels.")
@_option("clip", "Largest norm of the gradient.")
@_option("ema", "Decay of the averaged weights, which the checkpoint holds.")
@_option("amp", "bfloat16: in the backbone, or in the depth head too.", type=click.Choice(AMP))
@_switch("compile", "Compile the transformer blocks: a minute at the start, less time per step.")
@_option("depth_loss", "Depth loss; log for training from scratch.", type=click.Choice(DEPTH_LOSSES))
@_option("depth_weight", "Weight of the depth loss.")
@_option("camera_weight", "Weight of the camera loss, of --train all.")
@_option("entropy_weight", "Weight of the gate's entropy; collapses the gate from 1e-3 on.")
@_option("gradient_weight", "Weight of the gradient term of the losses vggt and log.")
@_option("point_weight", "Weight of the points that patches tell: an aid of a training from scratch.")
@_option("match_weight", "Weight of the matches between views that attention finds, likewise.")
@_option("temperature", "Gate temperature, or first:last.", type=str, shown="the source's")
@_option("shapes", "Image shapes HEIGHTxWIDTH by commas; each step has one of them.", type=str, shown="126x168")
@_option("views", "Views of a sample, fewest:most.", type=str, shown="1:4")
@_option("scenes", "Distinct scenes.", type=int, shown="1000 where samples come again, else 100000")
@_option("scene_views", f"Views that a scene is rendered with, 1 to {MOST_VIEWS}.")
@_switch("photographs", "Textures from photographs, too; needs scikit-image.")
@_switch("camera_effects", "Exposure, noise and blur of a camera.")
@_switch("mirror", "Mirror half of the samples.")
@_switch("jitter", "Vary the colours of the samples.")
@_option("seed", "Seed of fresh weights and of the order of samples.")
@_option(
    "scene_cache", "Keep rendered scenes in this folder; any number of runs can share it.", metavar="FOLDER", type=str
)
@_option("scene_cache_gb", "What the folder may grow to.")
@_option(
    "feature_cache", "Where --train head keeps the backbone's features of its samples, which then come again; off: "
    "new samples all the time.", type=click.Choice(FEATURE_CACHES),
)  # fmt: skip
@_option("workers", "Processes that make samples.", type=int, shown="1 on a CPU; on CUDA all cores but one")
@_option("device", "auto, cpu, cuda or cuda:N; one process per device: torchrun.")
@_option("save_every", "Steps from save to save.")
@_option("log_every", "Steps from line to line of train.jsonl.")
@_option("validate_every", "Steps from validation to validation; 0 for none.")
@_option("validation_scenes", "Held-out scenes of a validation.")
@_option("licence", "Licence of the weights, for their config.json.", type=str, shown="the source's")
@_option("minutes", "Stop after so long; the same command goes on.", type=float, shown="no limit")
def train_command(source: str | None, output: Path, resume: bool, **given: Any) -> None:
    """Train SOURCE, a preset or a checkpoint, on procedural scenes, into the folder RUN.

    RUN/checkpoint is what every other command takes. The same command again goes on where a stopped run was saved.
    A run's checkpoint as SOURCE of another run starts a new phase, with other shapes or another learning rate.

    \b
    moe3d train my-moe3d -o run --steps 2000
    moe3d train moe3d-tiny --train all --from-scratch --depth-loss log --steps 20000 --scene-cache scenes -o first
    moe3d train --resume -o first
    moe3d train first/checkpoint --train all --shapes 168x224,224x168 --learning-rate 1e-4 -o second
    """
    for package in ("torch", "safetensors"):
        require(package)
    # Before torch is imported. Its threads otherwise spin while they wait for each other, which beside the processes
    # that make samples costs more than it saves.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from moe3d_deploy.training.loop import train
    from moe3d_deploy.training.run_folder import stored_options

    values = {name: _parsed(name, value) for name, value in given.items() if value is not None}
    if resume:
        _refuse_what_is_settled(source, values)
        options = dataclasses.replace(stored_options(output), **values)
    elif source is None:
        raise InputError("SOURCE is missing: name a preset or a checkpoint, or --resume the run in RUN")
    else:
        options = TrainOptions(source, **values)
    progress = Progress()

    def on_event(event: dict[str, Any]) -> None:
        if "label" in event:
            progress.line(event["label"], event["text"])
        else:
            progress.report("training", event["step"], event["total"], event["detail"])

    result = train(options, output, on_event)
    if result.step < result.total:
        progress.line("stopped", f"after step {result.step} of {result.total}, saved; go on: {result.resume_command}")
        if result.stopped_by is not None:
            signal.raise_signal(result.stopped_by)  # the frame of all commands makes the exit code of it
        return
    click.echo(f"moe3d-export {output / 'checkpoint'} -o bundle")


def _refuse_what_is_settled(source: str | None, values: dict[str, Any]) -> None:
    if source is not None:
        raise InputError(f"--resume goes on with the run's own source; leave {source!r} out")
    for field in dataclasses.fields(TrainOptions):
        if field.name in values and not field.metadata.get("any_time"):
            flag = f"--{field.name.replace('_', '-')}"
            raise InputError(f"{flag} is settled for a run that is resumed; leave it out, or start a new phase")


def _parsed(name: str, value: Any) -> Any:
    if name == "temperature":
        return _pair(name, value, float)
    if name == "views":
        return _pair(name, value, int)
    if name == "shapes":
        return tuple(_shape(text) for text in value.split(","))
    return value


def _pair(name: str, text: str, kind: type) -> tuple[Any, Any]:
    """ "a" or "a:b"."""
    try:
        first, *rest = (kind(part) for part in text.split(":"))
        (last,) = rest or [first]
    except ValueError:
        raise InputError(
            f"--{name} {text!r}: expected one number or two, such as {'1:4' if kind is int else '2:1'}"
        ) from None
    return first, last


def _shape(text: str) -> tuple[int, int]:
    try:
        height, width = (int(part) for part in text.strip().split("x"))
    except ValueError:
        raise InputError(f"--shapes {text!r}: expected HEIGHTxWIDTH, such as 126x168") from None
    return height, width

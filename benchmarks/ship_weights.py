"""A trained checkpoint of moe3d-tiny becomes the package data that the preset means.

    python -m moe3d_deploy.benchmarks.ship_weights second/checkpoint

Writes moe3d_deploy/weights/moe3d-tiny.safetensors in float16 and the JSON beside it, with the options, samples and
hours of each phase of the training, and the machine, which is taken to be this one. FACTS is a JSON object of what else
there is to say. What float16 changes is judged on held-out scenes and goes into the JSON.
"""

import json
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moe3d_deploy import shipped_weights, strict_json
from moe3d_deploy.benchmarks.environment import without_paths
from moe3d_deploy.benchmarks.training_phases import phase, phases_behind
from moe3d_deploy.cli.main import finish
from moe3d_deploy.config import PRESETS, ModelConfig
from moe3d_deploy.errors import CheckpointError, InputError, require
from moe3d_deploy.evaluation import compare, evaluate, model_predictor, native_size, rendered_scene
from moe3d_deploy.evaluation.compare import Comparison
from moe3d_deploy.evaluation.measures import measure
from moe3d_deploy.evaluation.scenes import HELD_OUT
from moe3d_deploy.files import atomic_path, sha256_file
from moe3d_deploy.machine import cpu_name, usable_cores

if TYPE_CHECKING:
    from torch import Tensor

    from moe3d_deploy.checkpoint import WeightSource

PRESET = "moe3d-tiny"
LICENCE = "Apache-2.0"  # of the package, and so of what it holds; words may follow after a comma
RESERVED = ("checkpoint", "phases")  # what the training facts say by themselves
JUDGED = ("abs_rel", "delta1", "boundary_f1")
VIEWS = 4  # of a scene that is judged
LARGEST_CHANGE = 0.01  # of AbsRel, per scene: what the last digit of an AbsRel of 0.081 shows
_SEEDED = re.compile(r"(preset|seeded):.+ seed \d+")
_SHOWN = 3  # tensors that rounding moves most


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--phase", "runs", type=click.Path(path_type=Path), multiple=True,
    help="Folder of a run of the training, in their order; may be repeated.  [default: the run of CHECKPOINT and those "
    "before it]",
)  # fmt: skip
@click.option("--facts", type=click.Path(path_type=Path), help="JSON object that goes into the training facts.")
@click.option(
    "--judge", type=click.IntRange(min=1), default=16, show_default=True,
    help="Held-out scenes on which the rounded weights are judged.",
)  # fmt: skip
def main(checkpoint: Path, runs: tuple[Path, ...], facts: Path | None, judge: int) -> None:
    """Ship CHECKPOINT, a folder that a training run wrote, as the weights of moe3d-tiny."""
    from moe3d_deploy.checkpoint import open_checkpoint

    require("scipy")
    source = open_checkpoint(checkpoint)
    require_shippable(source)
    phases = [phase(run) for run in runs] if runs else phases_behind(checkpoint)
    training = training_facts(source, phases, facts)
    change = effect_of_rounding(source, judge)
    require_small(source, change)
    moved = ship(source, training, change)
    most = sorted(moved, key=lambda name: moved[name], reverse=True)[:_SHOWN]
    size = shipped_weights.weights_file(PRESET).stat().st_size
    click.echo(f"checkpoint   {source.name} ({source.origin})")
    click.echo(f"rounding     most in {', '.join(f'{name} {moved[name]:.1e}' for name in most)}")
    click.echo(f"judged       {_words(change)}")
    click.echo(f"written      {PRESET}.safetensors, {size / 1e6:.2f} MB float16, and {PRESET}.json")
    click.echo(f"next         moe3d-export {PRESET} -o bundle --verify-quality")


def training_facts(source: "WeightSource", phases: Sequence[dict[str, Any]], facts: Path | None) -> dict[str, Any]:
    """What the JSON says of the training: the checkpoint, the phases that led to it, the machine, the user's facts.

    No string keeps a folder of this machine. Raises InputError for a file that is no JSON object, and for facts under a
    name of RESERVED.
    """
    told: dict[str, Any] = {
        "checkpoint": {"origin": source.origin, "sha256": source.sha256()},
        "phases": list(phases),
        "machine": f"{usable_cores()} cores of {cpu_name()}",
    }
    if facts:
        given = _json_object(facts)
        if taken := [key for key in RESERVED if key in given]:
            raise InputError(
                f"{facts}: {taken[0]!r} is what this command says of the training itself; name it otherwise"
            )
        told |= given
    return _without_paths(told)


def require_shippable(source: "WeightSource") -> None:
    """Raise CheckpointError for another config than the preset's, weights that no one has trained, another licence."""
    if difference := _first_difference(source.config, PRESETS[PRESET]):
        raise CheckpointError(f"{source.name} is no {PRESET}: {difference}; train the preset's own config")
    if _SEEDED.fullmatch(source.origin):
        raise CheckpointError(f"{source.name} holds seeded random weights ({source.origin}); name trained ones")
    if source.licence.partition(",")[0] != LICENCE:
        raise CheckpointError(
            f"{source.name} has another licence than the package, {LICENCE}: {source.licence}; where you may give it "
            f"out under that one, resume the run with --licence {LICENCE}"
        )


def effect_of_rounding(source: "WeightSource", scenes: int) -> Comparison:
    """What float16 weights change beside those of the checkpoint, both in float32, on scenes of held-out seeds.

    The scenes have VIEWS views of the preset's own size. Raises CheckpointError for a value that float16 cannot hold,
    Moe3dError for weights whose depth or cameras cannot be judged.
    """
    import torch

    from moe3d_deploy.checkpoint import load_model

    exact, rounded = load_model(source), load_model(source)
    with torch.no_grad():
        for name, parameter in rounded.named_parameters():
            parameter.copy_(_half(source, name))
    height, width = native_size(source.config.img_size, source.config.patch_size)
    judged = [
        rendered_scene(seed, split=HELD_OUT[0], views=VIEWS, height=height, width=width) for seed in range(scenes)
    ]
    before, after = (evaluate(model_predictor(model), judged, points=False) for model in (exact, rounded))
    return compare(before, after)


def require_small(source: "WeightSource", change: Comparison) -> None:
    """Raise CheckpointError where AbsRel changes by more than LARGEST_CHANGE per scene."""
    if not change.changes["abs_rel"].typical <= LARGEST_CHANGE:
        raise CheckpointError(
            f"{source.name}: float16 changes AbsRel by more than {100 * LARGEST_CHANGE:g} % per scene "
            f"({_words(change)}); it loses digits of weights below 6e-5, look for these"
        )


def ship(source: "WeightSource", training: dict[str, Any], change: Comparison | None = None) -> dict[str, float]:
    """Write both files; returns how far float16 moves each tensor: the norm of what changes over its own norm.

    change   what `effect_of_rounding` has found, for the JSON

    Rounding moves a normal float16 by at most 2^-11 of its value, so more than 5e-4 tells of values below 6e-5.
    Raises CheckpointError as `require_shippable`, for a value that float16 cannot hold, and for more than 12 MB:
    nothing is written then.
    """
    import torch

    from moe3d_deploy.safetensors_io import write_safetensors

    require_shippable(source)
    moved: dict[str, float] = {}

    def half(name: str) -> torch.Tensor:
        tensor, rounded = source.tensor(name).double(), _half(source, name)
        norm = tensor.norm().item()
        moved[name] = (rounded.double() - tensor).norm().item() / norm if norm else 0.0
        return rounded

    shapes = source.shapes()
    weights, facts = shipped_weights.weights_file(PRESET), shipped_weights.facts_file(PRESET)
    weights.parent.mkdir(exist_ok=True)
    with atomic_path(facts) as facts_temp, atomic_path(weights) as weights_temp:
        write_safetensors(weights_temp, shapes, torch.float16, half)
        size = weights_temp.stat().st_size
        if size > shipped_weights.LARGEST_BYTES:
            allowed = shipped_weights.LARGEST_BYTES / 1e6
            raise CheckpointError(f"{source.name} takes {size / 1e6:.1f} MB in float16; {allowed:g} MB may be shipped")
        values = {
            "origin": shipped_weights.shipped_origin(PRESET),
            "licence": shipped_weights.LICENCE,
            "sha256": sha256_file(weights_temp),
            "bytes": size,
            "parameters": sum(map(math.prod, shapes.values())),
            "rounding": {
                "largest": max(moved.values()),
                "mean": sum(moved.values()) / len(moved),
                **({"quality": _facts(change)} if change else {}),
            },
            "training": training,
        }
        facts_temp.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        facts.unlink(missing_ok=True)  # between the two renames there is none, rather than that of other weights
    return moved


def _half(source: "WeightSource", name: str) -> "Tensor":
    tensor = source.tensor(name)
    rounded = tensor.half()
    if not rounded.isfinite().all():
        largest = tensor.abs().max().item()
        raise CheckpointError(f"{source.name}: tensor {name!r} reaches {largest:.3g}, which float16 cannot hold")
    return rounded


def _facts(change: Comparison) -> dict[str, Any]:
    """For the JSON: a measure's mean in float32 and float16, and its change; of AbsRel a share of it."""
    kept = {key: value._asdict() for key, value in change.changes.items() if key in JUDGED}
    return {"split": HELD_OUT[0], "scenes": change.scenes, "views": VIEWS, "changes": kept}


def _words(change: Comparison) -> str:
    parts = []
    for key, value in change.changes.items():
        if key in JUDGED:
            more = f" ({100 * value.typical:.2g} % per scene)" if key == "abs_rel" else ""
            parts.append(f"{measure(key).name} {value.reference:.4f} -> {value.found:.4f}{more}")
    return f"{', '.join(parts)}, float32 to float16 on {change.scenes} scenes of {HELD_OUT[0]}"


def _first_difference(held: ModelConfig, wanted: ModelConfig) -> str | None:
    ours, theirs = _flat(held.to_dict()), _flat(wanted.to_dict())
    return next(
        (f"{key} is {ours.get(key)}, not {theirs.get(key)}" for key in theirs if ours.get(key) != theirs[key]), None
    )


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _json_object(path: Path) -> dict[str, Any]:
    try:
        values = strict_json.parse(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except strict_json.JsonError as error:
        raise InputError(f"{path}: {error}; correct it") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def _without_paths(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return without_paths(value) if isinstance(value, str) else value


if __name__ == "__main__":
    sys.exit(finish("ship-weights", lambda: main))

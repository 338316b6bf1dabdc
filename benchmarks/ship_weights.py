"""A trained checkpoint of moe3d-tiny becomes the package data that the preset means.

    python -m moe3d_deploy.benchmarks.ship_weights run/checkpoint --facts facts.json

Writes moe3d_deploy/weights/moe3d-tiny.safetensors in float16 and the JSON beside it. The training options come from the
run that the checkpoint lies in; FACTS is a JSON object of what else there is to say, such as machine and hours.
"""

import json
import math
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moe3d_deploy import shipped_weights, strict_json
from moe3d_deploy.benchmarks.environment import without_paths
from moe3d_deploy.cli.main import finish
from moe3d_deploy.config import PRESETS, ModelConfig
from moe3d_deploy.errors import CheckpointError, InputError
from moe3d_deploy.files import atomic_path, sha256_file
from moe3d_deploy.training.run_folder import OPTIONS_FILE

if TYPE_CHECKING:
    from moe3d_deploy.checkpoint import WeightSource

PRESET = "moe3d-tiny"
_SEEDED = re.compile(r"(preset|seeded):.+ seed \d+")
_SHOWN = 3  # tensors that rounding moves most


@click.command()
@click.argument("checkpoint", type=click.Path(exists=True, path_type=Path))
@click.option("--facts", type=click.Path(path_type=Path), help="JSON object that goes into the training facts.")
def main(checkpoint: Path, facts: Path | None) -> None:
    """Ship CHECKPOINT, a folder that a training run wrote, as the weights of moe3d-tiny."""
    from moe3d_deploy.checkpoint import open_checkpoint

    source = open_checkpoint(checkpoint)
    training = training_facts(source, checkpoint.resolve().parent / OPTIONS_FILE, facts)
    moved = ship(source, training)
    most = sorted(moved, key=lambda name: moved[name], reverse=True)[:_SHOWN]
    size = shipped_weights.weights_file(PRESET).stat().st_size
    click.echo(f"checkpoint   {source.name} ({source.origin})")
    click.echo(f"rounding     most in {', '.join(f'{name} {moved[name]:.1e}' for name in most)}")
    click.echo(f"written      {PRESET}.safetensors, {size / 1e6:.2f} MB float16, and {PRESET}.json")
    click.echo(f"next         moe3d-export {PRESET} -o bundle --verify-quality")


def training_facts(source: "WeightSource", options: Path, facts: Path | None) -> dict[str, Any]:
    """What the JSON says of the training: the checkpoint, the run's options where there are any, the user's facts.

    No string keeps a folder of this machine. Raises InputError for a file that is no JSON object.
    """
    told: dict[str, Any] = {"checkpoint": {"origin": source.origin, "sha256": source.sha256()}}
    if options.is_file():
        told["options"] = _json_object(options)
    return _without_paths(told | (_json_object(facts) if facts else {}))


def ship(source: "WeightSource", training: dict[str, Any]) -> dict[str, float]:
    """Write both files; returns how far float16 moves each tensor: the norm of what changes over its own norm.

    Rounding moves a normal float16 by at most 2^-11 of its value, so more than 5e-4 tells of values below 6e-5.
    Raises CheckpointError for another config than the preset's, weights that no one has trained, a value that float16
    cannot hold, and more than 12 MB: nothing is written then.
    """
    import torch

    from moe3d_deploy.safetensors_io import write_safetensors

    if difference := _first_difference(source.config, PRESETS[PRESET]):
        raise CheckpointError(f"{source.name} is no {PRESET}: {difference}; train the preset's own config")
    if _SEEDED.fullmatch(source.origin):
        raise CheckpointError(f"{source.name} holds seeded random weights ({source.origin}); name trained ones")
    moved: dict[str, float] = {}

    def half(name: str) -> torch.Tensor:
        tensor = source.tensor(name).double()
        rounded = tensor.half()
        if not rounded.isfinite().all():
            largest = tensor.abs().max().item()
            raise CheckpointError(f"{source.name}: tensor {name!r} reaches {largest:.3g}, which float16 cannot hold")
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
            "rounding": {"largest": max(moved.values()), "mean": sum(moved.values()) / len(moved)},
            "training": training,
        }
        facts_temp.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        facts.unlink(missing_ok=True)  # between the two renames there is none, rather than that of other weights
    return moved


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

"""The trained weights that come with the package: which presets have them, and whether they are whole.

They are two files of package data, `weights/<preset>.safetensors` in float16 and `weights/<preset>.json`, which
`benchmarks.ship_weights` writes. Nothing here needs torch.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from moe3d_deploy import strict_json
from moe3d_deploy.errors import CheckpointError
from moe3d_deploy.files import sha256_file

FOLDER = Path(__file__).with_name("weights")
LARGEST_BYTES = 12_000_000  # of a file of weights, so that the package stays a small download
LICENCE = "Apache-2.0, trained by this project on procedural scenes, see docs/model_card.md"


@dataclass(frozen=True)
class ShippedWeights:
    """A whole file of weights and what its JSON says of it; `training` is for people and documents."""

    path: Path
    origin: str
    licence: str
    sha256: str
    training: dict[str, Any]


def weights_file(preset: str) -> Path:
    return FOLDER / f"{preset}.safetensors"


def facts_file(preset: str) -> Path:
    return FOLDER / f"{preset}.json"


def shipped_origin(preset: str) -> str:
    """What a bundle of these weights calls their origin; its digest tells one version of them from another."""
    return f"preset:{preset} trained weights"


def shipped_weights(preset: str) -> ShippedWeights | None:
    """The trained weights of a preset, their digest checked; None where the package has neither of the two files.

    Raises CheckpointError for files of which one is missing, damaged or not the other's.
    """
    weights, facts = weights_file(preset), facts_file(preset)
    if not weights.exists() and not facts.exists():
        return None
    try:
        values = strict_json.parse(facts.read_bytes())
        digest = sha256_file(weights)
    except FileNotFoundError as error:
        _refuse(preset, f"{Path(error.filename).name} is missing")
    except OSError as error:
        _refuse(preset, f"{error.filename} cannot be read, {error.strerror or error}")
    except strict_json.JsonError as error:
        _refuse(preset, f"{facts.name} {error}")
    expected = {"origin": str, "licence": str, "sha256": str, "training": dict}
    if not isinstance(values, dict) or any(type(values.get(key)) is not kind for key, kind in expected.items()):
        _refuse(preset, f"{facts.name} lacks one of {', '.join(expected)}")
    if values["sha256"] != digest:
        _refuse(preset, f"{weights.name} has another sha256 than {facts.name} says")
    return ShippedWeights(weights, **{key: values[key] for key in expected})


def _refuse(preset: str, problem: str) -> NoReturn:
    raise CheckpointError(
        f"the trained weights of {preset} in this installation are damaged ({problem}); install moe3d-deploy again, "
        f"or use seeded random weights with seed 0"
    ) from None

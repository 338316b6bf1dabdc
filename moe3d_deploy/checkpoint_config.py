"""The config.json of a checkpoint: the model's config, and what it says of the weights' licence and origin."""

from pathlib import Path
from typing import Any

from moe3d_deploy import strict_json
from moe3d_deploy.checkpoint_files import refuse_impostor
from moe3d_deploy.checkpoint_sizes import check_modest
from moe3d_deploy.config import ModelConfig
from moe3d_deploy.errors import BundleError, CheckpointError, InputError
from moe3d_deploy.manifest import Checkpoint

_NOT_SAID = "not said"


def read_config(path: Path) -> tuple[ModelConfig, dict[str, str]]:
    """The model config and the notes (`licence`, `origin`, where given) of a config.json.

    Raises CheckpointError for a file that is no strict JSON, or no config of VGGT or MoE3D.
    """
    refuse_impostor(path, "JSON")
    try:
        values = strict_json.parse(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    except strict_json.JsonError as error:
        raise CheckpointError(f"{path}: {error}; correct it, or copy or download it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected an object, got {type(values).__name__}")
    notes = {key: values.pop(key) for key in ("licence", "origin") if key in values}
    for key, note in notes.items():
        if not isinstance(note, str) or not note.isprintable() or not note.strip():
            raise CheckpointError(f"{path}: {key!r} must be one line of text, got {strict_json.show(note)}")
    try:
        Checkpoint(notes.get("origin", _NOT_SAID), None, notes.get("licence", _NOT_SAID))
    except BundleError as error:  # a bundle could not hold it
        raise CheckpointError(f"{path}: {error}, got {strict_json.show(notes['origin'])}; correct it") from error
    try:
        config = ModelConfig.from_dict(_without_hub_arguments(values))
        check_modest(config)
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return config, notes


def _without_hub_arguments(values: dict[str, Any]) -> dict[str, Any]:
    """VGGT's own config.json holds its constructor's arguments: a width, and which heads there are."""
    rest = dict(values)
    for key, supported in (("embed_dim", 1024), ("enable_camera", True), ("enable_depth", True)):
        value = rest.pop(key, supported)
        if value != supported or isinstance(value, bool) != isinstance(supported, bool):
            raise InputError(
                f"model config: {key} must be {supported}, got {strict_json.show(value)}; use VGGT-1B weights"
            )
    track = rest.pop("enable_track", False)
    if not isinstance(track, bool):
        raise InputError(f"model config: enable_track must be true or false, got {strict_json.show(track)}")
    if "enable_point" in rest:
        rest["point_head"] = rest.pop("enable_point")
    return rest

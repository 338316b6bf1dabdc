"""Checkpoints in and out: open one of any kind, build the model from it, write it as a folder.

A checkpoint folder holds `config.json` (the model config, and optionally `licence` and `origin`) and
`model.safetensors`. VGGT's own files and folders open too. Tensors go through memory one at a time.
"""

import dataclasses
import difflib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe3d_deploy.config import PRESETS, ModelConfig
from moe3d_deploy.errors import BundleError, CheckpointError, InputError
from moe3d_deploy.expert_init import convert_to_moe
from moe3d_deploy.files import atomic_path, sync
from moe3d_deploy.manifest import Checkpoint
from moe3d_deploy.model import MoE3D
from moe3d_deploy.safetensors_io import SafetensorsFile, write_safetensors
from moe3d_deploy.weight_sources import (
    SEEDED_LICENCE,
    VGGT_LICENCE,
    PickleSource,
    SafetensorsSource,
    SeededSource,
    WeightSource,
    model_shapes,
    read_pickle,
    seeded_source,
)

__all__ = [
    "SEEDED_LICENCE",
    "VGGT_LICENCE",
    "SeededSource",
    "WeightSource",
    "convert_to_moe",
    "load_model",
    "model_shapes",
    "open_checkpoint",
    "save_checkpoint",
    "seeded_source",
]

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"

_PICKLES = (".pt", ".pth", ".ckpt")
_PROBLEMS_SHOWN = 3
_POINT_HEAD = "point_head."
_NO_FILE_NAME = re.compile(r"[^A-Za-z0-9_.+-]+")  # as in a bundle's file names, which the source's name becomes part of
_NO_ORIGIN = re.compile(r"[^\w .+-]+")
_FIRST_OF_EXPERT = re.compile(r"depth_head\.experts\.\d+\.0\.weight")


def open_checkpoint(
    source: str | Path,
    *,
    seed: int = 0,
    allow_pickle: bool = False,
    config: ModelConfig | None = None,
) -> WeightSource:
    """Find the weights that `source` names and check their keys and shapes; no tensor is read yet.

    source        a preset ("moe3d-1b", "preset:moe3d-1b": seeded weights), a checkpoint folder, a .safetensors file,
                  or a .pt / .pth / .ckpt file
    seed          of a preset's weights
    allow_pickle  read a .pt file, with torch's weights_only loader
    config        for a folder or file, in place of its config.json; without either, a file is taken for VGGT-1B

    Raises CheckpointError for weights that cannot be used, InputError for arguments that contradict each other.
    """
    preset = _preset_name(source)
    if preset is not None:
        if config is not None:
            raise InputError(f"preset {preset!r} has its own config; leave out the config, or use seeded_source")
        return seeded_source(preset, PRESETS[preset], seed)
    path = Path(source)
    weights = path / WEIGHTS_FILE if path.is_dir() else path
    config_path = weights.with_name(CONFIG_FILE)
    _require_files(path, weights, config_path, config)
    notes: dict[str, str] = {}
    if config_path.is_file():
        stored_config, notes = _read_config(config_path)
        config = config or stored_config
    found = _open_weights(path, weights, config or PRESETS["vggt-1b"], notes, allow_pickle)
    check_shapes(str(path), found.shapes(), found.config)
    return found


def load_model(
    source: WeightSource,
    *,
    dtype_of: Callable[[str], torch.dtype] | None = None,
    point_head: bool | None = None,
) -> MoE3D:
    """The model with the weights of `source`, on the CPU, for inference (eval mode, no gradients).

    dtype_of    dtype of each state-dict key; default float32 for all
    point_head  False leaves VGGT's point head out, True insists on it; default: as the checkpoint has it

    Peak memory is that of the model and one tensor. Raises CheckpointError for keys or shapes that do not fit (before
    any tensor is read), and for a value that is NaN, infinite or beyond the range of its dtype.
    """
    config, shapes = source.config, source.shapes()
    if point_head and not config.point_head:
        raise CheckpointError(f"{source.name} has no point head; leave out what needs it, or use VGGT weights")
    if point_head is False:
        config = dataclasses.replace(config, point_head=False)
        shapes = {name: shape for name, shape in shapes.items() if not name.startswith(_POINT_HEAD)}
    check_shapes(source.name, shapes, config)
    with torch.device("meta"):
        model = MoE3D(config)
    for name in shapes:
        dtype = dtype_of(name) if dtype_of else torch.float32
        owner, _, leaf = name.rpartition(".")
        values = nn.Parameter(_read_finite(source, name, dtype), requires_grad=False)
        setattr(model.get_submodule(owner), leaf, values)
    return model.eval()


def save_checkpoint(
    source: WeightSource,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write `source` as a checkpoint folder, all tensors in `dtype`, one at a time.

    `progress` is told the number of values of each tensor written. The folder never holds the config of one model
    and the weights of another, even if the machine stops; an OSError (full disk) leaves what was there before.
    Raises CheckpointError for a folder that holds a checkpoint already (unless `overwrite`), and as `load_model`.
    """
    folder = Path(folder)
    config_path, weights_path = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    for path in (config_path, weights_path):
        if path.exists() and not overwrite:
            raise CheckpointError(f"{path} exists already; choose another folder or ask to overwrite it")

    def tensor_of(name: str) -> Tensor:
        tensor = _read_finite(source, name, dtype)
        if progress:
            progress(tensor.numel())
        return tensor

    folder.mkdir(parents=True, exist_ok=True)
    values = source.config.to_dict() | {"licence": source.licence, "origin": source.origin}
    with atomic_path(config_path) as config_temp:
        config_temp.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        with atomic_path(weights_path) as weights_temp:
            write_safetensors(weights_temp, source.shapes(), dtype, tensor_of)
            for path in (weights_temp, config_temp):  # a disk may say only now that it is full
                sync(path)
            config_path.unlink(missing_ok=True)  # between the two renames there is none, rather than the old one


def check_shapes(label: str, found: dict[str, tuple[int, ...]], config: ModelConfig) -> None:
    """Raise one CheckpointError about `label` that lists the first tensors that the model of `config` cannot take."""
    expected = model_shapes(config)
    unknown = [name for name in found if name not in expected]
    missing = [name for name in expected if name not in found]
    misshapen = [name for name, shape in expected.items() if found.get(name, shape) != shape]
    if not (unknown or missing or misshapen):
        return
    problems = [f"unknown {name!r}{_closest(name, missing, list(expected))}" for name in unknown[:_PROBLEMS_SHOWN]]
    problems += [f"missing {name!r} {expected[name]}" for name in missing[:_PROBLEMS_SHOWN]]
    problems += [f"{name!r} is {found[name]}, expected {expected[name]}" for name in misshapen[:_PROBLEMS_SHOWN]]
    listed = "; ".join(problems[:_PROBLEMS_SHOWN])
    others = len(unknown) + len(missing) + len(misshapen) - _PROBLEMS_SHOWN
    more = f"; and {others} more" if others > 0 else ""
    raise CheckpointError(f"{label}: weights do not fit the config: {listed}{more}. {_remedy(found, config)}")


def _closest(name: str, missing: list[str], expected: list[str]) -> str:
    for known in (missing, expected):
        if matches := difflib.get_close_matches(name, known, n=1, cutoff=0.8):
            return f" (closest known: {matches[0]!r})"
    return ""


def _remedy(found: dict[str, tuple[int, ...]], config: ModelConfig) -> str:
    held = sum(1 for name in found if _FIRST_OF_EXPERT.fullmatch(name))
    wanted = config.moe.num_experts if config.moe else 0
    if held == wanted:
        return f"Check the {CONFIG_FILE} beside the weights, or name weights of this architecture"
    if not held:
        return f'The weights hold no experts: set "moe" to null in {CONFIG_FILE}, then add them with moe3d convert'
    if not wanted:
        return f"The weights hold {held} experts, the config none: put their {CONFIG_FILE} beside them"
    return f"The weights hold {held} experts, the config says {wanted}: set moe.num_experts in {CONFIG_FILE}"


def _read_finite(source: WeightSource, name: str, dtype: torch.dtype) -> Tensor:
    """Tensor `name` in `dtype`; raises CheckpointError if a value is NaN, infinite or would become so."""
    tensor = source.tensor(name)
    low, high = (bound.item() for bound in tensor.aminmax())  # both are NaN if any value is
    if not -float("inf") < low <= high < float("inf"):
        raise CheckpointError(f"{source.name}: tensor {name!r} holds NaN or infinite values; use undamaged weights")
    if max(-low, high) > torch.finfo(dtype).max:
        largest = max(-low, high)
        raise CheckpointError(f"{source.name}: {name!r} reaches {largest:.3g}, too large for {dtype}; use float32")
    return tensor.to(dtype)


def _preset_name(source: str | Path) -> str | None:
    if isinstance(source, Path):
        return None
    name = source.removeprefix("preset:")
    if name not in PRESETS:
        if name != source:
            raise CheckpointError(f"preset {name!r} is unknown; presets are {', '.join(PRESETS)}")
        return None
    if name == source and (Path(source) / CONFIG_FILE).is_file():
        raise CheckpointError(f"{source!r} is a preset and a folder here; write preset:{source} or ./{source}")
    return name


def _require_files(path: Path, weights: Path, config_path: Path, config: ModelConfig | None) -> None:
    if not path.exists():
        close = difflib.get_close_matches(str(path), PRESETS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise CheckpointError(f"{path}: no such file or folder, nor a preset ({', '.join(PRESETS)}){hint}")
    if not weights.is_file():
        raise CheckpointError(f"{path}: holds no {WEIGHTS_FILE}; name a checkpoint folder or the weights file itself")
    if path.is_dir() and config is None and not config_path.is_file():
        raise CheckpointError(f"{path}: holds no {CONFIG_FILE}; for VGGT-1B weights name {weights} itself")


def _open_weights(
    path: Path, weights: Path, config: ModelConfig, notes: dict[str, str], allow_pickle: bool
) -> WeightSource:
    """`path` is what was named, `weights` the file that holds the tensors."""
    place = Path(os.path.abspath(path))  # links stay: the Hugging Face cache links to files named by digest
    name = place.name if path.is_dir() else place.stem
    if name == "model":
        name = place.parent.name or name
    name = _NO_FILE_NAME.sub("-", name).lstrip("-.+") or "model"
    origin = notes.get("origin", _NO_ORIGIN.sub("-", place.name) or name)
    licence = notes.get("licence", VGGT_LICENCE)
    if weights.suffix == ".safetensors":
        return SafetensorsSource(config, name, origin, licence, SafetensorsFile(weights))
    if weights.suffix not in _PICKLES:
        raise CheckpointError(f"{path}: unknown kind of file; use .safetensors, a checkpoint folder or a preset")
    if not allow_pickle:
        raise CheckpointError(
            f"{path}: a pickle can run code when it is read; use {WEIGHTS_FILE}, or --allow-pickle if you must"
        )
    return PickleSource(config, name, origin, licence, weights, read_pickle(weights))


def _read_config(path: Path) -> tuple[ModelConfig, dict[str, str]]:
    """The model config and the notes (`licence`, `origin`) of a config.json."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON ({error}); copy or download it again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected an object, got {type(values).__name__}")
    notes = {key: values.pop(key) for key in ("licence", "origin") if key in values}
    for key, note in notes.items():
        if not isinstance(note, str) or not note.isprintable() or not note.strip():
            raise CheckpointError(f"{path}: {key!r} must be one line of text, got {note!r}")
    try:
        Checkpoint(notes.get("origin", "not said"), None, notes.get("licence", VGGT_LICENCE))
    except BundleError as error:  # a bundle could not hold it
        raise CheckpointError(f"{path}: {error}, got {notes['origin']!r}; correct it") from error
    try:
        return ModelConfig.from_dict(_without_hub_arguments(values)), notes
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from error


def _without_hub_arguments(values: dict[str, Any]) -> dict[str, Any]:
    """VGGT's own config.json holds its constructor's arguments: a width, and which heads there are."""
    rest = dict(values)
    for key, supported in (("embed_dim", 1024), ("enable_camera", True), ("enable_depth", True)):
        value = rest.pop(key, supported)
        if value != supported:
            raise InputError(f"model config: {key} must be {supported}, got {value!r}; use VGGT-1B weights")
    rest.pop("enable_track", None)
    if "enable_point" in rest:
        rest["point_head"] = rest.pop("enable_point")
    return rest

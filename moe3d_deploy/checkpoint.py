"""Checkpoints in and out: open one of any kind, build the model from it, write it as a folder.

A checkpoint folder holds `config.json` (the model config, and optionally `licence` and `origin`) and
`model.safetensors`, or the index of its shards. VGGT's own files and folders open too, as do weights without a config.
Tensors go through memory one at a time. docs/checkpoints.md says what is accepted.
"""

import dataclasses
import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from moe3d_deploy.checkpoint_config import read_config
from moe3d_deploy.checkpoint_files import (
    CONFIG_FILE,
    INDEX_FILE,
    SHOWN,
    WEIGHTS_FILE,
    Place,
    find_weights,
    refuse_impostor,
)
from moe3d_deploy.checkpoint_keys import check_shapes, common_prefix
from moe3d_deploy.checkpoint_pickle import PickleFile
from moe3d_deploy.checkpoint_shards import ShardedFile
from moe3d_deploy.checkpoint_sizes import infer_config
from moe3d_deploy.config import PRESETS, ModelConfig
from moe3d_deploy.errors import CheckpointError, InputError, Moe3dWarning
from moe3d_deploy.expert_init import convert_to_moe
from moe3d_deploy.files import atomic_path, exclusive_lock, sync
from moe3d_deploy.model import MoE3D
from moe3d_deploy.safetensors_io import SafetensorsFile, write_safetensors
from moe3d_deploy.shipped_weights import ShippedWeights, shipped_weights
from moe3d_deploy.weight_sources import (
    SEEDED_LICENCE,
    VGGT_LICENCE,
    SeededSource,
    StoredSource,
    TensorFile,
    WeightSource,
    model_part,
    model_shapes,
    seeded_source,
)

__all__ = [
    "CONFIG_FILE",
    "SEEDED_LICENCE",
    "VGGT_LICENCE",
    "WEIGHTS_FILE",
    "SeededSource",
    "WeightSource",
    "check_shapes",
    "convert_to_moe",
    "load_model",
    "model_shapes",
    "open_checkpoint",
    "save_checkpoint",
    "seeded_source",
]

_POINT_HEAD = "point_head."
_LOCK_FILE = ".checkpoint.lock"
_CONFIG_PARTIAL = re.compile(r"\.config\.partial-[0-9a-f]{8}\.json")
_PARTIAL = re.compile(rf"{_CONFIG_PARTIAL.pattern}|\.model\.partial-[0-9a-f]{{8}}\.safetensors")


def open_checkpoint(
    source: str | Path,
    *,
    seed: int | None = None,
    allow_pickle: bool = False,
    config: ModelConfig | None = None,
) -> WeightSource:
    """Find the weights that `source` names and check their keys and shapes; no tensor is read yet.

    source        a preset ("moe3d-1b", "preset:moe3d-1b"), a checkpoint folder, a .safetensors file,
                  a .safetensors.index.json, or a .pt / .pth / .ckpt / .bin file
    seed          of a preset: its seeded random weights; None: the trained ones that come with the package, where it
                  has them, else those of seed 0
    allow_pickle  read a .pt file, with torch's weights_only loader
    config        for a folder or file, in place of its config.json; without either, the tensors' shapes tell the sizes
                  and a preset the rest, which a Moe3dWarning names

    Raises CheckpointError for weights that cannot be used, InputError for arguments that contradict each other.
    """
    preset = preset_name(source)
    if preset is not None:
        if config is not None:
            raise InputError(f"preset {preset!r} has its own config; leave out the config, or use seeded_source")
        if seed is None and (shipped := shipped_weights(preset)):
            return _shipped_source(preset, shipped)
        return seeded_source(preset, PRESETS[preset], seed or 0)
    path = Path(source)
    place = find_weights(path)
    notes: dict[str, str] = {}
    if os.path.lexists(place.config):  # a link to nowhere is no config that is left out
        stored_config, notes = read_config(place.config)
        config = config or stored_config
    elif left := [entry.name for entry in place.config.parent.iterdir() if _CONFIG_PARTIAL.fullmatch(entry.name)]:
        raise CheckpointError(
            f"{path}: its writer was killed just before its {CONFIG_FILE} had its name; rename {left[0]} to it"
        )
    file = _open_file(place, allow_pickle)
    prefix = common_prefix(file.shapes())
    shapes = model_part(file.shapes(), prefix)
    assumption = None
    if config is None:
        config, assumption = infer_config(str(path), shapes)
    check_shapes(str(path), shapes, config)
    if assumption:
        warnings.warn(assumption, Moe3dWarning, stacklevel=2)
    return StoredSource(
        config=config,
        name=place.name,
        origin=notes.get("origin", place.origin),
        licence=notes.get("licence", VGGT_LICENCE),
        file=file,
        prefix=prefix,
    )


def load_model(
    source: WeightSource,
    *,
    dtype_of: Callable[[str], torch.dtype] = lambda name: torch.float32,
    point_head: bool | None = None,
) -> MoE3D:
    """The model with the weights of `source`, on the CPU, for inference (eval mode, no gradients).

    dtype_of    dtype of each state-dict key; default float32 for all
    point_head  False leaves VGGT's point head out, True insists on it; default: as the checkpoint has it

    Peak memory is that of the model and one tensor. Raises CheckpointError for keys or shapes that do not fit (before
    any tensor is read), and for values that are NaN, infinite or beyond the range of their dtype: then the tensors
    after the first bad one are looked at too, so that the error can list the first few.
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
        owner, _, leaf = name.rpartition(".")
        values = nn.Parameter(_read_finite(source, name, dtype_of, shapes), requires_grad=False)
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
    Raises CheckpointError for a folder that holds a checkpoint already (unless `overwrite`), or shards (always), or
    that another process writes to, and as `load_model`.
    """
    folder = Path(folder)
    config_path, weights_path = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    shapes = source.shapes()

    def tensor_of(name: str) -> Tensor:
        tensor = _read_finite(source, name, lambda _: dtype, shapes)
        if progress:
            progress(tensor.numel())
        return tensor

    with _sole_writer(folder):
        for path in (config_path, weights_path):
            if path.exists() and not overwrite:
                raise CheckpointError(f"{path} exists already; choose another folder or ask to overwrite it")
        if (folder / INDEX_FILE).exists():
            raise CheckpointError(f"{folder} holds weights in shards, which are not overwritten; choose another folder")
        values = source.config.to_dict() | {"licence": source.licence, "origin": source.origin}
        with atomic_path(config_path) as config_temp:
            config_temp.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            with atomic_path(weights_path) as weights_temp:
                write_safetensors(weights_temp, shapes, dtype, tensor_of)
                for path in (weights_temp, config_temp):  # a disk may say only now that it is full
                    sync(path)
                config_path.unlink(missing_ok=True)  # between the two renames there is none, rather than the old one


@contextmanager
def _sole_writer(folder: Path) -> Iterator[None]:
    """Make `folder` and hold its lock; clear what a killed writer left, and leave no empty folder after a failure."""
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file; name the folder to write")
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    busy = CheckpointError(f"{folder} is being written by another process; wait until it has ended")
    try:
        with exclusive_lock(folder / _LOCK_FILE, busy):
            for entry in folder.iterdir():
                if _PARTIAL.fullmatch(entry.name):
                    entry.unlink()
            yield
    except BaseException:
        if is_new and not any(folder.iterdir()):
            folder.rmdir()
        raise


def _shipped_source(preset: str, shipped: ShippedWeights) -> StoredSource:
    file = SafetensorsFile(shipped.path)
    check_shapes(str(shipped.path), file.shapes(), PRESETS[preset])
    return StoredSource(PRESETS[preset], preset, shipped.origin, shipped.licence, file)


def _open_file(place: Place, allow_pickle: bool) -> TensorFile:
    if place.kind == "index":
        return ShardedFile(place.weights)
    refuse_impostor(place.weights, place.kind)
    if place.kind == "safetensors":
        return SafetensorsFile(place.weights)
    if not allow_pickle:
        raise CheckpointError(
            f"{place.weights}: a pickle can run code when it is read; use {WEIGHTS_FILE}, or if you must: "
            f"moe3d convert {place.weights} --allow-pickle -o FOLDER"
        )
    return PickleFile(place.weights)


def _read_finite(
    source: WeightSource, name: str, dtype_of: Callable[[str], torch.dtype], names: Iterable[str]
) -> Tensor:
    """Tensor `name` in its dtype; raises CheckpointError if a value is NaN, infinite or would become so.

    The error also names the next of `names`, in their order, whose tensors are as bad.
    """
    tensor = source.tensor(name)
    fault = _fault(tensor, dtype_of(name))
    if fault is None:
        return tensor.to(dtype_of(name))
    faults = {name: fault}
    del tensor
    later = list(names)
    for other in later[later.index(name) + 1 :]:
        if fault := _fault(source.tensor(other), dtype_of(other)):
            faults[other] = fault
        if len(faults) > SHOWN:
            break
    listed = "; ".join(f"tensor {key!r} {fault}" for key, fault in list(faults.items())[:SHOWN])
    more = "; and more" if len(faults) > SHOWN else ""
    # What float32 cannot hold is no weight either, whatever type it is stored in.
    damaged = any(fault == _NOT_FINITE or dtype_of(key) is torch.float32 for key, fault in faults.items())
    remedy = "use undamaged weights" if damaged else "use float32"
    raise CheckpointError(f"{source.name}: {listed}{more}; {remedy}")


_NOT_FINITE = "holds NaN or infinite values"


def _fault(tensor: Tensor, dtype: torch.dtype) -> str | None:
    low, high = (bound.item() for bound in tensor.aminmax())  # both are NaN if any value is
    if not -float("inf") < low <= high < float("inf"):
        return _NOT_FINITE
    largest = max(-low, high)
    return f"reaches {largest:.3g}, too large for {dtype}" if largest > torch.finfo(dtype).max else None


def preset_name(source: str | Path) -> str | None:
    """The preset that a source names, with or without "preset:"; None for a path. Raises CheckpointError."""
    if isinstance(source, Path):
        return None
    name = source.removeprefix("preset:")
    if name not in PRESETS:
        if name != source:
            raise CheckpointError(f"preset {name!r} is unknown; presets are {', '.join(PRESETS)}")
        return None
    if name == source and any((Path(source) / held).is_file() for held in (CONFIG_FILE, WEIGHTS_FILE, INDEX_FILE)):
        raise CheckpointError(f"{source!r} is a preset and a folder here; write preset:{source} or ./{source}")
    return name

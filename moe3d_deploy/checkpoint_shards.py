"""Weights in several safetensors files: Hugging Face's `model.safetensors.index.json` and the shards it names.

The index and its shards must agree entirely, since a tensor that comes from another place than the index says would
go unnoticed. A shard is named by a plain file name and lies in the folder of the index. It may be a link inside that
folder, or one into the `blobs` of the Hugging Face cache, whose snapshots hold links only.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moe3d_deploy import strict_json
from moe3d_deploy.checkpoint_files import first_few, refuse_impostor
from moe3d_deploy.errors import CheckpointError
from moe3d_deploy.safetensors_io import SafetensorsFile

_LONGEST_NAME = 255  # bytes of a file name, on every common file system


class ShardedFile:
    """A checked set of shards, read as if it were one file."""

    def __init__(self, index: Path) -> None:
        """Read the index and the header of every shard. Raises CheckpointError where they are damaged or disagree."""
        self.path = index
        try:
            weight_map, total = read_index(index)
        except strict_json.JsonError as error:
            raise CheckpointError(f"{index}: {error}; copy or download it again") from error
        names = sorted(set(weight_map.values()))
        _require_shards(index, names)
        self._shards: dict[str, SafetensorsFile] = {}
        for name in names:
            refuse_impostor(index.with_name(name), "safetensors")
            self._shards[name] = SafetensorsFile(index.with_name(name))
        if problems := disagreements(weight_map, {name: shard.shapes() for name, shard in self._shards.items()}):
            raise CheckpointError(
                f"{index}: the index and its shards disagree: {first_few(problems)}; download all of them again"
            )
        self._shard_of = {tensor: shard for shard in self._shards.values() for tensor in shard.tensors}
        held = sum(shard.tensors[tensor].size for tensor, shard in self._shard_of.items())
        if total is not None and total != held:
            raise CheckpointError(
                f"{index}: says total_size {total}, its shards hold {held} bytes of tensors; download all of them again"
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor, shard by shard in the order of their names."""
        return {name: shard.tensors[name].shape for name, shard in self._shard_of.items()}

    def read(self, name: str) -> Tensor:
        """Tensor `name` in its stored dtype, in memory of its own."""
        return self._shard_of[name].read(name)

    def sha256(self) -> str:
        """Of the lines `<sha256>  <shard>` in the order of the names, as the sha256sum command writes them."""
        lines = "".join(f"{shard.sha256()}  {name}\n" for name, shard in self._shards.items())
        return hashlib.sha256(lines.encode("utf-8")).hexdigest()


def read_index(path: Path) -> tuple[dict[str, str], int | None]:
    """The `weight_map` of an index, tensor -> shard, and its `total_size` in bytes (None where it has none).

    Raises JsonError for a file that is no index, CheckpointError for one that cannot be read.
    """
    refuse_impostor(path, "JSON")
    try:
        values = strict_json.parse(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error}); check the path") from error
    weight_map = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise strict_json.JsonError("is no index of shards: it has no object weight_map with a file for each tensor")
    for tensor, name in weight_map.items():
        if not is_plain_name(name):
            raise strict_json.JsonError(
                f"has {strict_json.show(tensor)} in {strict_json.show(name)}, which is no plain name of a .safetensors "
                f"file beside it"
            )
    metadata = values.get("metadata", {})
    total = metadata.get("total_size") if isinstance(metadata, dict) else metadata
    if total is not None and not _is_count(total):
        raise strict_json.JsonError(f"has the total_size {strict_json.show(total)}, expected a number of bytes")
    return weight_map, None if total is None else int(total)


def is_plain_name(name: Any) -> bool:
    """Whether `name` names a .safetensors file in whatever folder it is looked up in, and nowhere else."""
    return (
        isinstance(name, str)
        and name.endswith(".safetensors")
        and name.isprintable()
        and not any(character in name for character in "/\\:")
        and len(name.encode("utf-8")) <= _LONGEST_NAME
    )


def disagreements(weight_map: Mapping[str, str], held: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is wrong with an index, a line for each tensor; `held` are the tensors of each shard, by its name."""
    places: dict[str, list[str]] = {}
    for shard, tensors in held.items():
        for tensor in tensors:
            places.setdefault(tensor, []).append(shard)
    problems = []
    for tensor, shards in places.items():
        if len(shards) > 1:
            problems.append(f"{strict_json.show(tensor)} is in {shards[0]} and in {shards[1]}")
        elif tensor not in weight_map:
            problems.append(f"{strict_json.show(tensor)} in {shards[0]} is not in the index")
    for tensor, shard in weight_map.items():
        if shard not in places.get(tensor, ()):
            elsewhere = f", {places[tensor][0]} has it" if tensor in places else ""
            problems.append(f"{shard} lacks {strict_json.show(tensor)}{elsewhere}")
    return problems


def _is_count(value: Any) -> bool:
    """Some writers store the sum of bytes as a float."""
    return type(value) is int and value >= 0 or type(value) is float and value >= 0 and value.is_integer()


def _require_shards(index: Path, names: list[str]) -> None:
    folder = index.parent.resolve()
    allowed = [folder, *(above.parent / "blobs" for above in folder.parents if above.name == "snapshots")]
    missing = [name for name in names if not index.with_name(name).is_file()]
    if missing:
        raise CheckpointError(
            f"{index}: {len(missing)} of its {len(names)} shards not there: {first_few(missing)}; download into the "
            f"same folder"
        )
    for name in names:
        target = index.with_name(name).resolve()
        if not any(target.is_relative_to(place) for place in allowed):
            raise CheckpointError(
                f"{index}: its shard {name} is a link out of the folder, to {target}; put the file itself there"
            )

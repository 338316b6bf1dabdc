"""Rendered scenes, kept in a folder: one file per scene, so that each is rendered once and any number of runs share it.

What comes back is equal to the bit with a folder, without one, and whether or not a file was there.
"""

import dataclasses
import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from moe3d_deploy.disk_errors import FULL
from moe3d_deploy.files import atomic_write
from moe3d_deploy.training.scenes import GENERATOR_VERSION, SceneOptions, render_scene

_CHECKSUM = "crc32"

# A process counts the folder's bytes again when it has added this share of the room that it found: so 64 of them do not
# overfill it together, and the counting stays a small part of the work.
_SHARE = 1 / 64
_BLIND = 256  # scenes that a process does not try to keep once the folder is full


class StoredScene(NamedTuple):
    """What training needs of a scene, on the CPU.

    images (S, 3, H, W) uint8; depth (S, H, W) float32, 0 where nothing was hit; extrinsics (S, 3, 4), intrinsics
    (S, 3, 3) float32.
    """

    images: Tensor
    depth: Tensor
    extrinsics: Tensor
    intrinsics: Tensor


@dataclass(frozen=True)
class SceneStore:
    """Scenes of one kind (`options`) by their seed.

    folder       where files are kept, in a sub-folder by what the scenes depend on; None: every scene is rendered anew
    limit_bytes  the folder's files are not let grow beyond this; scenes beyond it are rendered anew each time
    """

    options: SceneOptions
    folder: Path | None = None
    limit_bytes: int = 20_000_000_000
    room: "_Room" = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "room", _Room(self.limit_bytes))

    def get(self, seed: int) -> tuple[StoredScene, list[str]]:
        """The scene of `seed`, and what a person should know: a file that was damaged, a full disk, a full cache.

        Raises OSError where the folder cannot be used at all.
        """
        if self.folder is None:
            return self._rendered(seed), []
        notes: list[str] = []
        path = self.path(seed)
        try:
            return _parse(path.read_bytes(), self.options), notes
        except FileNotFoundError:
            pass
        except (SafetensorError, ValueError) as error:
            notes.append(f"{path}: damaged ({error}); rendered again")
        scene = self._rendered(seed)
        data = _serialise(scene)
        if not self.room.take(self.folder, len(data)):
            limit = f"{self.limit_bytes / 1e9:g} GB"
            return scene, [*notes, f"scene cache {self.folder} is full ({limit}); further scenes are not kept"]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, data)
        except OSError as error:
            if error.errno not in FULL:
                raise
            notes.append(f"scene cache {self.folder}: {error.strerror}; scenes are not kept until there is room")
        return scene, notes

    def path(self, seed: int) -> Path:
        """The file of a scene. Raises ValueError without a folder."""
        if self.folder is None:
            raise ValueError("this store keeps no files")
        values = json.dumps(dataclasses.asdict(self.options), sort_keys=True)
        digest = hashlib.sha256(values.encode()).hexdigest()[:12]
        o = self.options
        kind = f"v{GENERATOR_VERSION}-{o.split}-{o.views}x{o.height}x{o.width}-{digest}"
        return self.folder / kind / f"{seed:08d}.safetensors"

    def _rendered(self, seed: int) -> StoredScene:
        scene = render_scene(seed, self.options, device="cpu")
        return StoredScene(scene.images, scene.depth, scene.extrinsics, scene.intrinsics)


def _serialise(scene: StoredScene) -> bytes:
    tensors = {name: tensor.contiguous() for name, tensor in scene._asdict().items()}
    return safetensors.torch.save(tensors | {_CHECKSUM: torch.tensor([_checksum(tensors)])})


def _parse(data: bytes, options: SceneOptions) -> StoredScene:
    """Raises SafetensorError, or ValueError that says what is wrong."""
    tensors = safetensors.torch.load(data)
    views, height, width = options.views, options.height, options.width
    expected = {
        "images": (torch.uint8, (views, 3, height, width)),
        "depth": (torch.float32, (views, height, width)),
        "extrinsics": (torch.float32, (views, 3, 4)),
        "intrinsics": (torch.float32, (views, 3, 3)),
        _CHECKSUM: (torch.int64, (1,)),
    }
    found = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    if found != expected:
        raise ValueError("other tensors than a scene's")
    stored = int(tensors.pop(_CHECKSUM))
    if stored != _checksum(tensors):
        raise ValueError("wrong checksum")
    return StoredScene(**tensors)


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    total = 0
    for name in StoredScene._fields:
        total = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, total)
    return total


class _Room:
    """What may still be written below a folder, without a look at all of its files each time."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._found = self._added = self._blind = 0

    def take(self, folder: Path, size: int) -> bool:
        """Whether a file of `size` bytes has room; it is then counted."""
        if self._blind:
            self._blind -= 1
            return False
        if self._added + size > _SHARE * self._found:
            self._found, self._added = self._limit - _bytes_below(folder), 0
            if size > self._found:
                self._blind = _BLIND
                return False
        self._added += size
        return True


def _bytes_below(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    total = 0
    for path in folder.rglob("*.safetensors"):
        try:
            total += path.stat().st_size
        except FileNotFoundError:  # another process has just renamed it
            continue
    return total

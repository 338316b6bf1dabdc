"""The frozen backbone's features of the samples of a run that repeat, computed once: in memory or on disk.

A sample's features are computed alone, whatever the batch, and kept as they are: a run gives equal bits whether they
come from memory, from disk or from the backbone.
"""

import hashlib
import json
import math
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from moe3d_deploy.config import ModelConfig
from moe3d_deploy.errors import InputError
from moe3d_deploy.files import atomic_write
from moe3d_deploy.machine import available_memory_bytes, free_disk_bytes
from moe3d_deploy.model import MoE3D
from moe3d_deploy.training.data import Batch
from moe3d_deploy.training.forward import frozen_levels
from moe3d_deploy.training.options import TrainOptions
from moe3d_deploy.training.scenes import GENERATOR_VERSION

_SHARE = 0.5  # of the free memory or disk that "auto" takes


@dataclass
class FeatureCache:
    """Features by sample. `place` is "memory", "disk" or "none"; `most_bytes` what all samples need at most."""

    place: str
    most_bytes: int
    folder: Path
    held: dict[int, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def choose(cls, options: TrainOptions, config: ModelConfig, digest: str, folder: Path) -> "FeatureCache":
        """Decide where the features go: as `options.feature_cache` says; "auto" takes the first place they fit in.

        digest  of the weights; the features of other weights, samples or precisions lie elsewhere in `folder`

        Raises InputError for "memory" or "disk" where they do not fit, OSError.
        """
        most = most_bytes(options, config)
        key = {"weights": digest, "generator": GENERATOR_VERSION, **_what_samples_depend_on(options)}
        own = folder / hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        asked = options.feature_cache
        if asked == "off":
            return cls("none", most, own)
        kept = sum(file.stat().st_size for file in own.glob("*.safetensors"))  # by this run, before it was stopped
        room = {"memory": available_memory_bytes(), "disk": free_disk_bytes(folder.parent) + kept}
        for place in ("memory", "disk"):
            if asked == place and most > room[place]:
                raise InputError(
                    f"feature cache: up to {most / 1e9:.1f} GB do not fit in {room[place] / 1e9:.1f} GB of {place}; "
                    "use fewer scenes, or --feature-cache auto or off"
                )
        fitting = [place for place in ("memory", "disk") if most <= _SHARE * room[place]]
        return cls(asked if asked != "auto" else (fitting + ["none"])[0], most, own)

    def describe(self) -> str:
        size = f"up to {self.most_bytes / 1e9:.2g} GB"
        if self.place == "none":
            return f"computed at every step (all of them: {size})"
        return f"computed once, kept {'in memory' if self.place == 'memory' else f'in {self.folder}'}, {size}"

    def levels(self, model: MoE3D, batch: Batch) -> list[Tensor]:
        """The features of a batch, (B, S, P, D) for each of four levels. Raises OSError for a full disk."""
        of_samples = [self._sample(model, batch, i) for i in range(batch.images.shape[0])]
        device = batch.images.device  # of those computed now; those that were kept lie on the CPU
        return [torch.cat([part.to(device) for part in parts]) for parts in zip(*of_samples, strict=True)]

    def remove(self) -> None:
        """Delete what is on disk."""
        shutil.rmtree(self.folder.parent, ignore_errors=True)

    def _sample(self, model: MoE3D, batch: Batch, index: int) -> list[Tensor]:
        number = batch.plans[index].original
        found = self.held.get(number) if self.place == "memory" else self._read(number)
        if found is None:
            found = frozen_levels(model, batch.images[index : index + 1])
            if self.place == "memory":
                self.held[number] = [level.cpu() for level in found]
            elif self.place == "disk":
                self._write(number, found)
        return found

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:08d}.safetensors"

    def _read(self, number: int) -> list[Tensor] | None:
        """None where there is no file, or a damaged one: it is written again."""
        if self.place != "disk":
            return None
        try:
            data = self._path(number).read_bytes()
            tensors = safetensors.torch.load(data[32:])
        except (FileNotFoundError, SafetensorError):
            return None
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            return None
        return [tensors[str(i)] for i in range(len(tensors))]

    def _write(self, number: int, levels: list[Tensor]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        data = safetensors.torch.save({str(i): level.cpu().contiguous() for i, level in enumerate(levels)})
        atomic_write(self._path(number), hashlib.sha256(data).digest() + data)


def most_bytes(options: TrainOptions, config: ModelConfig) -> int:
    """What the features of all samples that repeat need, if each had the most views of the largest shape."""
    samples = math.ceil(options.scene_count / options.batch) * options.batch
    patches = max(height * width for height, width in options.shapes) // config.patch_size**2
    per_view = 4 * patches * config.token_dim * torch.float32.itemsize
    return samples * options.views[1] * per_view


def _what_samples_depend_on(options: TrainOptions) -> dict[str, object]:
    names = ("seed", "batch", "shapes", "views", "scenes", "scene_views", "photographs", "camera_effects", "mirror",
             "jitter", "amp")  # fmt: skip
    values = options.to_dict()
    return {name: values[name] for name in names}

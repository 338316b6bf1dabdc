"""Where weights come from: a seed, a safetensors file or a pickle.

Every source hands out one tensor at a time; none checks its tensors against a model (`checkpoint` does).
"""

import functools
import hashlib
import pickle
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moe3d_deploy.config import PRESETS, ModelConfig
from moe3d_deploy.errors import CheckpointError, Moe3dWarning
from moe3d_deploy.files import sha256_file
from moe3d_deploy.model import MoE3D
from moe3d_deploy.safetensors_io import SafetensorsFile
from moe3d_deploy.seeded import GENERATOR_VERSION, seed_salt, seeded_tensor

VGGT_LICENCE = (
    "VGGT weights: Meta's VGGT licence (facebook/VGGT-1B is non-commercial, VGGT-1B-Commercial has its own terms)"
)
SEEDED_LICENCE = "seeded random weights, no licence"

TRACK_HEAD = "track_head."  # VGGT's point tracker: 394 tensors that no model here has
_SAFE_TORCH = (2, 10)  # earlier releases had ways around weights_only


@dataclass(frozen=True, eq=False)
class WeightSource(ABC):
    """Named tensors and what is known about them.

    name      short, fit for a file name: "moe3d-1b"
    origin    where the weights come from, never an absolute path: "preset:moe3d-1b seed 0", "VGGT-1B"
    licence   one line
    """

    config: ModelConfig
    name: str
    origin: str
    licence: str

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by state-dict key, in storage order, without VGGT's track head."""

    @abstractmethod
    def tensor(self, name: str) -> Tensor:
        """One tensor on the CPU in its stored dtype; the caller may keep and change it."""

    @abstractmethod
    def sha256(self) -> str:
        """64 hex digits: of the file, or of a text that determines every bit of generated weights."""


# Seeded cameras stay near the identity with a field of view near 1 rad. The generator alone, on which the golden files
# rest, may give a small model a negative field of view, so an infinite focal length.
_POSE_UPDATE = "camera_head.pose_branch.fc2.weight"
_POSE_UPDATE_SCALE = 0.1


@functools.lru_cache(maxsize=16)
def _model_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in MoE3D(config).state_dict().items()}


def model_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the model, by state-dict key, in its order."""
    return dict(_model_shapes(config))


@dataclass(frozen=True, eq=False)
class SeededSource(WeightSource):
    """Generated weights for any config; `seeded_source` fills in the rest."""

    seed: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return model_shapes(self.config)

    def tensor(self, name: str) -> Tensor:
        tensor = torch.from_numpy(seeded_tensor(name, self.shapes()[name], self.seed))
        return tensor * _POSE_UPDATE_SCALE if name == _POSE_UPDATE else tensor

    def sha256(self) -> str:
        config = "" if _is_preset(self.name, self.config) else f" {self.config}"
        return sha256_text(f"preset {self.name}{config} seed {self.seed} generator v{GENERATOR_VERSION}")


def seeded_source(name: str, config: ModelConfig, seed: int = 0) -> SeededSource:
    """Seeded weights for `config`, called `name`. Raises InputError for a negative seed."""
    seed_salt(seed)
    kind = "preset" if _is_preset(name, config) else "seeded"
    return SeededSource(config, name, f"{kind}:{name} seed {seed}", SEEDED_LICENCE, seed)


def _is_preset(name: str, config: ModelConfig) -> bool:
    return PRESETS.get(name) == config


@dataclass(frozen=True, eq=False)
class SafetensorsSource(WeightSource):
    file: SafetensorsFile

    def shapes(self) -> dict[str, tuple[int, ...]]:
        stored = self.file.tensors.items()
        return {name: entry.shape for name, entry in stored if not name.startswith(TRACK_HEAD)}

    def tensor(self, name: str) -> Tensor:
        return self.file.read(name)

    def sha256(self) -> str:
        return sha256_file(self.file.path)


@dataclass(frozen=True, eq=False)
class PickleSource(WeightSource):
    path: Path
    tensors: dict[str, Tensor]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        stored = self.tensors.items()
        return {name: tuple(tensor.shape) for name, tensor in stored if not name.startswith(TRACK_HEAD)}

    def tensor(self, name: str) -> Tensor:
        return self.tensors[name].detach().clone(memory_format=torch.contiguous_format)

    def sha256(self) -> str:
        return sha256_file(self.path)


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The state dict of a .pt file, mapped into memory; never runs code of the file (weights_only).

    Accepts the dict itself or one under "model" or "state_dict". Warns (Moe3dWarning) that pickles are second choice.
    Raises CheckpointError for anything else.
    """
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < _SAFE_TORCH:
        raise CheckpointError(f"{path}: reading a pickle needs torch 2.10 or newer, this is {torch.__version__}")
    warnings.warn(f"{path} is a pickle; prefer model.safetensors where there is one", Moe3dWarning, stacklevel=3)
    try:
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: damaged, or holds more than tensors, which could run code; it was not loaded, use safetensors"
        ) from error
    except Exception as error:  # a damaged pickle can make the loader raise anything
        reason = str(error).split("\n", 1)[0]
        raise CheckpointError(
            f"{path}: not a readable .pt file ({reason}); save it again or use safetensors"
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(values, dict) and isinstance(values.get(key), dict):
            values = values[key]
    if not isinstance(values, dict) or not all(
        isinstance(key, str)
        and isinstance(value, Tensor)
        and value.is_floating_point()
        and value.layout is torch.strided
        for key, value in values.items()
    ):
        raise CheckpointError(f'{path}: holds no state dict of float tensors, nor one under "model" or "state_dict"')
    return values


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()

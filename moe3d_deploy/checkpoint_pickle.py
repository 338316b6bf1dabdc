"""State dicts in pickles (.pt, .pth, .ckpt, .bin), read without running their code, and only on request."""

import pickle
import warnings
from pathlib import Path

import torch
from torch import Tensor

from moe3d_deploy.errors import CheckpointError, Moe3dWarning, first_line
from moe3d_deploy.files import sha256_file
from moe3d_deploy.safetensors_io import WEIGHT_DTYPES

_SAFE_TORCH = (2, 10)  # earlier releases had ways around weights_only


class PickleFile:
    """The tensors of a .pt file, mapped into memory."""

    def __init__(self, path: Path) -> None:
        """Raises CheckpointError as `read_pickle`."""
        self.path = path
        self._tensors = read_pickle(path)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        """Tensor `name` in its stored dtype, in memory of its own."""
        return self._tensors[name].detach().clone(memory_format=torch.contiguous_format)

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
        raise CheckpointError(
            f"{path}: not a readable .pt file ({first_line(error)}); save it again or use safetensors"
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(values, dict) and isinstance(values.get(key), dict):
            values = values[key]
    if not isinstance(values, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) and _is_plain(value) for key, value in values.items()
    ):
        raise CheckpointError(f'{path}: holds no state dict of float tensors, nor one under "model" or "state_dict"')
    return dict(values)


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype in WEIGHT_DTYPES and tensor.layout is torch.strided and not tensor.is_meta

"""A checkpoint in PyTorch, on a GPU where torch sees one, else on the CPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe3d_deploy.errors import MissingExtraError


class TorchBackend:
    """The float32 reference model over a checkpoint folder, a weights file or a preset."""

    def __init__(
        self,
        source: str | Path,
        *,
        outputs: Sequence[str] = (),
        seed: int = 0,
        allow_pickle: bool = False,
        view_chunk: int | None = None,
    ) -> None:
        try:
            import torch
        except ImportError as error:
            raise MissingExtraError("torch", "export") from error
        from moe3d_deploy.checkpoint import load_model, open_checkpoint
        from moe3d_deploy.model.moe3d import ALWAYS, check_outputs

        checkpoint = open_checkpoint(source, seed=seed, allow_pickle=allow_pickle)
        check_outputs(checkpoint.config, outputs)
        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = load_model(checkpoint).to(self._device)
        self._extra = tuple(name for name in outputs if name not in ALWAYS)
        self._view_chunk = view_chunk
        self.config = checkpoint.config
        self.name = checkpoint.name
        self.output_names = (*ALWAYS, *self._extra)

    def run(self, images: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """images (B, S, 3, H, W) float32 -> float32 arrays by output name."""
        tensor = self._torch.from_numpy(np.require(images, requirements="W")).to(self._device)  # torch wants to own it
        with self._torch.inference_mode():
            result = self._model(tensor, outputs=self._extra, view_chunk=self._view_chunk)
        return {name: result[name].cpu().numpy() for name in self.output_names}

"""A checkpoint in PyTorch, on a GPU where torch sees one, else on the CPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moe3d_deploy.errors import Moe3dError
from moe3d_deploy.runtime.packages import load_package

if TYPE_CHECKING:
    from moe3d_deploy.model import MoE3D

_NO_CPU_MEMORY = "alloc_cpu.cpp"  # where torch's CPU allocator fails; it raises a plain RuntimeError that names it


class TorchBackend:
    """The float32 reference model over a checkpoint folder, a weights file or a preset.

    Opening it checks the checkpoint's keys and shapes; `load` reads the weights, at the latest at the first run.
    """

    input_type = "float32"

    def __init__(
        self,
        source: str | Path,
        *,
        outputs: Sequence[str] = (),
        seed: int | None = None,
        allow_pickle: bool = False,
        view_chunk: int | None = None,
    ) -> None:
        torch = load_package("torch")
        from moe3d_deploy.checkpoint import load_model, open_checkpoint
        from moe3d_deploy.model.moe3d import ALWAYS, check_outputs

        checkpoint = open_checkpoint(source, seed=seed, allow_pickle=allow_pickle)
        check_outputs(checkpoint.config, outputs)
        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._load = lambda: load_model(checkpoint).to(self._device)
        self._model: MoE3D | None = None
        self._extra = tuple(name for name in outputs if name not in ALWAYS)
        self._view_chunk = view_chunk
        self.config = checkpoint.config
        self.name = checkpoint.name
        self.output_names = (*ALWAYS, *self._extra)

    def load(self) -> None:
        """Read the weights, unless they are there. Raises CheckpointError."""
        self._loaded()

    def _loaded(self) -> "MoE3D":
        if self._model is None:
            self._model = self._load()
        return self._model

    def run(self, images: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
        """images (B, S, 3, H, W) float32 -> float32 arrays by output name. Raises Moe3dError where memory ends."""
        model = self._loaded()
        tensor = self._torch.from_numpy(np.require(images, requirements="W"))  # torch wants to own it
        try:
            with self._torch.inference_mode():
                result = model(tensor.to(self._device), outputs=self._extra, view_chunk=self._view_chunk)
            return {name: result[name].cpu().numpy() for name in self.output_names}
        except RuntimeError as error:
            if not isinstance(error, self._torch.OutOfMemoryError) and _NO_CPU_MEMORY not in str(error):
                raise
            shape = "x".join(map(str, images.shape))
            raise Moe3dError(
                f"PyTorch ran out of memory on images {shape}; use fewer views, a smaller --size, or --view-chunk"
            ) from error

"""A checkpoint in PyTorch, on a GPU where torch sees one, else on the CPU."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from moe3d_deploy.errors import Moe3dError, first_line
from moe3d_deploy.runtime.expert_mix_choice import choose_mix
from moe3d_deploy.runtime.packages import load_package

if TYPE_CHECKING:
    from moe3d_deploy.model import MoE3D

_NO_CPU_MEMORY = "alloc_cpu.cpp"  # where torch's CPU allocator fails; it raises a plain RuntimeError that names it


class TorchBackend:
    """The float32 reference model over a checkpoint folder, a weights file or a preset.

    Opening it checks the checkpoint's keys and shapes; `load` reads the weights, at the latest at the first run. On a
    GPU the experts are merged and mixed by the kernel where its library is there (`plugin`, docs/plugin.md).
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
        plugin: str | Path | None = None,
    ) -> None:
        torch = load_package("torch")
        from moe3d_deploy.checkpoint import load_model, open_checkpoint
        from moe3d_deploy.model.moe3d import ALWAYS, check_outputs

        checkpoint = open_checkpoint(source, seed=seed, allow_pickle=allow_pickle)
        check_outputs(checkpoint.config, outputs)
        self._torch = torch
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._mix = choose_mix(plugin, checkpoint.config, outputs, self._device)
        self._load = lambda: load_model(checkpoint).to(self._device)
        self._model: MoE3D | None = None
        self._extra = tuple(name for name in outputs if name not in ALWAYS)
        self._view_chunk = view_chunk
        self.config = checkpoint.config
        self.name = checkpoint.name
        self.output_names = (*ALWAYS, *self._extra)

    @property
    def notes(self) -> tuple[str, ...]:
        """What is known of how the experts are mixed; final once the weights are loaded."""
        return (self._mix.note,) if self._mix.note else ()

    def load(self) -> None:
        """Read the weights, unless they are there. Raises CheckpointError, and Moe3dError for a kernel that was asked
        for and does not run on this device."""
        self._loaded()

    def _loaded(self) -> "MoE3D":
        if self._model is None:
            model = self._load()
            if self._mix.library is not None:
                self._use_kernel(model, self._mix.library)
            self._model = model
        return self._model

    def _use_kernel(self, model: "MoE3D", library: Path) -> None:
        """Merge the experts and mix them by the kernel, once it has given PyTorch's own result on this device."""
        from moe3d_deploy.model.experts import MergedExperts
        from moe3d_deploy.native.torch_op import KernelExperts, self_test

        head = model.depth_head
        merged = MergedExperts(head.experts, head.gate, self.config.moe)  # type: ignore[arg-type]
        try:
            self_test(merged, library, self._torch.device(self._device))
        except Moe3dError as error:
            self._mix = self._mix.failed(str(error))
            return
        except RuntimeError as error:  # CUDA's: nothing runs in this process any more
            raise Moe3dError(
                f"the expert-mix kernel in {library} failed on this GPU: {first_line(error)}; "
                "do without it: --plugin none"
            ) from error
        head.merge_experts()
        with_weights = not {"expert_weights", "expert_entropy"}.isdisjoint(self._extra)
        head.merged = KernelExperts(merged, library, with_weights=with_weights)  # type: ignore[assignment]

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

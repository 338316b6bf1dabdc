"""A bundle in ONNX Runtime; its digests are checked before ONNX Runtime sees a byte. Engines do not matter here."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe3d_deploy.bundle import Bundle
from moe3d_deploy.errors import InputError
from moe3d_deploy.runtime.onnx_backend import OnnxBackend
from moe3d_deploy.runtime.split_backend import VIEW_CHUNK, SplitBackend

Arrays = dict[str, NDArray[Any]]


def bundle_backend(bundle: Bundle, view_chunk: int | None) -> "BundleBackend | SplitBundleBackend":
    """The backend of a bundle whose model is one file, or of one that is split.

    view_chunk  of a split one: views that its encoder or its heads take at a time; None: VIEW_CHUNK

    Nothing is loaded. Raises InputError for a chunk that cannot be.
    """
    if bundle.manifest.parts:
        return SplitBundleBackend(bundle, VIEW_CHUNK if view_chunk is None else view_chunk)
    if view_chunk is not None:
        raise InputError(
            f"view_chunk is for PyTorch and for split models, and the model of bundle {bundle.path} is one file: "
            "leave it out, or export with --split heads"
        )
    return BundleBackend(bundle)


class BundleBackend:
    """A bundle whose model is one file."""

    notes = ()

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._backend: OnnxBackend | None = None
        self.output_names = tuple(output.name for output in bundle.manifest.outputs)
        self.input_type = bundle.manifest.inputs[0].dtype

    def load(self) -> None:
        self._loaded()

    def run(self, images: NDArray[Any]) -> Arrays:
        return self._loaded().run(images)

    def _loaded(self) -> OnnxBackend:
        if self._backend is None:
            self._bundle.check(engines=False)
            self._backend = OnnxBackend(self._bundle.model_path)
        return self._backend


class SplitBundleBackend:
    """A bundle whose model is split.

    token_channels   of the patch tokens, (B, S, rows, columns, C); None where the encoder is no part of its own
    """

    notes = ()

    def __init__(self, bundle: Bundle, view_chunk: int) -> None:
        if view_chunk < 1:
            raise InputError(f"view_chunk must be at least 1, got {view_chunk}")
        manifest = bundle.manifest
        self._bundle = bundle
        self._view_chunk = view_chunk
        self._backend: SplitBackend | None = None
        self.output_names = tuple(output.name for output in manifest.outputs)
        self.input_type = manifest.inputs[0].dtype
        self.token_channels = manifest.config.vit.embed_dim if manifest.split == "encoder" else None

    def load(self) -> None:
        self._loaded()

    def run(self, images: NDArray[Any]) -> Arrays:
        return self._loaded().run(images)

    def encode(self, images: NDArray[Any]) -> NDArray[np.float32]:
        return self._loaded().encode(images)

    def run_tokens(self, tokens: NDArray[np.float32]) -> Arrays:
        return self._loaded().run_tokens(tokens)

    def _loaded(self) -> SplitBackend:
        if self._backend is None:
            self._bundle.check(engines=False)
            self._backend = SplitBackend(self._bundle.part_paths, self.output_names, view_chunk=self._view_chunk)
        return self._backend

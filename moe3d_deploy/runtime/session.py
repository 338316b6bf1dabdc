"""One `Session` over every way to run the model: a bundle in ONNX Runtime, a checkpoint in PyTorch."""

import difflib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe3d_deploy.bundle import Bundle, is_bundle
from moe3d_deploy.config import PRESETS, ModelConfig
from moe3d_deploy.errors import InputError
from moe3d_deploy.manifest import Preprocessing, Range, ShapeRanges
from moe3d_deploy.runtime.bundle_backend import SplitBundleBackend, bundle_backend
from moe3d_deploy.runtime.pixels import to_floats, to_pixels

BACKENDS = ("auto", "onnxruntime", "pytorch")


class Backend(Protocol):
    """Runs images in the form of `input_type` and returns float32 arrays by output name.

    float32  (B, S, 3, H, W), RGB in [0, 1]
    uint8    (B, S, H, W, 3), RGB in 0..255
    """

    @property
    def input_type(self) -> str: ...

    @property
    def output_names(self) -> Sequence[str]: ...

    @property
    def notes(self) -> Sequence[str]:
        """Lines for people on how it runs."""

    def load(self) -> None:
        """Get ready what takes long, unless it is; `run` does so too."""

    def run(self, images: NDArray[Any]) -> dict[str, NDArray[Any]]: ...


class Session:
    """Depth and cameras of images.

        session = Session.open("bundle")
        result = session.run(images)      # images (S, 3, H, W) or (B, S, 3, H, W), RGB in [0, 1]
        result["depth"]                   # (S, H, W) or (B, S, H, W)

    Images may also be 8-bit pixels, uint8 (S, H, W, 3) or (B, S, H, W, 3), whatever the model takes itself. Threads may
    share a session of ONNX Runtime; one of PyTorch is for one thread at a time. `config` is the model's, where it is
    known. Of a bundle whose encoder is a part, the tokens of a view can be kept and used again:

        tokens = session.encode(images)   # (S, rows, columns, C)
        result = session.run_tokens(tokens)
    """

    def __init__(
        self,
        backend: Backend,
        name: str,
        preprocessing: Preprocessing,
        shapes: ShapeRanges,
        config: ModelConfig | None = None,
    ) -> None:
        self.backend = backend
        self.name = name
        self.preprocessing = preprocessing
        self.shapes = shapes
        self.config = config

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(self.backend.output_names)

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for people, such as which form of the expert mix runs on a GPU; final once the session is loaded."""
        return tuple(self.backend.notes)

    @classmethod
    def open(
        cls,
        source: str | Path,
        *,
        backend: str = "auto",
        outputs: Sequence[str] = (),
        seed: int | None = None,
        allow_pickle: bool = False,
        view_chunk: int | None = None,
        plugin: str | Path | None = None,
        load: bool = True,
    ) -> "Session":
        """Open a bundle (ONNX Runtime) or a checkpoint or preset (PyTorch); "auto" goes by what `source` is.

        load   False puts off what takes long, a bundle's digests and the weights, to `load` or the first run; what
               the session tells of itself is known at once

        view_chunk   how many views the dense heads take at a time, in PyTorch and in a bundle of split heads; of a
                     bundle with a split encoder, how many that takes

        The other arguments are PyTorch's: outputs beyond the default ones, the seed of random weights for a preset
        (None: its trained ones, where it has them), whether a pickle may be read, and the expert-mix kernel on a GPU:
        its library, which then has to run, "none" for PyTorch's own operators, or None for a library that is found
        (docs/plugin.md).

        Raises BundleError, CheckpointError, InputError, or MissingExtraError; Moe3dError for an unusable `plugin`.
        """
        if backend not in BACKENDS:
            raise InputError(f"backend {backend!r} is unknown; choose from {', '.join(BACKENDS)}")
        of_bundle = is_bundle(source)
        if not of_bundle:
            _require_source(source)
        if of_bundle and backend == "pytorch":
            raise InputError(f"{source} is a bundle, which holds no PyTorch weights; name its checkpoint instead")
        if backend == "onnxruntime" and not of_bundle:
            raise InputError(f"{source} is not a bundle; make one with: moe3d-export {source} -o bundle")
        if of_bundle:
            if outputs:
                raise InputError(f"the outputs of bundle {source} were chosen at export; export again with --outputs")
            given = {"seed": seed is not None, "allow_pickle": allow_pickle, "plugin": plugin is not None}
            if unused := [name for name, is_given in given.items() if is_given]:
                raise InputError(f"{unused[0]} is for PyTorch alone; leave it out for bundle {source}")
            session = cls._of_bundle(Path(source), view_chunk)
        else:
            session = cls._of_checkpoint(
                source, outputs, seed=seed, allow_pickle=allow_pickle, view_chunk=view_chunk, plugin=plugin
            )
        if load:
            session.load()
        return session

    @classmethod
    def _of_bundle(cls, path: Path, view_chunk: int | None) -> "Session":
        bundle = Bundle.open(path, verify="sizes", engines=False)
        manifest = bundle.manifest
        if manifest.only_in_tensorrt:
            raise InputError(
                f"bundle {path} is {manifest.precision}, and bf16 graphs run in TensorRT only, as an engine on a GPU: "
                "ONNX Runtime has no bf16 kernels on a CPU; for this backend export with --precision fp16 or fp32"
            )
        backend = bundle_backend(bundle, view_chunk)
        return cls(backend, manifest.name, manifest.preprocessing, manifest.shape_ranges, manifest.config)

    @classmethod
    def _of_checkpoint(cls, source: str | Path, outputs: Sequence[str], **options: Any) -> "Session":
        from moe3d_deploy.runtime.torch_backend import TorchBackend

        backend = TorchBackend(source, outputs=outputs, **options)
        config = backend.config
        return cls(backend, backend.name, Preprocessing.of(config), ShapeRanges.of(config), config)

    def load(self) -> None:
        """Check a bundle's digests and load the weights, unless that is done.

        Raises BundleError, CheckpointError or MissingExtraError.
        """
        self.backend.load()

    def run(self, images: ArrayLike) -> dict[str, NDArray[Any]]:
        """Run one scene (S, 3, H, W) or several (B, S, 3, H, W); outputs have the B axis only if the images have.

        8-bit pixels have their channels last. Floats and pixels give the same bits: a pixel is pixel / 255, and a model
        that takes pixels itself refuses floats that are none. Raises InputError for an array that does not fit, before
        anything is loaded.
        """
        array = self.check(images)
        result = self.backend.run(array)
        return {name: value[0] for name, value in result.items()} if np.ndim(images) == 4 else result

    def encode(self, images: ArrayLike) -> NDArray[np.float32]:
        """The encoder's patch tokens of views: images as of `run` -> (S, rows, columns, C), or (B, S, ...).

        A view's tokens depend on nothing but the view, so those of one that comes again can be kept. Raises InputError
        for a model whose encoder is no part of its own.
        """
        backend, _ = self._encoder()
        shapes = ShapeRanges(Range(1, None), Range(1, None), self.shapes.height, self.shapes.width)
        tokens = backend.encode(self.check(images, shapes))
        return tokens[0] if np.ndim(images) == 4 else tokens

    def run_tokens(self, tokens: ArrayLike) -> dict[str, NDArray[Any]]:
        """`run` of the views that `encode` gave these tokens for; theirs from several calls may be joined.

        tokens   (S, rows, columns, C) or (B, S, rows, columns, C); raises InputError for what does not fit
        """
        backend, channels = self._encoder()
        array = np.asarray(tokens)
        if array.ndim not in (4, 5) or array.dtype != np.float32 or array.shape[-1] != channels:
            raise InputError(
                f"tokens: expected float32 (S, rows, columns, {channels}) or (B, S, rows, columns, {channels}), got "
                f"{array.dtype} {array.shape}; take what encode gives"
            )
        batch, views, rows, columns, _ = array.shape if array.ndim == 5 else (1, *array.shape)
        patch = self.preprocessing.patch_size
        self._check_sizes(batch, views, rows * patch, columns * patch)
        result = backend.run_tokens(np.ascontiguousarray(array if array.ndim == 5 else array[None]))
        return {name: value[0] for name, value in result.items()} if array.ndim == 4 else result

    def _encoder(self) -> tuple[SplitBundleBackend, int]:
        """The backend, and the channels of its tokens. Raises InputError where the encoder is no part of its own."""
        backend = self.backend
        if not isinstance(backend, SplitBundleBackend) or backend.token_channels is None:
            raise InputError(f"the encoder of {self.name} is no part of its own; export with --split encoder")
        return backend, backend.token_channels

    def check(self, images: ArrayLike, shapes: ShapeRanges | None = None) -> NDArray[Any]:
        """The images as `run` hands them to the backend, in its `input_type`. Raises InputError as `run` does.

        shapes   what is taken; None: what the model takes
        """
        try:
            array = np.asarray(images)
        except ValueError as error:  # lists of unequal length
            raise InputError(
                f"images: expected an array of numbers, got a {type(images).__name__} that is none"
            ) from error
        if array.ndim == 4:
            array = array[None]
        takes_pixels = self.backend.input_type == "uint8"
        if array.dtype == np.uint8:
            self._check_pixels(array, shapes)
            return np.ascontiguousarray(array) if takes_pixels else to_floats(array)
        self._check_floats(array, shapes)
        return to_pixels(array) if takes_pixels else np.ascontiguousarray(array, np.float32)

    def _check_pixels(self, images: NDArray[np.uint8], shapes: ShapeRanges | None) -> None:
        if images.ndim != 5 or images.shape[4] != 3:
            raise InputError(f"images: 8-bit pixels are (S, H, W, 3) or (B, S, H, W, 3), got {images.shape}")
        batch, views, height, width, _ = images.shape
        self._check_sizes(batch, views, height, width, shapes)

    def _check_floats(self, images: NDArray[Any], shapes: ShapeRanges | None) -> None:
        if images.ndim != 5 or images.shape[2] != 3:
            raise InputError(f"images: expected (S, 3, H, W) or (B, S, 3, H, W), got {images.shape}")
        if images.dtype.kind != "f":
            raise InputError(f"images: expected floats in [0, 1] or uint8 pixels, got {images.dtype}; convert them")
        low, high = (float(images.min()), float(images.max())) if images.size else (0.0, 0.0)
        if not 0 <= low <= high <= 1:
            raise InputError(f"images: values lie in [{low:g}, {high:g}]; expected RGB in [0, 1]")
        batch, views, _, height, width = images.shape
        self._check_sizes(batch, views, height, width, shapes)

    def _check_sizes(self, batch: int, views: int, height: int, width: int, shapes: ShapeRanges | None = None) -> None:
        sizes = {"batch": batch, "views": views, "height": height, "width": width}
        for axis, size in sizes.items():
            _check_size(axis, size, getattr(shapes or self.shapes, axis))


def _require_source(source: str | Path) -> None:
    """Raise InputError for a name that leads nowhere: without torch, which knows checkpoints, but not typing errors."""
    name = str(source).removeprefix("preset:")
    if os.path.exists(source) or (name in PRESETS and not isinstance(source, Path)):
        return
    close = difflib.get_close_matches(name, PRESETS, n=1)
    remedy = f"did you mean {close[0]}?" if close else "check the path"
    raise InputError(f"{source}: no such file or folder, nor a preset ({', '.join(PRESETS)}); {remedy}")


def _check_size(axis: str, size: int, allowed: Range) -> None:
    top = size if allowed.max is None else allowed.max
    if allowed.min <= size <= top and (size - allowed.min) % allowed.step == 0:
        return
    if allowed.min == allowed.max:
        raise InputError(f"images: {axis} is {size}; this model is fixed at {allowed.min}")
    steps = max(0, round((min(size, top) - allowed.min) / allowed.step))
    upwards = "and more" if allowed.max is None else f"to {allowed.max}"
    raise InputError(
        f"images: {axis} is {size}; accepted are {allowed.min} {upwards} in steps of {allowed.step}, "
        f"the nearest is {allowed.min + steps * allowed.step}"
    )

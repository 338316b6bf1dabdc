"""One `Session` over every way to run the model: a bundle in ONNX Runtime, a checkpoint in PyTorch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe3d_deploy.bundle import Bundle
from moe3d_deploy.errors import InputError
from moe3d_deploy.manifest import MANIFEST_NAME, Preprocessing, Range, ShapeRanges

BACKENDS = ("auto", "onnxruntime", "pytorch")


class Backend(Protocol):
    """Runs images (B, S, 3, H, W) float32 and returns float32 arrays by output name."""

    @property
    def output_names(self) -> Sequence[str]: ...

    def run(self, images: NDArray[np.float32]) -> dict[str, NDArray[Any]]: ...


class Session:
    """Depth and cameras of images.

        session = Session.open("bundle")
        result = session.run(images)      # images (S, 3, H, W) or (B, S, 3, H, W), RGB in [0, 1]
        result["depth"]                   # (S, H, W) or (B, S, H, W)

    A session is for one thread at a time.
    """

    def __init__(self, backend: Backend, name: str, preprocessing: Preprocessing, shapes: ShapeRanges) -> None:
        self.backend = backend
        self.name = name
        self.preprocessing = preprocessing
        self.shapes = shapes

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(self.backend.output_names)

    @classmethod
    def open(
        cls,
        source: str | Path,
        *,
        backend: str = "auto",
        outputs: Sequence[str] = (),
        seed: int = 0,
        allow_pickle: bool = False,
        view_chunk: int | None = None,
    ) -> "Session":
        """Open a bundle (ONNX Runtime) or a checkpoint or preset (PyTorch); "auto" goes by what `source` is.

        The other arguments are PyTorch's: outputs beyond the default ones, a preset's seed, whether a pickle may be
        read, and how many views the dense heads take at a time.

        Raises BundleError, CheckpointError, InputError, or MissingExtraError.
        """
        if backend not in BACKENDS:
            raise InputError(f"backend {backend!r} is unknown; choose from {', '.join(BACKENDS)}")
        is_bundle = _is_bundle(Path(source))
        if is_bundle and backend == "pytorch":
            raise InputError(f"{source} is a bundle, which holds no PyTorch weights; name its checkpoint instead")
        if backend == "onnxruntime" and not is_bundle:
            raise InputError(f"{source} is not a bundle; make one with: moe3d-export {source} -o bundle")
        if is_bundle:
            if outputs:
                raise InputError(f"the outputs of bundle {source} were chosen at export; export again with --outputs")
            given = {"seed": seed != 0, "allow_pickle": allow_pickle, "view_chunk": view_chunk is not None}
            if unused := [name for name, is_given in given.items() if is_given]:
                raise InputError(f"{unused[0]} is for PyTorch alone; leave it out for bundle {source}")
            return cls._open_bundle(Path(source))
        return cls._open_checkpoint(source, outputs, seed, allow_pickle, view_chunk)

    @classmethod
    def _open_bundle(cls, path: Path) -> "Session":
        from moe3d_deploy.runtime.onnx_backend import OnnxBackend

        bundle = Bundle.open(path)
        manifest = bundle.manifest
        return cls(OnnxBackend(bundle.model_path), manifest.name, manifest.preprocessing, manifest.shape_ranges)

    @classmethod
    def _open_checkpoint(
        cls, source: str | Path, outputs: Sequence[str], seed: int, allow_pickle: bool, view_chunk: int | None
    ) -> "Session":
        from moe3d_deploy.runtime.torch_backend import TorchBackend

        backend = TorchBackend(source, outputs=outputs, seed=seed, allow_pickle=allow_pickle, view_chunk=view_chunk)
        config = backend.config
        pixels = Range(config.patch_size, None, config.patch_size)
        shapes = ShapeRanges(Range(1, None), Range(1, None), pixels, pixels)
        return cls(backend, backend.name, Preprocessing.of(config), shapes)

    def run(self, images: ArrayLike) -> dict[str, NDArray[Any]]:
        """Run one scene (S, 3, H, W) or several (B, S, 3, H, W); outputs have the B axis only if the images have.

        Raises InputError for an array that does not fit.
        """
        try:
            array = np.asarray(images)
        except ValueError as error:  # lists of unequal length
            raise InputError(
                f"images: expected an array of numbers, got a {type(images).__name__} that is none"
            ) from error
        single = array.ndim == 4
        if single:
            array = array[None]
        self._check(array)
        result = self.backend.run(np.ascontiguousarray(array, np.float32))
        return {name: value[0] for name, value in result.items()} if single else result

    def _check(self, images: NDArray[Any]) -> None:
        if images.ndim != 5 or images.shape[2] != 3:
            raise InputError(f"images: expected (S, 3, H, W) or (B, S, 3, H, W), got {images.shape}")
        if images.dtype.kind != "f":
            raise InputError(f"images: expected floats in [0, 1], got {images.dtype}; divide 8-bit images by 255")
        low, high = (float(images.min()), float(images.max())) if images.size else (0.0, 0.0)
        if not 0 <= low <= high <= 1:
            raise InputError(f"images: values lie in [{low:g}, {high:g}]; expected RGB in [0, 1]")
        batch, views, _, height, width = images.shape
        sizes = {"batch": batch, "views": views, "height": height, "width": width}
        for axis, size in sizes.items():
            _check_size(axis, size, getattr(self.shapes, axis))


def _is_bundle(path: Path) -> bool:
    """A folder with a manifest, or one that has lost it: a bundle's file and no checkpoint."""
    if (path / MANIFEST_NAME).is_file():
        return True
    return (path / "model.onnx").is_file() and not (path / "model.safetensors").is_file()


def _check_size(axis: str, size: int, allowed: Range) -> None:
    top = size if allowed.max is None else allowed.max
    if allowed.min <= size <= top and (size - allowed.min) % allowed.step == 0:
        return
    steps = max(0, round((min(size, top) - allowed.min) / allowed.step))
    upwards = "and more" if allowed.max is None else f"to {allowed.max}"
    raise InputError(
        f"images: {axis} is {size}; accepted are {allowed.min} {upwards} in steps of {allowed.step}, "
        f"the nearest is {allowed.min + steps * allowed.step}"
    )

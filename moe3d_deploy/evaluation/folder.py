"""A user's own scenes: a folder of photographs and a truth.npz each, brought to the network's resolution.

The layout, and why the truth is resampled to the prediction and not the other way round, is in docs/evaluation.md.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe3d_deploy.errors import InputError, Moe3dWarning
from moe3d_deploy.evaluation.scenes import EvaluationScene
from moe3d_deploy.image_decode import decode_image
from moe3d_deploy.image_files import fault_of, find_images, read_file, shown
from moe3d_deploy.images import load_images
from moe3d_deploy.manifest import Preprocessing
from moe3d_deploy.metrics.inputs import extrinsics_of, intrinsics_of
from moe3d_deploy.view_mapping import ViewMapping

TRUTH_FILE = "truth.npz"
_LAYOUT = f"a folder per scene, with its photographs and {TRUTH_FILE} (docs/evaluation.md)"
_ENTRIES = {"depth": "(S, H, W)", "extrinsics": "(S, 3, 4)", "intrinsics": "(S, 3, 3)"}

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class SceneFolder:
    """A scene on the disk: its photographs in natural order, one per view of its truth."""

    path: Path
    images: tuple[Path, ...]

    def load(self, preprocessing: Preprocessing, size: int | None = None) -> EvaluationScene:
        """The photographs as the model wants its views, `size` in place of its own; the truth at their resolution.

        Raises InputError for what is wrong with either.
        """
        truth = read_truth(self.path / TRUTH_FILE, len(self.images))
        batch = load_images(
            list(self.images),
            mode=preprocessing.mode,  # type: ignore[arg-type]
            size=size or preprocessing.size,
            patch_size=preprocessing.patch_size,
        )
        height, width = batch.images.shape[2:]
        views = [
            to_network(depth, camera, view, height, width)
            for depth, camera, view in zip(truth["depth"], truth["intrinsics"], batch.views, strict=True)
        ]
        depth = np.stack([depth for depth, _ in views])
        if not depth.any():
            raise InputError(f"{_shown(self.path)}: no pixel of its {TRUTH_FILE} that the model sees has a true depth")
        intrinsics = np.stack([matrix for _, matrix in views])
        seen = {"depth": depth, "extrinsics": truth["extrinsics"], "intrinsics": intrinsics}
        return EvaluationScene(shown(self.path.name), batch.images, seen)


def find_scenes(folder: Path) -> list[SceneFolder]:
    """The scenes of a folder, itself one where it holds a truth.npz; in the order of their names.

    Every truth and every photograph is read once, so that what is wrong with the last scene is told before work on the
    first begins. Raises InputError for a folder without a scene, for a sub-folder without truth or photographs, for
    photographs that are not as many as the views of the truth, damaged or of other proportions, and as `read_truth`.
    """
    if not folder.is_dir():
        raise InputError(f"{_shown(folder)} is no folder; expected {_LAYOUT}")
    single = (folder / TRUTH_FILE).exists()
    paths = [folder] if single else sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not paths:
        raise InputError(f"{_shown(folder)} holds no scene; expected {_LAYOUT}")
    scenes = []
    for path in paths:
        if fault := fault_of(path / TRUTH_FILE):
            raise InputError(f"{_shown(path / TRUTH_FILE)} {fault}; expected {_LAYOUT}")
        images = tuple(find_images(path))
        truth = read_truth(path / TRUTH_FILE, len(images))
        for image in images:
            _require_proportions(f'image "{shown(image)}"', *_size_of(image), *truth["depth"].shape[1:])
        scenes.append(SceneFolder(path, images))
    return scenes


def folder_scenes(
    scenes: list[SceneFolder], preprocessing: Preprocessing, size: int | None = None
) -> Iterator[EvaluationScene]:
    """Each scene as `SceneFolder.load` gives it, one after another."""
    return (scene.load(preprocessing, size) for scene in scenes)


def read_truth(path: Path, views: int) -> Arrays:
    """The arrays of a truth.npz for `views` photographs: depth (S, H, W) float32, extrinsics and intrinsics float64.

    Raises InputError for a file that cannot be read, an array that is missing, of another shape or number of views, or
    not finite, a depth below 0, no pixel that has one, extrinsics without a rotation, and focal lengths not above 0.
    """
    label = _shown(path)
    with open(path, "rb") as stream:
        try:
            with np.load(stream, allow_pickle=False) as file:
                truth = {name: np.asarray(file[name]) for name in _ENTRIES if name in file}
        except MemoryError:
            raise
        except Exception as error:  # a damaged file ends numpy's reader in a dozen ways
            raise InputError(f"{label} is no .npz of plain arrays; write it again, with numpy.savez") from error
    for name, shape in _ENTRIES.items():
        if name not in truth:
            raise InputError(f"{label} has no {name}; it needs " + ", ".join(f"{n} {s}" for n, s in _ENTRIES.items()))
        array = truth[name]
        fits = array.ndim == 3 and (name == "depth" or array.shape[1:] == ((3, 4) if name == "extrinsics" else (3, 3)))
        if not fits or array.dtype.kind not in "fiu" or array.size == 0:
            raise InputError(f"{label}: {name} is {array.dtype} {array.shape}; expected numbers {shape}")
        if len(array) != views:
            raise InputError(f"{label}: {name} has {len(array)} views beside {views} photographs; pass one for each")
        if not np.isfinite(array).all():
            raise InputError(f"{label}: {name} holds NaN or infinite values; mark a depth that is not known by 0")
    if (truth["depth"] < 0).any():
        raise InputError(f"{label}: depth is below 0 somewhere; mark a depth that is not known by 0")
    if not truth["depth"].any():
        raise InputError(f"{label}: no pixel has a true depth above 0; there is nothing to compare with")
    extrinsics_of(truth["extrinsics"], f"{label}: extrinsics")
    intrinsics_of(truth["intrinsics"], f"{label}: intrinsics", views)
    return {
        "depth": truth["depth"].astype(np.float32),
        **{name: truth[name].astype(np.float64) for name in ("extrinsics", "intrinsics")},
    }


def to_network(
    depth: NDArray[np.float32], intrinsics: NDArray[np.float64], view: ViewMapping, height: int, width: int
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """One view's truth at the network's resolution: depth (height, width), 0 on padding, and intrinsics (3, 3).

    depth        (h, w)   of `view`'s whole photograph, in its resolution or another
    intrinsics   (3, 3)   pixels of `depth`

    Each network pixel takes the true depth nearest to its centre; a mean would put depth between two surfaces. With
    pixel centres at integers u_truth = (u - offset + 0.5) scale - 0.5, and the intrinsics go the same way back.
    Raises InputError where the sides of the truth are not those of the photograph in proportion, to a pixel.
    """
    rows, columns = depth.shape
    _require_proportions(view.name, view.original_width, view.original_height, rows, columns)
    mapping = replace(
        view,
        original_height=rows,
        original_width=columns,
        scale_x=view.scale_x * columns / view.original_width,
        scale_y=view.scale_y * rows / view.original_height,
    )
    u = mapping.to_original(np.stack([np.arange(width), np.zeros(width)], axis=-1))[:, 0]
    v = mapping.to_original(np.stack([np.zeros(height), np.arange(height)], axis=-1))[:, 1]
    nearest = np.ix_(_nearest(v, rows), _nearest(u, columns))
    seen = np.where(mapping.valid_mask(height, width), depth[nearest], 0).astype(np.float32)
    to_truth = mapping.intrinsics_to_original(np.eye(3))
    return seen, np.linalg.solve(to_truth, intrinsics).astype(np.float64)


def _require_proportions(name: str, width: int, height: int, rows: int, columns: int) -> None:
    if min(abs(columns * height / width - rows), abs(rows * width / height - columns)) > 1:
        raise InputError(
            f"{name} is {width}x{height}, and its truth {columns}x{rows} has other proportions; crop them alike"
        )


def _size_of(image: Path) -> tuple[int, int]:
    """Width and height of a photograph, turned upright. All of it is decoded: a damaged one is better told now."""
    label = f'image "{shown(image)}"'
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Moe3dWarning)  # they come again when the scene is loaded
        return decode_image(read_file(image, label), label).size


def _nearest(position: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """The pixel whose square a position lies in; half a pixel is rounded up, as (-0.5, 0.5] would leave gaps."""
    return np.clip(np.floor(position + 0.5).astype(np.int64), 0, count - 1)


def _shown(path: Path) -> str:
    return f'"{shown(path)}"'

"""The files of one scene: depth, colour maps, arrays, cameras and point clouds. It runs no model."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from moe3d_deploy.errors import InputError, Moe3dError
from moe3d_deploy.files import atomic_path, atomic_write
from moe3d_deploy.images import ImageBatch
from moe3d_deploy.runtime.colormaps import colorize, expert_map, inverse_depth, robust_range
from moe3d_deploy.runtime.output_folder import CAMERAS_FILE, prepare_folder, remove_earlier_scene, write_errors
from moe3d_deploy.runtime.overview import overview
from moe3d_deploy.runtime.pointcloud import (
    check_scene,
    point_cloud,
    require_points,
    valid_pixels,
    write_glb,
    write_ply,
)

FORMATS = ("png", "npz", "ply", "glb")
CAMERAS_FORMAT_VERSION = 1
_PNG_MAX = 65535
_TOP_PERCENTILE, _TOP_FACTOR = 99.9, 1.5  # of the scene's valid depths: what the depth PNG's largest value stands for
_STEM_BYTES = 120  # leaves room for index, suffix and a temporary name below the 255 bytes of a file name


def write_scene(
    result: Mapping[str, np.ndarray],
    batch: ImageBatch,
    folder: Path,
    *,
    formats: Sequence[str] = FORMATS,
    drop_lowest: float = 0.25,
) -> list[Path]:
    """Write one scene into `folder` (created if absent) and return the files in the order they were written.

    result    one scene without the B axis: depth, depth_conf (S, H, W), extrinsics (S, 3, 4), intrinsics (S, 3, 3);
              optional expert_weights (S, K, H, W), expert_entropy (S, H, W); any other array goes into the npz only
    batch     the images the result belongs to: S views of the network size H x W
    formats   some of FORMATS; `cameras.json` is always written, and last: a folder that has it is complete

    An earlier scene in the folder goes first: its cameras.json, then the files that it lists; nothing else is touched.

    png   per view <index>_<stem>_depth.png (16 bit, depth = value * depth_png_scale, 0 invalid), _depth_color.png
          (colours of 1 / depth: near is warm), _conf.png and, where the result has them, _experts.png and _entropy.png;
          one depth scale and one colour range for all views; padding is 0 or black; overview.png shows them together.
          65535 stands for 1.5 times the 99.9th percentile of the scene's depth, or its maximum where that is smaller;
          deeper pixels have 65535 too: `saturated_fraction` in cameras.json is their share of a view's valid ones
    npz   scene.npz with every array of the result, padding included
    ply, glb   points.ply, points.glb without the `drop_lowest` fraction of lowest confidence (see `point_cloud`)

    Raises InputError for arrays that do not fit the batch, an unknown format, a scene without a valid point where a
    GLB is asked for (before any other file is written), or a folder that cannot be written.
    """
    check_formats(formats)
    arrays = {name: np.asarray(value) for name, value in result.items()}
    views, _, height, width = batch.images.shape
    check_scene(arrays, views, height, width)
    _check_experts(arrays, views, height, width)
    masks = np.stack([view.valid_mask(height, width) for view in batch.views])
    folder = Path(folder)
    prepare_folder(folder)
    with write_errors(folder):
        return _write_files(arrays, batch, masks, folder, formats, drop_lowest)


def check_formats(formats: Sequence[str]) -> None:
    """Raise InputError for a format that `write_scene` does not know: to be called before a model runs for minutes."""
    if unknown := [name for name in formats if name not in FORMATS]:
        raise InputError(f"output format {unknown[0]!r} is unknown; choose from {', '.join(FORMATS)}")


def _write_files(
    arrays: dict[str, np.ndarray],
    batch: ImageBatch,
    masks: np.ndarray,
    folder: Path,
    formats: Sequence[str],
    drop_lowest: float,
) -> list[Path]:
    written: list[Path] = []
    if "glb" in formats or "ply" in formats:
        cloud = point_cloud(arrays, batch.images, masks, drop_lowest=drop_lowest)
        if "glb" in formats:
            require_points(cloud, folder / "points.glb")
    remove_earlier_scene(folder)
    if "glb" in formats or "ply" in formats:
        for name, write in (("glb", write_glb), ("ply", write_ply)):
            if name in formats:
                written.append(folder / f"points.{name}")
                write(cloud, written[-1])
    if "npz" in formats:
        written.append(folder / "scene.npz")
        with atomic_path(written[-1]) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]

    valid = valid_pixels(arrays["depth"], masks)
    scale = _png_scale(arrays["depth"][valid])
    ranges = _color_ranges(arrays, masks, valid)
    pictures: list[dict[str, Path]] = [{} for _ in batch.views]
    if "png" in formats:
        rows = []
        for index, view in enumerate(batch.views):
            one_view = {name: array[index] for name, array in arrays.items() if name in _MAPS}
            maps = _pictures(one_view, masks[index], valid[index], scale, ranges)
            rows.append({"photograph": _photograph(batch.images[index]), **_titled(maps)})
            for kind, picture in maps.items():
                path = folder / f"{index:03d}_{_stem(view.name)}_{kind}.png"
                atomic_write(path, _encode_png(picture, path))
                pictures[index][kind] = path
                written.append(path)
        written.append(folder / "overview.png")
        atomic_write(written[-1], _encode_png(overview(rows), written[-1]))

    document = {
        "format_version": CAMERAS_FORMAT_VERSION,
        "depth_png_scale": scale,
        "depth_png": "depth = value * depth_png_scale; 0 is invalid, 65535 is that deep or deeper",
        "depth_unit": "up to the scene's scale, not metres",
        "conventions": {
            "axes": "OpenCV: x right, y down, z forward",
            "depth": "along the optical axis",
            "extrinsics": "camera from world, 3x4",
            "pixels": "pixel centres at integers",
        },
        "color_ranges": ranges,
        "files": [path.name for path in written],
        "views": [
            _view_entry(arrays, batch, index, masks[index], valid[index], pictures[index], scale)
            for index in range(len(batch.views))
        ],
    }
    written.append(folder / CAMERAS_FILE)
    text = json.dumps(_json_value(document), indent=2, sort_keys=True, allow_nan=False)
    atomic_write(written[-1], (text + "\n").encode("ascii"))
    return written


_MAPS = ("depth", "depth_conf", "expert_weights", "expert_entropy")
_TITLES = {
    "depth_color": "1 / depth",
    "conf": "confidence",
    "experts": "strongest expert",
    "entropy": "gate entropy",
}


def _photograph(image: np.ndarray) -> np.ndarray:
    """A network input (3, H, W) in [0, 1] as (H, W, 3) uint8 RGB."""
    return np.rint(image.transpose(1, 2, 0) * 255).astype(np.uint8)


def _titled(maps: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {title: maps[kind] for kind, title in _TITLES.items() if kind in maps}


def _check_experts(arrays: dict[str, np.ndarray], views: int, height: int, width: int) -> None:
    for name, axes in (("expert_weights", "S, K, H, W"), ("expert_entropy", "S, H, W")):
        if name not in arrays:
            continue
        shape = arrays[name].shape
        if len(shape) != axes.count(",") + 1 or (shape[0], *shape[-2:]) != (views, height, width) or 0 in shape:
            raise InputError(f"{name} has shape {shape}, expected ({axes}) with S, H, W = {views}, {height}, {width}")


def _color_ranges(
    arrays: dict[str, np.ndarray], masks: np.ndarray, valid: np.ndarray
) -> dict[str, tuple[float, float] | None]:
    """What the ends of the colours stand for, per kind of map; None where no pixel is valid."""
    ranges = {
        "inverse_depth": robust_range(inverse_depth(arrays["depth"], valid)),
        "depth_conf": robust_range(arrays["depth_conf"], masks),
    }
    if "expert_entropy" in arrays:
        ranges["expert_entropy"] = robust_range(arrays["expert_entropy"], masks)
    return ranges


def _pictures(
    one_view: dict[str, np.ndarray],
    mask: np.ndarray,
    valid: np.ndarray,
    scale: float,
    ranges: dict[str, tuple[float, float] | None],
) -> dict[str, np.ndarray]:
    """The pictures of one view by the end of their file name: (H, W) uint16 depth, the others (H, W, 3) uint8 RGB."""

    def colored(values: np.ndarray, name: str) -> np.ndarray:
        lo, hi = ranges[name] or (0.0, 1.0)  # without a range no pixel is valid and all come out black
        return colorize(values, valid=mask, lo=lo, hi=hi)

    pictures = {
        "depth": _quantize(one_view["depth"], valid, scale),
        "depth_color": colored(inverse_depth(one_view["depth"], valid), "inverse_depth"),
        "conf": colored(one_view["depth_conf"], "depth_conf"),
    }
    if "expert_weights" in one_view:
        pictures["experts"] = expert_map(one_view["expert_weights"], valid=mask)
    if "expert_entropy" in one_view:
        pictures["entropy"] = colored(one_view["expert_entropy"], "expert_entropy")
    return pictures


def _png_scale(depths: np.ndarray) -> float:
    """Depth per step of the PNG. A few outliers (below 0.1 % of the pixels) do not take the steps of all others."""
    if not depths.size:
        return 1.0
    values = depths.astype(np.float64)
    return min(float(values.max()), _TOP_FACTOR * float(np.percentile(values, _TOP_PERCENTILE))) / _PNG_MAX


def _steps(depth: np.ndarray, scale: float) -> np.ndarray:
    return np.rint(depth.astype(np.float64) / scale)


def _quantize(depth: np.ndarray, valid: np.ndarray, scale: float) -> np.ndarray:
    """(H, W) uint16: depth / scale rounded, at most 65535; a valid depth below scale / 2 is 1, since 0 is invalid."""
    steps = _steps(np.where(valid, depth, 0), scale)
    return np.where(valid, np.clip(steps, 1, _PNG_MAX), 0).astype(np.uint16)


def _view_entry(
    arrays: dict[str, np.ndarray],
    batch: ImageBatch,
    index: int,
    mask: np.ndarray,
    valid: np.ndarray,
    pictures: dict[str, Path],
    scale: float,
) -> dict[str, Any]:
    view, intrinsics = batch.views[index], arrays["intrinsics"][index]
    depths = arrays["depth"][index][valid]
    with np.errstate(invalid="ignore"):  # a focal length that is not finite becomes null
        intrinsics_original = view.intrinsics_to_original(intrinsics)
    return {
        "index": index,
        "name": view.name,
        "network_size": {"width": mask.shape[1], "height": mask.shape[0]},
        "original_size": {"width": view.original_width, "height": view.original_height},
        "mapping": view.to_dict(),
        "extrinsics": arrays["extrinsics"][index],
        "intrinsics": intrinsics,
        "intrinsics_original": intrinsics_original,
        "depth_near": depths.min() if depths.size else None,
        "depth_far": depths.max() if depths.size else None,
        "valid_fraction": depths.size / max(int(mask.sum()), 1),  # of the pixels that are no padding
        "saturated_fraction": int((_steps(depths, scale) > _PNG_MAX).sum()) / max(depths.size, 1),  # of the valid ones
        "files": {kind: path.name for kind, path in pictures.items()},
    }


def _stem(name: str) -> str:
    """A view's name without folder and ending, with every character that some file system dislikes as "_"."""
    stem = re.sub(r"[^\w.-]", "_", Path(name).stem)
    return stem.encode("utf-8")[:_STEM_BYTES].decode("utf-8", "ignore")


def _encode_png(picture: np.ndarray, path: Path) -> bytes:
    """(H, W) or (H, W, 3) RGB to the bytes of a PNG."""
    done, data = cv2.imencode(".png", picture if picture.ndim == 2 else picture[..., ::-1])
    if not done:
        raise Moe3dError(f"{path}: a picture of shape {picture.shape} could not be encoded as PNG")
    return data.tobytes()


def _json_value(value: Any) -> Any:
    """Plain JSON values: arrays as nested lists, numbers that are not finite as null."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

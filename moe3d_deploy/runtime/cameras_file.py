"""cameras.json: what the other files of a scene mean, and the cameras."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from moe3d_deploy.images import ImageBatch
from moe3d_deploy.runtime.scene_maps import SceneScale, saturated

FORMAT_VERSION = 1


def cameras_json(
    arrays: Mapping[str, np.ndarray],
    batch: ImageBatch,
    masks: np.ndarray,
    valid: np.ndarray,
    scale: SceneScale,
    pictures: Sequence[Mapping[str, str]],
    files: Sequence[str],
    points: int | None,
    group_of: str | None = None,
) -> bytes:
    """The bytes of cameras.json.

    arrays     depth (S, H, W), extrinsics (S, 3, 4), intrinsics (S, 3, 3)
    masks      (S, H, W) bool, false on padding
    valid      (S, H, W) bool, where the depth counts
    pictures   per view the file names of its pictures by kind
    files      every file of the scene but this one, relative to its folder
    points     in the point cloud; None where none was asked for
    group_of   name of the folder that holds this scene's, and those of other sizes; None for a scene of its own
    """
    document = {
        "format_version": FORMAT_VERSION,
        "depth_png_scale": scale.png,
        "depth_png": "depth = value * depth_png_scale; 0 is invalid, 65535 is that deep or deeper",
        "depth_unit": "up to the scene's scale, not metres",
        "conventions": {
            "axes": "OpenCV: x right, y down, z forward",
            "depth": "along the optical axis",
            "extrinsics": "camera from world, 3x4",
            "pixels": "pixel centres at integers",
        },
        "color_ranges": scale.ranges,
        "files": files,
        "group_of": group_of,
        "points": points,
        "views": [
            _view_entry(arrays, batch, index, masks[index], valid[index], pictures[index], scale)
            for index in range(len(batch.views))
        ],
    }
    text = json.dumps(_json_value(document), indent=2, sort_keys=True, allow_nan=False)
    return (text + "\n").encode("ascii")


def _view_entry(
    arrays: Mapping[str, np.ndarray],
    batch: ImageBatch,
    index: int,
    mask: np.ndarray,
    valid: np.ndarray,
    pictures: Mapping[str, str],
    scale: SceneScale,
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
        "depth_median": np.median(depths.astype(np.float64)) if depths.size else None,
        "depth_far": depths.max() if depths.size else None,
        "valid_fraction": depths.size / max(int(mask.sum()), 1),  # of the pixels that are no padding
        "saturated_fraction": saturated(depths, scale) / max(depths.size, 1),  # of the valid ones
        "files": pictures,
    }


def _json_value(value: Any) -> Any:
    """Plain JSON values: arrays as nested lists, numbers that are not finite as null."""
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

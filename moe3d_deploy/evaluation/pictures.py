"""A scene's truth and prediction as pictures: maps per view, and the point clouds. Used by reports and the demo."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moe3d_deploy.evaluation.clouds import cloud_pictures
from moe3d_deploy.evaluation.scenes import EvaluationScene
from moe3d_deploy.files import atomic_write
from moe3d_deploy.metrics import align_median
from moe3d_deploy.metrics.gate import entropy
from moe3d_deploy.runtime.colormaps import colorize, expert_map, inverse_depth, robust_range
from moe3d_deploy.runtime.overview import overview
from moe3d_deploy.runtime.scene_maps import encode_png, photograph

ERROR_TOP = 0.25  # |predicted - true| / true that takes the last colour

Array = NDArray[Any]


def map_pictures(scene: EvaluationScene, prediction: Mapping[str, Array]) -> list[dict[str, Array]]:
    """Per view its pictures (H, W, 3) uint8 RGB by their title.

    Both inverse depths have the colours of the true one's range, after the scale of the whole scene (ratio of medians);
    the error is relative, black to bright up to ERROR_TOP. With `expert_weights` (S, K, H, W) in the prediction, the
    strongest expert and the gate's entropy, dark where one expert has it all and bright at log K.
    """
    depth, true = prediction["depth"].astype(np.float64), scene.truth["depth"]
    valid = true > 0
    depth = depth * align_median(depth, true, valid)
    inverse = inverse_depth(true, valid)
    lo, hi = robust_range(inverse) or (0.0, 1.0)
    error = np.abs(depth - true) / np.where(valid, true, 1)
    rows = []
    for view, image in enumerate(scene.images):
        row = {
            "image": photograph(image),
            "true 1 / depth": colorize(inverse[view], lo=lo, hi=hi),
            "predicted 1 / depth": colorize(1 / depth[view], lo=lo, hi=hi),
            f"error, to {100 * ERROR_TOP:.0f} %": colorize(
                error[view], valid=valid[view], lo=0.0, hi=ERROR_TOP, colormap="inferno"
            ),
        }
        if "expert_weights" in prediction:
            weights = prediction["expert_weights"][view]
            row["strongest expert"] = expert_map(weights)
            row["gate entropy"] = colorize(
                entropy(weights.astype(np.float64)), lo=0.0, hi=float(np.log(len(weights))), colormap="viridis"
            )
        rows.append(row)
    return rows


def map_sheet(scene: EvaluationScene, prediction: Mapping[str, Array]) -> Array:
    """`map_pictures` in one picture (height, width, 3) uint8 RGB, a row per view, titled."""
    return overview(map_pictures(scene, prediction))


def cloud_sheet(scene: EvaluationScene, prediction: Mapping[str, Array]) -> Array:
    """`cloud_pictures` in one picture (height, width, 3) uint8 RGB, side by side, titled."""
    return overview([cloud_pictures(scene, prediction)])


def write_pictures(scene: EvaluationScene, prediction: Mapping[str, Array], folder: Path) -> list[Path]:
    """Write `<scene>_maps.png` and `<scene>_points.png` into a folder that is made where it is missing.

    Files of these names are replaced: give each run over scenes a folder of its own.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sheets = {"maps": map_sheet, "points": cloud_sheet}
    files = [folder / f"{scene.name}_{kind}.png" for kind in sheets]
    for file, draw in zip(files, sheets.values(), strict=True):
        atomic_write(file, encode_png(draw(scene, prediction), file.name))
    return files

"""The maps of one view as pictures: 16-bit depth, and colours for depth, confidence and experts. It writes no files."""

from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np

from moe3d_deploy.errors import Moe3dError
from moe3d_deploy.runtime.colormaps import colorize, expert_map, inverse_depth, robust_range

PNG_MAX = 65535
MAPS = ("depth", "depth_conf", "expert_weights", "expert_entropy")
TITLES = {
    "depth_color": "1 / depth",
    "conf": "confidence",
    "experts": "strongest expert",
    "entropy": "gate entropy",
}
_TOP_PERCENTILE, _TOP_FACTOR = 99.9, 1.5  # of the scene's valid depths: what the depth PNG's largest value stands for


@dataclass(frozen=True)
class SceneScale:
    """What the numbers and colours of all views of one scene stand for.

    png       depth per step of the depth PNG
    ranges    the ends of the colours per kind of map; None where no pixel is valid
    """

    png: float
    ranges: dict[str, tuple[float, float] | None]

    @staticmethod
    def of(arrays: Mapping[str, np.ndarray], masks: np.ndarray, valid: np.ndarray) -> "SceneScale":
        """From all views (S, H, W): `masks` false on padding, `valid` true where the depth counts."""
        ranges = {
            "inverse_depth": robust_range(inverse_depth(arrays["depth"], valid)),
            "depth_conf": robust_range(arrays["depth_conf"], masks),
        }
        if "expert_entropy" in arrays:
            ranges["expert_entropy"] = robust_range(arrays["expert_entropy"], masks)
        return SceneScale(_png_scale(arrays["depth"][valid]), ranges)


def pictures(
    maps: Mapping[str, np.ndarray], mask: np.ndarray, valid: np.ndarray, scale: SceneScale
) -> dict[str, np.ndarray]:
    """The pictures of one view by the end of their file name: (H, W) uint16 depth, the others (H, W, 3) uint8 RGB.

    maps     some of MAPS without their axis S, depth and depth_conf among them
    mask     (H, W) bool, false on padding
    valid    (H, W) bool, where the depth counts
    """

    def colored(values: np.ndarray, name: str) -> np.ndarray:
        lo, hi = scale.ranges[name] or (0.0, 1.0)  # without a range no pixel is valid and all come out black
        return colorize(values, valid=mask, lo=lo, hi=hi)

    drawn = {
        "depth": _quantize(maps["depth"], valid, scale.png),
        "depth_color": colored(inverse_depth(maps["depth"], valid), "inverse_depth"),
        "conf": colored(maps["depth_conf"], "depth_conf"),
    }
    if "expert_weights" in maps:
        drawn["experts"] = expert_map(maps["expert_weights"], valid=mask)
    if "expert_entropy" in maps:
        drawn["entropy"] = colored(maps["expert_entropy"], "expert_entropy")
    return drawn


def saturated(depths: np.ndarray, scale: SceneScale) -> int:
    """How many of the valid `depths` (n,) are deeper than the depth PNG can say."""
    return int(np.count_nonzero(_steps(depths, scale.png) > PNG_MAX))


def photograph(image: np.ndarray) -> np.ndarray:
    """A network input (3, H, W) in [0, 1] as (H, W, 3) uint8 RGB."""
    return np.rint(image.transpose(1, 2, 0) * 255).astype(np.uint8)


def encode_png(picture: np.ndarray, name: str) -> bytes:
    """(H, W) or (H, W, 3) RGB to the bytes of a PNG; `name` is for the error."""
    done, data = cv2.imencode(".png", picture if picture.ndim == 2 else picture[..., ::-1])
    if not done:
        raise Moe3dError(f"{name}: a picture of shape {picture.shape} could not be encoded as PNG")
    return data.tobytes()


def _png_scale(depths: np.ndarray) -> float:
    """Depth per step of the PNG. A few outliers (below 0.1 % of the pixels) do not take the steps of all others."""
    if not depths.size:
        return 1.0
    values = depths.astype(np.float64)
    return min(float(values.max()), _TOP_FACTOR * float(np.percentile(values, _TOP_PERCENTILE))) / PNG_MAX


def _steps(depth: np.ndarray, scale: float) -> np.ndarray:
    return np.rint(depth.astype(np.float64) / scale)


def _quantize(depth: np.ndarray, valid: np.ndarray, scale: float) -> np.ndarray:
    """(H, W) uint16: depth / scale rounded, at most 65535; a valid depth below scale / 2 is 1, since 0 is invalid."""
    steps = _steps(np.where(valid, depth, 0), scale)
    return np.where(valid, np.clip(steps, 1, PNG_MAX), 0).astype(np.uint16)

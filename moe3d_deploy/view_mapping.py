"""Where the pixels of a network input lie in the photograph it was made from."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from moe3d_deploy.errors import InputError


@dataclass(frozen=True)
class ViewMapping:
    """Where the pixels of one view lie in its photograph.

    Per axis, with pixel centres at integer coordinates in both images:
    u_original = (u - offset + 0.5) * scale - 0.5

    name                   file name, with #<number> for a frame of a video or of an animated image; undecodable bytes
                           and control characters in it are escaped (`image_files.shown`)
    original_width/height  pixels of the photograph, after its EXIF orientation where that was applied
    scale_x/y              original pixels per network pixel
    offset_x/y             padding before the photograph, or minus the start of the crop, in network pixels
                           (fractional in mode "square", which pads before it resizes)
    """

    name: str
    original_width: int
    original_height: int
    scale_x: float
    scale_y: float
    offset_x: float
    offset_y: float

    def to_original(self, uv: ArrayLike) -> NDArray[np.float64]:
        """Network pixel coordinates (..., 2) as (u, v) -> original pixel coordinates (..., 2)."""
        uv = np.asarray(uv, np.float64)
        if uv.shape[-1:] != (2,):
            raise InputError(f"pixel coordinates have shape {uv.shape}; pass (..., 2)")
        return uv @ self._matrix[:2, :2] + self._matrix[:2, 2]

    def intrinsics_to_original(self, intrinsics: ArrayLike) -> NDArray[np.float64]:
        """Intrinsics (3, 3) in network pixels -> (3, 3) in original pixels."""
        intrinsics = np.asarray(intrinsics, np.float64)
        if intrinsics.shape != (3, 3):
            raise InputError(f"intrinsics have shape {intrinsics.shape}; pass one view's (3, 3)")
        return self._matrix @ intrinsics

    def valid_mask(self, height: int, width: int) -> NDArray[np.bool_]:
        """(height, width), true where the centre of a network pixel lies on the photograph, not on padding."""
        rows = _inside(height, self.offset_y, self.scale_y, self.original_height)
        columns = _inside(width, self.offset_x, self.scale_x, self.original_width)
        return rows[:, None] & columns[None, :]

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, for JSON."""
        return dataclasses.asdict(self)

    @property
    def _matrix(self) -> NDArray[np.float64]:
        """Homogeneous (3, 3) form of the mapping."""
        x = (0.5 - self.offset_x) * self.scale_x - 0.5
        y = (0.5 - self.offset_y) * self.scale_y - 0.5
        return np.array([[self.scale_x, 0.0, x], [0.0, self.scale_y, y], [0.0, 0.0, 1.0]])


def _inside(count: int, offset: float, scale: float, original: int) -> NDArray[np.bool_]:
    """(count,), true where pixel i of one axis has its centre within the photograph."""
    position = (np.arange(count) - offset + 0.5) * scale
    return (position >= 0) & (position < original)

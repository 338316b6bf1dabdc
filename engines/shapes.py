"""The shapes an engine is built for: the smallest, the typical and the largest number of scenes, views and pixels.

Text ranges as the command line takes them, checked here; nothing of TensorRT is needed.
"""

import re
from dataclasses import dataclass
from typing import Any

from moe3d_deploy.errors import InputError

Shape4 = tuple[int, int, int, int]
"""batch, views, height, width"""
Shape5 = tuple[int, int, int, int, int]

AXES = ("batch", "views", "height", "width")


@dataclass(frozen=True)
class ShapeProfile:
    """Three (batch, views, height, width) shapes; an engine accepts everything from `min` to `max`.

    The builder tunes for `opt`. Heights and widths are multiples of `patch_size` pixels. A contradiction raises
    InputError with the flag it comes from.
    """

    min: Shape4
    opt: Shape4
    max: Shape4
    patch_size: int = 14

    def __post_init__(self) -> None:
        if not _is_count(self.patch_size):
            raise InputError(f"shape profile: patch_size must be a positive integer, got {self.patch_size!r}")
        for name in ("min", "opt", "max"):
            shape = getattr(self, name)
            if not isinstance(shape, tuple) or len(shape) != 4 or not all(_is_integer(v) for v in shape):
                raise InputError(f"shape profile: {name} must be 4 integers ({', '.join(AXES)}), got {shape!r}")
        for axis, values in zip(AXES, zip(self.min, self.opt, self.max, strict=True), strict=True):
            _check_range(axis, values, self.patch_size)

    @classmethod
    def from_ranges(
        cls,
        batch: str = "1",
        views: str = "1:4:8",
        height: str = "140:392:518",
        width: str = "518",
        patch_size: int = 14,
    ) -> "ShapeProfile":
        """Read ranges written `value`, `min:max` (then opt = max) or `min:opt:max`; height and width in pixels."""
        texts = (batch, views, height, width)
        ranges = [parse_range(axis, text) for axis, text in zip(AXES, texts, strict=True)]
        low, typical, high = ((b, s, h, w) for b, s, h, w in zip(*ranges, strict=True))
        return cls(low, typical, high, patch_size)

    @classmethod
    def from_dict(cls, values: dict[str, Any], patch_size: int = 14) -> "ShapeProfile":
        """Read what `as_dict` wrote; anything else raises InputError."""
        if not isinstance(values, dict) or set(values) != {"min", "opt", "max"}:
            raise InputError(f"shape profile: expected an object with min, opt and max, got {values!r}")
        low, typical, high = (
            tuple(v) if isinstance(v, list) else v for v in (values["min"], values["opt"], values["max"])
        )
        return cls(low, typical, high, patch_size)

    def as_dict(self) -> dict[str, list[int]]:
        """The JSON form of the manifest: min, opt and max, each batch, views, height, width."""
        return {"min": list(self.min), "opt": list(self.opt), "max": list(self.max)}

    def accepts(self, shape: tuple[int, ...]) -> bool:
        """Whether an engine of this profile runs `shape` = (batch, views, height, width)."""
        if len(shape) != 4 or any(size % self.patch_size for size in shape[2:]):
            return False
        return all(low <= v <= high for low, v, high in zip(self.min, shape, self.max, strict=True))

    def image_shapes(self, channels_last: bool = False) -> tuple[Shape5, Shape5, Shape5]:
        """The three shapes of the input `images`: (B, S, 3, H, W), or (B, S, H, W, 3) for the uint8 variant."""

        def images(shape: Shape4) -> Shape5:
            b, s, h, w = shape
            return (b, s, h, w, 3) if channels_last else (b, s, 3, h, w)

        return images(self.min), images(self.opt), images(self.max)

    def symbol_sizes(self) -> tuple[dict[str, int], ...]:
        """The sizes of the contract's symbols at the three shapes; tokens lie on `rows` x `columns` patches."""
        patch = self.patch_size
        return tuple(
            {"B": b, "S": s, "H": h, "W": w, "rows": h // patch, "columns": w // patch}
            for b, s, h, w in (self.min, self.opt, self.max)
        )


def parse_range(axis: str, text: str) -> tuple[int, int, int]:
    """min, opt and max of a range's text. Raises InputError, with the flag, for another form."""
    parts = text.split(":")
    if len(parts) > 3 or not all(re.fullmatch("[0-9]{1,6}", part) for part in parts):
        raise InputError(f"--{axis} {text!r}: expected a number, min:max or min:opt:max, for example {_EXAMPLES[axis]}")
    values = [int(part) for part in parts]
    return values[0], values[len(values) // 2], values[-1]


_EXAMPLES = {"batch": "1", "views": "1:4:8", "height": "140:392:518", "width": "518"}


def _check_range(axis: str, values: tuple[int, int, int], patch_size: int) -> None:
    low, typical, high = values
    text = str(low) if low == high == typical else f"{low}:{typical}:{high}"
    if low < 1:
        raise InputError(f"--{axis} {text}: every size must be at least 1")
    if not low <= typical <= high:
        ordered = ":".join(map(str, sorted(values)))
        raise InputError(f"--{axis} {text}: sizes must rise, min <= opt <= max; in order: {ordered}")
    for value in values if axis in ("height", "width") else ():
        if value % patch_size:
            nearest = max(1, (value + patch_size // 2) // patch_size) * patch_size
            raise InputError(
                f"--{axis} {text}: {value} is not a multiple of the patch size {patch_size}; nearest is {nearest}"
            )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_integer(value) and value > 0

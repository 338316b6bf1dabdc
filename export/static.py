"""Axes that an exported file fixes: it is traced with every axis free, then sizes are bound to the symbols."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

from moe3d_deploy.errors import InputError
from moe3d_deploy.manifest import Preprocessing, Range, ShapeRanges

_SYMBOLS = ("B", "S", "H", "W")
_EXAMPLE = "1xSx392x518 fixes all but the views"


@dataclass(frozen=True)
class StaticShape:
    """The fixed sizes of scenes, views, and pixels of height and width; None leaves an axis free."""

    batch: int | None = None
    views: int | None = None
    height: int | None = None
    width: int | None = None

    @classmethod
    def parse(cls, text: str) -> "StaticShape":
        """Read `BxSxHxW`, each a number, or its letter (or `?`) for a free axis. Raises InputError."""
        parts = text.split("x")
        pattern = r"[1-9][0-9]{0,5}"
        if len(parts) != len(_SYMBOLS) or not all(
            part in (symbol, "?") or re.fullmatch(pattern, part) for part, symbol in zip(parts, _SYMBOLS, strict=True)
        ):
            raise InputError(
                f"--static {text!r}: expected scenes x views x height x width, BxSxHxW with numbers in place of what "
                f"is fixed; for example {_EXAMPLE}"
            )
        sizes = [int(part) if part.isdigit() else None for part in parts]
        if not any(sizes):
            raise InputError(f"--static {text} fixes nothing: leave it out, or give a size; {_EXAMPLE}")
        return cls(*sizes)

    def check(self, patch_size: int) -> None:
        """Raise InputError unless height and width are multiples of `patch_size`."""
        for axis in ("height", "width"):
            size = getattr(self, axis)
            if size is not None and size % patch_size:
                nearest = max(1, (size + patch_size // 2) // patch_size) * patch_size
                raise InputError(
                    f"--static: {axis} {size} is not a multiple of the patch size {patch_size}; nearest is {nearest}"
                )

    def bind(self, shape: Sequence[str | int], patch_size: int = 1) -> tuple[str | int, ...]:
        """A shape of the contract with the fixed sizes in place of their symbols; `rows` and `columns` are patches."""
        sizes = dict(zip(_SYMBOLS, dataclasses.astuple(self), strict=True))
        sizes |= {"rows": self.height and self.height // patch_size, "columns": self.width and self.width // patch_size}
        return tuple(sizes[dim] or dim if isinstance(dim, str) else dim for dim in shape)

    def ranges(self, free: ShapeRanges) -> ShapeRanges:
        """What the file accepts: `free`, but one value on a fixed axis."""
        fixed = {axis: Range(size, size) for axis, size in dataclasses.asdict(self).items() if size is not None}
        return dataclasses.replace(free, **fixed)

    def preprocessing(self, free: Preprocessing) -> Preprocessing:
        """How photographs become views of the fixed size.

        A square is what padding gives of any photograph; else the crop's width is the fixed one, and its height follows
        from the photograph.
        """
        if self.width is None:
            return free
        return dataclasses.replace(free, size=self.width, mode="pad" if self.height == self.width else free.mode)

    def verified(
        self, shapes: Sequence[tuple[int, int, int, int]], patch_size: int
    ) -> tuple[tuple[int, int, int, int], ...]:
        """`shapes` (B, S, rows, columns in patches) as far as the file takes them: fixed axes replaced, each once."""
        fixed = (
            self.batch,
            self.views,
            *(size and size // patch_size for size in (self.height, self.width)),
        )
        bound = (tuple(size or own for size, own in zip(fixed, shape, strict=True)) for shape in shapes)
        return tuple(dict.fromkeys(bound))  # type: ignore[arg-type]

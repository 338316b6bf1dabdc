"""Which frames of a video, of an animated image or of a list become views."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from moe3d_deploy.errors import InputError

_Item = TypeVar("_Item")

DEFAULT_FRAMES = 32  # of a video when nothing is said: its memory fits a machine where every frame's would not


@dataclass(frozen=True)
class FrameChoice:
    """Frames counted from 0, in order.

    stride      every stride-th from `start`, the first `max_views` of them
    no stride   all from `start`; where they are more than `max_views` (default: 32), that many evenly spaced ones, the
                middles of equal parts

    Raises InputError for a stride or a `max_views` below 1 or a start below 0.
    """

    stride: int | None = None
    start: int = 0
    max_views: int | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("stride", self.stride, 1),
            ("start", self.start, 0),
            ("max_views", self.max_views, 1),
        ):
            if value is not None and value < least:
                raise InputError(f"{name} is {value}; expected {least} or more")

    def numbers(self, count: int) -> Sequence[int]:
        """The chosen ones of `count` frames, ascending; none where `start` is beyond the last."""
        frames = range(self.start, count, self.stride or 1)
        if self.stride is not None:
            return frames[: self.max_views]
        return spaced(frames, DEFAULT_FRAMES if self.max_views is None else self.max_views)

    def note(self, name: str, chosen: Sequence[int], count: int) -> str:
        """One line for people: which frames of `count` were taken."""
        if len(chosen) == count:
            return f"{name}: all {count} frames"
        begin = f"{name}: {len(chosen)} of {count} frames"
        if self.stride is not None:
            return f"{begin}, every {self.stride} from {chosen[0]} to {chosen[-1]}"
        if len(chosen) == count - self.start:
            return f"{begin}, all from {self.start}"
        choose = "; --max-views and --frame-stride choose others" if self.max_views is None else ""
        return f"{begin}, evenly spaced from {chosen[0]} to {chosen[-1]}{choose}"


def spaced(items: Sequence[_Item], most: int) -> Sequence[_Item]:
    """`items`, or `most` of them: the middles of that many equal parts (the upper one of two)."""
    if len(items) <= most:
        return items
    return [items[(2 * i + 1) * len(items) // (2 * most)] for i in range(most)]

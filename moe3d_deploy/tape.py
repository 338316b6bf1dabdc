"""What memory_eager and memory_compiled write: a record of the tensors that a run makes and lets go."""

from bisect import bisect
from math import prod

from moe3d_deploy.costs import BYTES

FLOAT32 = BYTES["float32"]


class Tape:
    """Tensors in the order in which a run makes them and lets them go."""

    def __init__(self) -> None:
        self._events: list[tuple[int, int]] = []  # (tensor, bytes made) or (tensor, 0) where it goes
        self._count = 0

    def new(self, *dims: int, size: int = FLOAT32) -> int:
        """A tensor of these dimensions and bytes per value comes to life; returns what `free` takes."""
        self._count += 1
        self._events.append((self._count, prod(dims) * size))
        return self._count

    def free(self, *tensors: int) -> None:
        """These tensors are no longer needed."""
        self._events += [(tensor, 0) for tensor in tensors]

    def peak(self) -> int:
        """The largest sum of bytes alive at once: what an allocator without waste needs."""
        alive: dict[int, int] = {}
        now = largest = 0
        for tensor, size in self._events:
            now += size - alive.pop(tensor, 0)
            if size:
                alive[tensor] = size
            largest = max(largest, now)
        return largest

    def blocks(self) -> int:
        """The sum of the blocks of a plan that fixes, for every tensor, the block it lies in.

        Tensors that are never alive together may share a block, and it is as large as the largest of them. The largest
        tensors choose first, each the smallest block that is free during its life, else a new one: what planners call
        greedy by size (Pisarchyk and Lee 2020, "Efficient Memory Management for Deep Neural Net Inference").
        """
        made: dict[int, tuple[int, int]] = {}
        gone: dict[int, int] = {}
        for time, (tensor, size) in enumerate(self._events):
            if size:
                made[tensor] = (time, size)
            else:
                gone[tensor] = time
        blocks: list[_Block] = []
        for tensor, (start, size) in sorted(made.items(), key=lambda item: -item[1][1]):
            end = gone.get(tensor, len(self._events))
            block = next((block for block in reversed(blocks) if block.is_free(start, end)), None)  # the smallest first
            if block is None:
                block = _Block(size)
                blocks.append(block)
            block.take(start, end)
        return sum(block.size for block in blocks)


class _Block:
    """Memory that holds one tensor at a time; `size` is that of the first, the largest."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._starts: list[int] = []
        self._ends: list[int] = []

    def is_free(self, start: int, end: int) -> bool:
        after = bisect(self._starts, start)
        return (after == 0 or self._ends[after - 1] <= start) and (
            after == len(self._starts) or end <= self._starts[after]
        )

    def take(self, start: int, end: int) -> None:
        after = bisect(self._starts, start)
        self._starts.insert(after, start)
        self._ends.insert(after, end)

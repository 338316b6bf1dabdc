"""Figures as people read them, and tables of them in Markdown; the same everywhere a report is shown."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ABSENT = "–"


@dataclass(frozen=True)
class Table:
    """Rows of cells under a header; the first `words` columns are text, the others are numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: int = 1
    note: str = ""

    def markdown(self) -> str:
        align = ["---"] * self.words + ["---:"] * (len(self.header) - self.words)
        lines = [_row(self.header), _row(align), *map(_row, self.rows)]
        return "\n".join([f"## {self.title}", "", *lines, *(["", self.note] if self.note else [])])

    def plain(self) -> str:
        """For a terminal."""
        rows = [self.header, *self.rows]
        widths = [max(len(row[i]) for row in rows) for i in range(len(self.header))]
        lines = []
        for row in rows:
            cells = [
                cell.ljust(width) if i < self.words else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


def milliseconds(value: float | None) -> str:
    if value is None:
        return ABSENT
    if value >= 10_000:
        return f"{value / 1e3:.2f} s"
    return f"{value:.0f} ms" if value >= 1000 else f"{value:.3g} ms"


def seconds(value: float) -> str:
    return f"{value:.1f} s"


def size(value: float | None) -> str:
    """Bytes, as 1e6 and 1e9 of them."""
    if value is None:
        return ABSENT
    return f"{value / 1e9:.2f} GB" if abs(value) >= 1e9 else f"{value / 1e6:.0f} MB"


def ratio(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2f}"


def rate(value: float, unit: str) -> str:
    """FLOP/s or bytes/s, by the thousand: 123.4 GFLOP/s."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
        if value >= factor:
            return f"{value / factor:.4g} {prefix}{unit}/s"
    return f"{value / 1e6:.3g} M{unit}/s"


def shape(values: Sequence[int]) -> str:
    return "x".join(map(str, values))


def number(value: float | None, digits: int = 4) -> str:
    """So many digits, and all those before the decimal point."""
    if value is None:
        return ABSENT
    return f"{value:.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

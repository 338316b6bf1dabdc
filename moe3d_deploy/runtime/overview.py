"""One picture of a scene's results: a row per view, a titled column per kind of map."""

from collections.abc import Mapping, Sequence

import cv2
import numpy as np

MAX_ROWS = 8
CELL_WIDTH = 320  # pixels; narrower pictures keep their size
_GAP = 6
_TITLE_HEIGHT = 28
_BACKGROUND, _INK = 255, (40, 40, 40)
_FONT, _STROKE = (cv2.FONT_HERSHEY_SIMPLEX, 0.5), 1  # face and size, pixels


def overview(rows: Sequence[Mapping[str, np.ndarray]]) -> np.ndarray:
    """Lay pictures (H, W, 3) uint8 RGB out under their titles; all rows have the titles and sizes of the first.

    At most MAX_ROWS rows are shown; a column is as wide as its pictures or its title. Returns (height, width, 3) uint8
    RGB.
    """
    rows = rows[:MAX_ROWS]
    titles = list(rows[0])
    height, width = next(iter(rows[0].values())).shape[:2]
    cell_width = min(width, CELL_WIDTH)
    cell_height = max(1, round(height * cell_width / width))
    column_width = max(cell_width, *(cv2.getTextSize(title, *_FONT, _STROKE)[0][0] for title in titles))
    sheet = np.full(
        (
            _TITLE_HEIGHT + len(rows) * (cell_height + _GAP),
            len(titles) * (column_width + _GAP) + _GAP,
            3,
        ),
        _BACKGROUND,
        np.uint8,
    )
    for column, title in enumerate(titles):
        x = _GAP + column * (column_width + _GAP)
        cv2.putText(sheet, title, (x, _TITLE_HEIGHT - 9), *_FONT, _INK, _STROKE, cv2.LINE_AA)
        for row, pictures in enumerate(rows):
            y = _TITLE_HEIGHT + row * (cell_height + _GAP)
            cell = cv2.resize(pictures[title], (cell_width, cell_height), interpolation=cv2.INTER_AREA)
            sheet[y : y + cell_height, x : x + cell_width] = cell
    return sheet

"""The contact sheet: pictures land under their titles, at their size, in their colours."""

import numpy as np

from moe3d_deploy.runtime.overview import CELL_WIDTH, MAX_ROWS, overview

RED, BLUE = (255, 0, 0), (0, 0, 255)


def picture(color: tuple[int, int, int], height: int = 30, width: int = 60) -> np.ndarray:
    return np.full((height, width, 3), color, np.uint8)


def test_each_picture_stands_in_its_row_and_column_with_its_colour() -> None:
    sheet = overview([{"left": picture(RED), "right": picture(BLUE)}, {"left": picture(BLUE), "right": picture(RED)}])
    reds, blues = ((sheet == color).all(axis=-1) for color in (RED, BLUE))
    assert reds.sum() == blues.sum() == 2 * 30 * 60
    half_height, half_width = (sheet.shape[0] + 28) // 2, sheet.shape[1] // 2
    assert reds[:half_height, :half_width].sum() == 30 * 60
    assert reds[half_height:, half_width:].sum() == 30 * 60


def test_a_wide_picture_shrinks_in_proportion() -> None:
    sheet = overview([{"only": picture(RED, height=CELL_WIDTH, width=4 * CELL_WIDTH)}])
    rows, columns = np.nonzero((sheet == RED).all(axis=-1))
    assert np.ptp(columns) + 1 == CELL_WIDTH
    assert np.ptp(rows) + 1 == CELL_WIDTH // 4


def test_many_views_do_not_make_an_endless_sheet() -> None:
    rows = [{"only": picture(RED)}] * (MAX_ROWS + 5)
    assert overview(rows).shape == overview(rows[:MAX_ROWS]).shape


def test_the_title_is_drawn_above_the_pictures() -> None:
    sheet = overview([{"depth": picture(RED)}])
    assert (sheet[:28] < 200).any()


def test_titles_wider_than_their_pictures_do_not_run_into_each_other() -> None:
    titles = ["a title much wider than its picture", "another one"]
    sheet = overview([{title: picture(RED, width=20) for title in titles}])
    starts = np.flatnonzero(np.diff((sheet == RED).all(axis=-1).any(axis=0).astype(int)) == 1)
    ink = (sheet[:28] < 200).any(axis=(0, 2))
    assert len(starts) == 2
    assert not ink[starts[1] - 4 : starts[1] + 1].any()
    assert ink[: starts[1]].sum() > 100
    assert ink[starts[1] + 1 :].any()

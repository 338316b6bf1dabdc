"""The pictures of a comparison of heads: which part of a scene they show, and that right and blurred heads differ."""

import numpy as np
from judged_scenes import box_scene, itself

from moe3d_deploy.benchmarks.heads.pictures import edge_sheet, most_edges, point_sheet


def test_the_crop_is_where_most_steps_of_depth_are() -> None:
    """An 8 x 16 view has crops of 3 x 6. Steps: a column of 3 in view 1, fewer or too deep ones elsewhere."""
    depth = np.ones((2, 8, 16))
    depth[0, 2, 3] = 1.2  # too small a step
    depth[0, 5:, 10:] = 9  # more than 3 times as deep
    depth[1, 4:7, 12:] = 2
    depth[1, 0, 0] = 0  # not known
    view, rows, columns = most_edges(depth)
    assert view == 1
    assert (rows.start, rows.stop) in [(3, 6), (4, 7)]
    assert columns.start <= 11 < columns.stop


def test_pictures_show_the_crop_and_equal_clouds_alike() -> None:
    scene = box_scene(height=56, width=84)
    crop = most_edges(scene.truth["depth"])
    blurred = itself(scene)
    blurred["depth"] = blurred["depth"] + np.linspace(0, 1, 84, dtype=np.float32)
    weights = np.zeros((2, 4, 56, 84), np.float32)
    weights[:, 2] = 1
    predictions = {"same": itself(scene, 3.0), "blurred": {**blurred, "expert_weights": weights}}
    edges = edge_sheet(scene, predictions, crop)
    points = point_sheet(scene, predictions, crop)
    height, width = crop.rows.stop - crop.rows.start, crop.columns.stop - crop.columns.start
    factor = -(-220 // width)
    assert edges.shape == (28 + 3 * (height * factor + 6), 4 * (width * factor + 6) + 6, 3)
    expert = edges[-6 - height * factor // 2, -6 - width * factor // 2]
    assert expert.tolist() == [0, 158, 115]  # the third colour of the palette
    assert points.shape == (28 + 2 * 206, 3 * 306 + 6, 3)
    truth, same, other = (points[28:228, 6 + i * 306 : 306 + i * 306] for i in range(3))
    assert len(np.unique(truth.reshape(-1, 3), axis=0)) > 10
    drawn = np.mean(truth != truth[0, 0])
    assert np.mean(truth != same) < 0.1 * drawn
    assert np.mean(truth != other) > 0.3 * drawn

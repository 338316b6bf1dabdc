"""Fewer points: which ones stay, and that it is always the same ones."""

import re
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moe3d_deploy.errors import InputError
from moe3d_deploy.runtime import thinning
from moe3d_deploy.runtime.pointcloud import PointCloud, point_cloud
from moe3d_deploy.runtime.thinning import VoxelSize, one_per_voxel, scattered, scene_extent


def parts_of(points: np.ndarray, confidence: np.ndarray, *cuts: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    ids = np.arange(len(points)) * 3 + 7
    pieces = zip(*(np.split(array, cuts) for array in (points, confidence, ids)), strict=True)
    return [(a, b, c) for a, b, c in pieces]


def by_hand(points: np.ndarray, confidence: np.ndarray, size: float) -> list[int]:
    """One voxel after the other, in plain Python."""
    cells: dict[tuple[int, ...], list[tuple[float, int]]] = defaultdict(list)
    for index, point in enumerate(points.astype(np.float64)):
        cells[tuple(int(np.floor(x / size)) for x in point)].append((-float(confidence[index]), index * 3 + 7))
    return sorted(min(entries)[1] for entries in cells.values())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), count=st.integers(0, 300), size=st.sampled_from([0.05, 0.3, 1.0, 10.0]))
def test_the_most_confident_of_each_voxel_stays_and_of_equals_the_first(seed: int, count: int, size: float) -> None:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(count, 3)).astype(np.float32)
    confidence = rng.integers(1, 5, count).astype(np.float32)  # many are equal
    expected = by_hand(points, confidence, size)
    assert one_per_voxel(parts_of(points, confidence), size).tolist() == expected
    cuts = sorted(rng.integers(0, count + 1, 3).tolist())
    assert one_per_voxel(parts_of(points, confidence, *cuts), size).tolist() == expected, "however it is cut up"


def test_merging_in_between_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    points = rng.normal(size=(2000, 3)).astype(np.float32)
    confidence = rng.integers(1, 4, 2000).astype(np.float32)
    monkeypatch.setattr(thinning, "_PENDING", 50)
    kept = one_per_voxel(parts_of(points, confidence, *range(100, 2000, 100)), 0.5)
    assert kept.tolist() == by_hand(points, confidence, 0.5)


def test_voxels_meet_at_the_origin_without_a_double_one() -> None:
    points = np.array([[-0.1, 0, 0], [0.1, 0, 0], [0.9, 0, 0], [-0.9, 0, 0]], np.float32)
    assert one_per_voxel(parts_of(points, np.array([1, 2, 1, 5], np.float32)), 1.0).tolist() == [10, 16]


def test_a_voxel_too_small_for_the_scene_is_refused_with_one_that_works() -> None:
    points = np.array([[0, 0, 0], [5000, 0, 0]], np.float32)
    with pytest.raises(InputError, match=r"voxel size of 0.001 is too small .* reaches 5e\+03 .* give 0.0048 or more"):
        one_per_voxel(parts_of(points, np.ones(2, np.float32)), 0.001)
    assert len(one_per_voxel(parts_of(points, np.ones(2, np.float32)), 0.0048)) == 2


def suggestion(points: np.ndarray, cut: int, size: float, extent: float | None = None) -> str:
    with pytest.raises(InputError) as error:
        one_per_voxel(iter(parts_of(points, np.ones(len(points), np.float32), cut)), size, extent)
    return re.search(r"; give (\S+) or more, or drop more points$", str(error.value))[1]  # type: ignore[index]


@settings(max_examples=200, deadline=None)
@given(
    reach=st.floats(2.0**-20, 1e9, width=32),
    further=st.floats(1, 100, width=32),
    share=st.floats(1e-3, 1),
    signs=st.tuples(st.sampled_from([-1, 1]), st.sampled_from([-1, 1])),
    extent=st.none() | st.floats(1e-3, 1e6),
)
@example(reach=1080.0, further=1.0, share=0.9, signs=(1, 1), extent=None)
@example(reach=2.0**20 - 1, further=1.0, share=0.9, signs=(-1, -1), extent=None)
def test_the_voxel_that_a_refusal_names_is_taken(
    reach: float, further: float, share: float, signs: tuple[int, int], extent: float | None
) -> None:
    """Of two parts the second reaches further; a share of the extent is answered with one."""
    points = np.array([[signs[0] * reach, 0, 0], [0, signs[1] * reach * further, 0]], np.float32)
    named = suggestion(points, 1, float(np.abs(points).max()) / 2**20 * share, extent)
    assert named.endswith("%") is (extent is not None)
    voxel = VoxelSize.parse(named)
    size = voxel.value * (extent if voxel.relative and extent else 1)
    assert len(one_per_voxel(parts_of(points, np.ones(2, np.float32)), size, extent)) == 2
    enough = float(np.abs(points).max()) / (2**20 - 1)
    assert enough <= size <= enough * 1.11, "two digits, the least such size"


def test_a_share_of_the_scene_that_is_too_small_is_answered_with_a_share() -> None:
    result, images, masks = scene()
    result["depth"][0, 0, 0] = 5000
    with pytest.raises(InputError) as error:
        point_cloud(result, images, masks, drop_lowest=0, voxel=VoxelSize.parse("0.0001%"))
    named = re.fullmatch(
        r"a voxel size of 0.0001% is too small for a scene that reaches 5e\+03 units .*; give (\S+%) or more, .*",
        str(error.value),
    )
    assert named is not None
    assert len(point_cloud(result, images, masks, drop_lowest=0, voxel=VoxelSize.parse(named[1]))) > 0


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0.02", VoxelSize(0.02)),
        (" 1e-3 ", VoxelSize(0.001)),
        ("0.5%", VoxelSize(0.005, True)),
        ("2 %", VoxelSize(0.02, True)),
    ],
)
def test_a_size_is_a_number_or_a_share(text: str, size: VoxelSize) -> None:
    assert VoxelSize.parse(text) == size


@pytest.mark.parametrize("text", ["", "%", "small", "1m", "nan", "inf", "0", "-1", "1e999", "0%", "1%%", "--1", "1,5"])
def test_other_text_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match="voxel size"):
        VoxelSize.parse(text)


def test_the_extent_is_the_diagonal_of_most_points() -> None:
    """Evenly spaced numbers: the middle 98 % of a side of 3 and one of 4 are 0.98 times their length, diagonal 4.9."""
    steps = np.linspace(0, 1, 10_001)
    points = np.stack([3 * steps, 4 * steps[::-1], np.zeros(10_001)], axis=-1)
    assert scene_extent(points) == pytest.approx(4.9)
    points[:20] = 1e6
    assert scene_extent(points) < 5
    assert scene_extent(np.empty((0, 3))) == 0


def test_a_choice_has_the_size_asked_for_and_is_part_of_a_larger_one() -> None:
    ids = np.arange(100, 10_100)
    sizes = {count: scattered(ids, count) for count in (1, 10, 999, 5000, 9999)}
    assert all(np.count_nonzero(kept) == count for count, kept in sizes.items())
    for smaller, larger in zip(list(sizes), list(sizes)[1:], strict=False):
        assert not (sizes[smaller] & ~sizes[larger]).any()
    assert scattered(ids, 10_000).all()
    assert scattered(ids, 20_000).all()
    assert not scattered(ids, 0).any()
    assert scattered(np.empty(0, np.int64), 5).shape == (0,)


def test_a_choice_prefers_no_part_of_the_scene() -> None:
    """4096 of 2^16: each 16th of the ids has 256, with a spread of sqrt(256 * 15 / 16 * 15 / 16) = 14.5; five of them
    are 73. The same by the last four bits, where a regular step would show."""
    kept = np.flatnonzero(scattered(np.arange(2**16), 4096))
    for part in (kept >> 12, kept & 15):
        assert np.abs(np.bincount(part, minlength=16) - 256).max() < 73


def test_the_numbers_behind_a_choice_are_those_of_splitmix64() -> None:
    """The first three outputs of the generator with seed 0, as its authors' reference program prints them."""
    gamma = 0x9E3779B97F4A7C15
    states = np.array([0, gamma, 2 * gamma % 2**64], np.uint64)
    numbers = thinning._scramble(states)
    assert [hex(number) for number in numbers.tolist()] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


# ---- as a part of the point cloud


def scene(views: int = 3, height: int = 20, width: int = 30) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    result = {
        "depth": rng.uniform(1, 3, (views, height, width)).astype(np.float32),
        "depth_conf": (1 + rng.gamma(2, 2, (views, height, width))).astype(np.float32),
        "extrinsics": np.tile(np.eye(4, dtype=np.float32)[:3], (views, 1, 1)),
        "intrinsics": np.tile(np.array([[30, 0, 15], [0, 30, 10], [0, 0, 1]], np.float32), (views, 1, 1)),
    }
    return result, rng.random((views, 3, height, width), np.float32), np.ones((views, height, width), bool)


def rows(cloud: PointCloud) -> set[tuple[float, ...]]:
    return set(map(tuple, np.column_stack([cloud.points, cloud.colors, cloud.confidence]).tolist()))


def test_a_thinned_cloud_is_part_of_the_whole_one_in_the_same_order() -> None:
    whole = point_cloud(*scene(), drop_lowest=0.25)
    for thinned in (
        point_cloud(*scene(), drop_lowest=0.25, max_points=100),
        point_cloud(*scene(), drop_lowest=0.25, voxel=VoxelSize(0.3)),
        point_cloud(*scene(), drop_lowest=0.25, voxel=VoxelSize(0.1, relative=True), max_points=50),
        whole.limited(70),
    ):
        assert 0 < len(thinned) < len(whole)
        assert rows(thinned) < rows(whole)
        assert (np.diff(thinned.pixels) > 0).all()
    assert len(point_cloud(*scene(), max_points=100)) == 100
    assert rows(whole.limited(100)) == rows(point_cloud(*scene(), drop_lowest=0.25, max_points=100))


def test_voxels_of_a_cloud_are_those_of_its_points() -> None:
    whole = point_cloud(*scene(), drop_lowest=0.25)
    thinned = point_cloud(*scene(), drop_lowest=0.25, voxel=VoxelSize(0.3))
    expected = by_hand(whole.points, whole.confidence, 0.3)
    np.testing.assert_array_equal(thinned.pixels, whole.pixels[(np.array(expected) - 7) // 3])


def test_a_relative_size_is_of_the_scenes_extent() -> None:
    whole = point_cloud(*scene(), drop_lowest=0)
    relative = point_cloud(*scene(), drop_lowest=0, voxel=VoxelSize(0.05, relative=True))
    absolute = point_cloud(*scene(), drop_lowest=0, voxel=VoxelSize(0.05 * scene_extent(whole.points)))
    np.testing.assert_array_equal(relative.pixels, absolute.pixels)


def test_a_point_tells_the_pixel_it_came_from() -> None:
    result, images, masks = scene()
    cloud = point_cloud(result, images, masks, drop_lowest=0.5)
    view, rest = np.divmod(cloud.pixels, 20 * 30)
    np.testing.assert_array_equal(cloud.confidence, result["depth_conf"][view, rest // 30, rest % 30])
    np.testing.assert_allclose(cloud.points[:, 2], result["depth"][view, rest // 30, rest % 30], rtol=1e-6)


def test_nothing_to_thin_is_no_error() -> None:
    result, images, masks = scene()
    result["depth"][:] = np.nan
    assert len(point_cloud(result, images, masks, voxel=VoxelSize(0.1, relative=True), max_points=5)) == 0
    assert len(point_cloud(result, images, masks, voxel=VoxelSize(0.1), max_points=5)) == 0
    result["depth"][0, 0, 0] = 1
    assert len(point_cloud(result, images, masks, voxel=VoxelSize(0.1, relative=True), max_points=5)) == 1


@pytest.mark.parametrize("limit", [0, -5])
def test_a_limit_below_one_is_refused(limit: int) -> None:
    with pytest.raises(InputError, match=f"the largest number of points is {limit}; give 1 or more"):
        point_cloud(*scene(), max_points=limit)

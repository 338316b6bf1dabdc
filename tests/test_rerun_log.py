"""Rerun recordings, read back by rerun's own reader of .rrd files."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scenes import Arrays, turned_second_camera

from moe3d_deploy.errors import InputError, MissingExtraError, Moe3dError
from moe3d_deploy.images import ImageBatch
from moe3d_deploy.runtime.outputs import OutputOptions, check_formats, write_scene

pytest_plugins = ["scene_fixtures"]

needs_rerun = pytest.mark.skipif(importlib.util.find_spec("rerun") is None, reason="rerun is not installed")


@pytest.fixture
def result(batch: ImageBatch) -> Arrays:
    return turned_second_camera(batch)


def read_recording(path: Path) -> dict[str, dict[str, Any]]:
    """Entity -> component -> its one row, all of it static."""
    reader = pytest.importorskip("rerun.chunk").RrdReader(path)
    (recording,) = reader.recordings()
    assert recording.application_id == "moe3d"
    found: dict[str, dict[str, Any]] = {}
    for chunk in reader.stream(store=recording):
        assert chunk.is_static
        assert chunk.num_rows == 1
        columns = chunk.to_record_batch().to_pydict()
        values = {name: column[0] for name, column in columns.items() if ":" in name or name == "name"}
        found.setdefault(chunk.entity_path, {}).update(values)
    return found


@needs_rerun
def test_a_recording_holds_cameras_images_depth_and_points(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    result["depth"][0, 3, 5] = np.nan
    written = write_scene(result, batch, tmp_path / "out", formats=["rrd"], options=OutputOptions(drop_lowest=0))
    assert [path.name for path in written] == ["scene.rrd", "cameras.json"]
    found = read_recording(tmp_path / "out" / "scene.rrd")
    views = {
        f"/scene/views/{index:03d}{part}"
        for index in (0, 1)
        for part in ("", "/image", "/image/depth", "/image/confidence")
    }
    assert set(found) == {"/scene", "/scene/points", *views}

    camera = found["/scene/views/001"]
    assert camera["Transform3D:translation"] == [[0.5, -0.25, 2]]
    columns = np.array(camera["Transform3D:mat3x3"]).reshape(3, 3)  # stored column by column
    np.testing.assert_array_equal(columns.T, result["extrinsics"][1, :, :3])
    assert camera["Transform3D:relation"] == [2], "child from parent: camera from world"
    assert camera["name"] == ["left.jpg"]

    picture = found["/scene/views/001/image"]
    assert picture["Pinhole:resolution"] == [[56, 42]]
    np.testing.assert_array_equal(
        np.array(picture["Pinhole:image_from_camera"]).reshape(3, 3).T, result["intrinsics"][1]
    )
    picture = found["/scene/views/000/image"]
    pixels = np.array(picture["Image:buffer"], np.uint8).reshape(42, 56, 3)
    assert pixels[20, 10].tolist() == [40, 90, 200]

    depth = np.frombuffer(
        np.array(found["/scene/views/000/image/depth"]["DepthImage:buffer"], np.uint8).tobytes(), np.float32
    )
    expected = np.nan_to_num(result["depth"][0])
    assert expected[3, 5] == 0
    np.testing.assert_array_equal(depth.reshape(42, 56), expected)

    points = found["/scene/points"]
    assert len(points["Points3D:positions"][0:]) == (42 + 28) * 56 - 1
    assert points["Points3D:colors"][0] == 0x285AC8FF, "40, 90, 200, opaque"


@needs_rerun
def test_points_of_a_recording_are_thinned_as_the_others(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    write_scene(result, batch, tmp_path / "out", formats=["rrd"], options=OutputOptions(max_points=11))
    assert len(read_recording(tmp_path / "out" / "scene.rrd")["/scene/points"]["Points3D:positions"]) == 11


@needs_rerun
def test_broken_numbers_are_recorded_without_an_error(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    result["depth"][:] = np.nan
    result["extrinsics"][0] = np.nan
    write_scene(result, batch, tmp_path / "out", formats=["rrd"])
    found = read_recording(tmp_path / "out" / "scene.rrd")
    assert not found["/scene/points"].get("Points3D:positions")
    assert not any(found["/scene/views/000/image/depth"]["DepthImage:buffer"][0])


@needs_rerun
def test_a_recording_that_is_switched_off_is_an_error(
    result: Arrays, batch: ImageBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RERUN", "off")
    with pytest.raises(Moe3dError, match="recorded nothing; unset the variable RERUN"):
        write_scene(result, batch, tmp_path / "out", formats=["rrd"])
    assert list((tmp_path / "out").iterdir()) == []


def test_without_rerun_the_extra_is_named_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"^rerun is not installed: pip install 'moe3d-deploy\[viz\]'$"):
        check_formats(["rrd"])


def test_other_formats_do_not_import_rerun(
    result: Arrays, batch: ImageBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rerun", None)
    write_scene(result, batch, tmp_path / "out", formats=["ply", "colmap"])


def test_thinning_without_points_is_refused() -> None:
    with pytest.raises(InputError, match="there are no points to thin; add one of colmap, colmap-txt, glb, ply, rrd"):
        check_formats(["png"], OutputOptions(max_points=5))

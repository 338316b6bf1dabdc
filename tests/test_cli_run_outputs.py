"""`moe3d run`: what its options write, and the lines it prints for machines."""

import json
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import exports
import numpy as np
import pytest
from scenes import read_cameras, read_png
from videos import write_video

from moe3d_deploy.cli.main import main
from moe3d_deploy.runtime.onnx_backend import OnnxBackend

Capture = pytest.CaptureFixture[str]
Run = Callable[..., int]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """left.png, right.png: 85x57 pixels, so that one of 42 wide is 28 high."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name in ("left.png", "right.png"):
        cv2.imwrite(str(folder / name), rng.integers(0, 255, (57, 85, 3), dtype=np.uint8))
    return folder


@pytest.fixture
def run(photos: Path, tmp_path: Path) -> Run:
    def run_with(*options: str) -> int:
        images = [str(photos / name) for name in ("left.png", "right.png")]
        return main(["run", str(exports.bundle().path), *images, "-o", str(tmp_path / "out"), *options])

    return run_with


def json_lines(capsys: Capture) -> list[dict[str, Any]]:
    def refuse(token: str) -> None:
        raise ValueError(f"{token} is not JSON")

    out, err = capsys.readouterr()
    assert err == ""
    return [json.loads(line, parse_constant=refuse) for line in out.splitlines()]


def point_count(ply: Path) -> int:
    header = ply.read_bytes().partition(b"end_header")[0].decode()
    return int(header.partition("element vertex ")[2].split()[0])


def test_json_is_a_line_per_view_and_one_of_the_scene(run: Run, tmp_path: Path, capsys: Capture) -> None:
    assert run("--json") == 0
    *views, scene = json_lines(capsys)
    out = tmp_path / "out"

    depth = np.load(out / "scene.npz")["depth"]
    assert [view["type"] for view in views] == ["view", "view"]
    for index, view in enumerate(views):
        assert (view["scene"], view["index"], view["name"]) == (str(out), index, ("left.png", "right.png")[index])
        assert view["network_size"] == {"width": 42, "height": 28}
        assert view["original_size"] == {"width": 85, "height": 57}
        assert np.shape(view["intrinsics"]) == np.shape(view["intrinsics_original"]) == (3, 3)
        assert np.shape(view["extrinsics"]) == (3, 4)
        found = [view["depth_near"], view["depth_median"], view["depth_far"]]
        np.testing.assert_allclose(found, np.quantile(depth[index], (0, 0.5, 1)), rtol=1e-6)
        assert view["valid_fraction"] == 1
        assert view["files"]["depth"] == str(out / f"{index:03d}_{('left', 'right')[index]}_depth.png")
        assert all(Path(name).is_file() for name in view["files"].values())

    assert (scene["type"], scene["scene"], scene["model"]) == ("scene", str(out), "small")
    assert (scene["views"], scene["height"], scene["width"]) == (2, 28, 42)
    assert scene["points"] == point_count(out / "points.ply")
    assert set(scene["seconds"]) == {"load", "images", "model", "write"}
    assert {Path(name).name for name in scene["files"]} == {path.name for path in out.iterdir()}


def test_a_depth_that_is_not_finite_is_null_in_json(
    run: Run, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = OnnxBackend.run

    def broken(self: OnnxBackend, images: np.ndarray) -> dict[str, np.ndarray]:
        result = original(self, images)
        result["depth"][0, 1] = np.nan
        result["extrinsics"][0, 1, 0, 3] = np.inf
        return result

    monkeypatch.setattr(OnnxBackend, "run", broken)
    assert run("--json") == 0
    _, view, _ = json_lines(capsys)
    assert view["depth_near"] is view["depth_median"] is view["depth_far"] is None
    assert view["valid_fraction"] == 0
    assert view["extrinsics"][0][3] is None
    assert run("--formats", "npz") == 0
    assert "nan" not in capsys.readouterr().out


def test_a_scene_without_valid_depth_says_so(run: Run, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    original = OnnxBackend.run
    monkeypatch.setattr(
        OnnxBackend, "run", lambda self, images: {**(found := original(self, images)), "depth": 0 * found["depth"]}
    )
    assert run("--formats", "png") == 0
    assert capsys.readouterr().out.splitlines()[1] == "no pixel has a valid depth"


def test_original_resolution_is_written_on_request(run: Run, tmp_path: Path) -> None:
    assert run("--original", "--formats", "png,npz") == 0
    arrays = np.load(tmp_path / "out" / "scene_original.npz")
    assert arrays["depth_000"].shape == (57, 85)
    files = read_cameras(tmp_path / "out")["views"][1]["files"]
    assert read_png(tmp_path / "out" / files["original_depth"]).shape == (57, 85)


def test_a_colmap_model_is_written_in_both_forms(run: Run, tmp_path: Path) -> None:
    assert run("--formats", "colmap,colmap-txt", "--max-points", "20") == 0
    model = tmp_path / "out" / "sparse" / "0"
    assert struct.unpack("<Q", (model / "points3D.bin").read_bytes()[:8]) == (20,)
    assert [line.split()[1:4] for line in (model / "cameras.txt").read_text().splitlines()[1:]] == [
        ["PINHOLE", "85", "57"]
    ] * 2


def test_the_documented_extraction_gives_the_pictures_that_a_model_of_a_video_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (Path(__file__).parent.parent / "docs" / "outputs.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "clip.mp4")
    options = ["--max-views", "16", "-o", "out", "--formats", "colmap-txt"]
    assert main(["run", str(exports.bundle().path), "clip.mp4", *options]) == 0
    exec(compile(block, "docs/outputs.md", "exec"), {})
    rows = (tmp_path / "out" / "sparse" / "0" / "images.txt").read_text().splitlines()[1::2]
    names = [row.split()[9] for row in rows]
    assert sorted(path.name for path in (tmp_path / "out" / "images").iterdir()) == names
    sizes = {read_png(tmp_path / "out" / "images" / name).shape[:2] for name in names}
    cameras = (tmp_path / "out" / "sparse" / "0" / "cameras.txt").read_text().splitlines()[1:]
    assert {f"{width} {height}" for height, width in sizes} == {" ".join(row.split()[2:4]) for row in cameras}


def test_points_are_limited_and_thinned(run: Run, tmp_path: Path) -> None:
    assert run("--formats", "ply", "--max-points", "100") == 0
    assert point_count(tmp_path / "out" / "points.ply") == 100
    assert run("--formats", "ply", "--voxel", "20%", "--drop-lowest", "0") == 0
    assert 0 < point_count(tmp_path / "out" / "points.ply") < 2 * 28 * 42 // 4


def test_a_rerun_recording_is_written(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("rerun")
    assert run("--formats", "rrd") == 0
    assert (tmp_path / "out" / "scene.rrd").read_bytes()[:3] == b"RRF"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--original", "--formats", "ply"),
            "depth in the original resolution is written as png and npz; add one of them to the formats",
        ),
        (("--voxel", "small"), "voxel size 'small' is no size; give a number, or a share of the scene such as 0.5%"),
        (("--voxel", "0"), "voxel size is 0; give a number above 0"),
        (
            ("--voxel", "1", "--formats", "png"),
            "there are no points to thin; add one of colmap, colmap-txt, glb, ply, rrd to the formats",
        ),
    ],
)
def test_options_that_do_not_go_together_are_found_before_the_model(
    options: tuple[str, ...], message: str, run: Run, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnnxBackend, "__init__", lambda *_: pytest.fail("the model was loaded"))
    assert run(*options) == 2
    assert capsys.readouterr().err == f"moe3d: {message}\n"
    assert not (tmp_path / "out").exists()


def test_without_rerun_the_extra_is_named_before_the_model(
    run: Run, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnnxBackend, "__init__", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.delitem(sys.modules, "rerun", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    assert run("--formats", "rrd") == 1
    assert capsys.readouterr().err == "moe3d: rerun is not installed: pip install 'moe3d-deploy[viz]'\n"
    assert not (tmp_path / "out").exists()


def test_photographs_of_one_name_are_found_before_the_model(
    photos: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OnnxBackend, "__init__", lambda *_: pytest.fail("the model was loaded"))
    twice = [str(photos / "left.png")] * 2
    arguments = ["run", str(exports.bundle().path), *twice, "-o", str(tmp_path / "out"), "--formats", "colmap"]
    assert main(arguments) == 2
    assert capsys.readouterr().err.startswith(
        "moe3d: two views are named 'left.png', and a COLMAP model needs different"
    )
    assert not (tmp_path / "out").exists()

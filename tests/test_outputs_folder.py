"""The folder of a scene: the earlier scene or the new one, whole, whatever happens on the way."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scenes import Arrays, read_cameras

from moe3d_deploy.errors import InputError, Moe3dError
from moe3d_deploy.files import exclusive_lock
from moe3d_deploy.images import ImageBatch
from moe3d_deploy.runtime import output_folder
from moe3d_deploy.runtime.outputs import write_scene

pytest_plugins = ["scene_fixtures"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_second_scene_leaves_nothing_of_the_first(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    write_scene(result, batch, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "009_mine_depth.png").write_text("mine")
    one = ImageBatch(batch.images[:1], (dataclasses.replace(batch.views[0], name="other.png"),))
    arrays = {name: array[:1] for name, array in result.items()}
    written = write_scene(arrays, one, tmp_path / "out", formats=["png", "npz"])
    names = {path.name for path in written}
    assert "000_other_depth.png" in names
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"notes.txt", "009_mine_depth.png"}
    assert read_cameras(tmp_path / "out")["files"] == [path.name for path in written[:-1]]


def test_a_write_that_fails_leaves_the_earlier_scene(
    result: Arrays, batch: ImageBatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    write_scene(result, batch, out)
    before = contents(out)

    def fail(*_: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moe3d_deploy.runtime.outputs.cameras_json", fail)  # the last file written
    result["depth"] *= 2
    with pytest.raises(Moe3dError, match="out: cannot write the results .No space left on device") as error:
        write_scene(result, batch, out)
    assert error.value.exit_code == 1, "a failure, no bad input"
    assert contents(out) == before


@pytest.mark.parametrize("limit", [1_000, 60_000])
def test_a_full_disk_leaves_the_earlier_scene_and_one_line(tmp_path: Path, limit: int) -> None:
    """A limit on the size of a file stands for a full disk; scene.npz is the first above the larger ones."""
    program = f"""
        import resource, sys
        from pathlib import Path
        from scenes import random_result, two_photographs
        from moe3d_deploy.errors import Moe3dError
        from moe3d_deploy.runtime.outputs import FORMATS, write_scene
        batch = two_photographs(Path({str(tmp_path)!r}))
        result = random_result(batch)
        write_scene(result, batch, Path({str(tmp_path / "out")!r}), formats=FORMATS)
        result["depth"] *= 2
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
        try:
            write_scene(result, batch, Path({str(tmp_path / "out")!r}), formats=FORMATS)
        except Moe3dError as error:
            sys.exit(str(error))
    """
    done = run_python(program, timeout=60)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(
        "out: cannot write the results (File too large); make room or choose another place"
    )
    names = set(contents(tmp_path / "out"))
    assert names == {*read_cameras(tmp_path / "out")["files"], "cameras.json"}
    depth = np.load(tmp_path / "out" / "scene.npz")["depth"]
    assert depth.max() <= 4, "the depth of the first scene"


def run_python(program: str, timeout: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        cwd=Path(__file__).parent, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("step", [0, 1, 2, 9, 18, 25, 33])
def test_a_writer_that_stops_between_two_scenes_leaves_no_mixture(
    result: Arrays, batch: ImageBatch, tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before the n-th removal or renaming: one scene's files under its cameras.json, or no cameras.json.

    The process does not get to clean up, as with SIGKILL; the next writer then leaves nothing but its own scene.
    """

    class Stop(BaseException):
        pass

    out = tmp_path / "out"
    formats = ["png", "npz", "colmap"]
    write_scene(result, batch, out, formats=formats)
    (out / "notes.txt").write_text("mine")
    second = {**result, "depth": result["depth"] * 2}
    other = ImageBatch(batch.images, tuple(dataclasses.replace(view, name=f"x{view.name}") for view in batch.views))
    calls = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > step:
                raise Stop
            return function(*arguments, **options)

        return call

    replace = output_folder._replace_scene

    def stopped(folder: Path, staging: Path) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", counted(os.replace))
            patch.setattr(Path, "unlink", counted(Path.unlink))
            replace(folder, staging)

    with monkeypatch.context() as patch:
        patch.setattr(output_folder, "_replace_scene", stopped)
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        with pytest.raises(Stop):
            write_scene(second, other, out, formats=formats)
    if (out / "cameras.json").exists():
        names = read_cameras(out)["files"]
        assert all((out / name).is_file() for name in names)
        assert len({name.startswith("000_x") for name in names if name.startswith("000_")}) == 1
        first = read_cameras(out)["views"][0]["name"] == "left.png"
        assert (np.load(out / "scene.npz")["depth"].max() <= 4) == first
    written = write_scene(result, batch, out, formats=["npz"])
    assert set(contents(out)) == {path.name for path in written} | {"notes.txt"}
    assert sorted(entry.name for entry in out.iterdir()) == ["cameras.json", "notes.txt", "scene.npz"]


def test_a_writer_that_is_killed_is_cleaned_up_after(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    """SIGKILL while the files are written: the earlier scene stays, and the next writer removes what lies about."""
    out = tmp_path / "out"
    write_scene(result, batch, out, formats=["npz"])
    before = contents(out)
    program = f"""
        import os, signal
        from pathlib import Path
        from scenes import random_result, two_photographs
        from moe3d_deploy.runtime import outputs
        outputs.cameras_json = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        Path({str(tmp_path / "again")!r}).mkdir()
        batch = two_photographs(Path({str(tmp_path / "again")!r}))
        outputs.write_scene(random_result(batch), batch, Path({str(out)!r}))
    """
    assert run_python(program, timeout=60).returncode == -signal.SIGKILL
    left = contents(out)
    assert {name: left[name] for name in before} == before
    assert len(left) > len(before), "it was killed while it wrote"
    write_scene(result, batch, out, formats=["npz"])
    assert contents(out) == before


def test_a_second_writer_is_refused_and_disturbs_nothing(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_scene(result, batch, out)
    before = contents(out)
    with (
        exclusive_lock(out / ".moe3d-writing.lock"),
        pytest.raises(InputError, match="out: another process writes results there; wait for it or choose another"),
    ):
        write_scene(result, batch, out)
    assert contents(out) == before


def test_a_model_of_another_program_is_not_overwritten(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    model = tmp_path / "sparse" / "0"
    model.mkdir(parents=True)
    (model / "points3D.bin").write_text("a day of reconstruction")
    with pytest.raises(InputError, match="sparse/0 holds a model that is not of this program; move it away"):
        write_scene(result, batch, tmp_path, formats=["colmap"])
    assert (model / "points3D.bin").read_text() == "a day of reconstruction"
    write_scene(result, batch, tmp_path, formats=["npz"])
    assert (model / "points3D.bin").exists()


def test_a_scene_without_a_model_takes_the_earlier_model_and_its_folders_away(
    result: Arrays, batch: ImageBatch, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    write_scene(result, batch, out, formats=["colmap"])
    write_scene(result, batch, out, formats=["colmap", "colmap-txt"])
    assert len(contents(out)) == 7
    write_scene(result, batch, out, formats=["npz"])
    assert sorted(entry.name for entry in out.iterdir()) == ["cameras.json", "scene.npz"]


def test_a_scene_that_is_refused_leaves_the_earlier_one(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_scene(result, batch, out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    result["depth"][:] = 0
    with pytest.raises(InputError, match="leave glb out of the formats"):
        write_scene(result, batch, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


HOSTILE = [
    {"files": ["../overview.png", "/tmp/overview.png", "sub/000_x_depth.png", "thesis.pdf", "..", "", 7, None, "a\0b"]},
    {"files": "overview.png"},
    {"files": {"overview.png": 1}},
    {},
    ["overview.png"],
    "overview.png",
]


@pytest.mark.parametrize("text", [*map(json.dumps, HOSTILE), "", "{", "[" * 100_000, "\ud800"])
def test_only_a_scenes_own_files_are_removed_whatever_cameras_json_says(
    result: Arrays, batch: ImageBatch, tmp_path: Path, text: str
) -> None:
    out = tmp_path / "out"
    kept = ["../overview.png", "sub/000_x_depth.png", "thesis.pdf", "overview.png"]
    for name in kept:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    (out / "cameras.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    write_scene(result, batch, out, formats=["npz"])
    assert all((out / name).read_text() == "mine" for name in kept)
    assert read_cameras(out)["files"] == ["scene.npz"]


def test_a_pipe_or_link_for_cameras_json_is_replaced_unread(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    (tmp_path / "overview.png").write_text("mine")
    (tmp_path / "elsewhere.json").write_text('{"files": ["overview.png"]}')
    (tmp_path / "cameras.json").symlink_to("elsewhere.json")
    write_scene(result, batch, tmp_path, formats=[])
    assert (tmp_path / "overview.png").exists()
    assert (tmp_path / "elsewhere.json").exists()
    (tmp_path / "cameras.json").unlink()
    os.mkfifo(tmp_path / "cameras.json")
    write_scene(result, batch, tmp_path, formats=[])
    assert read_cameras(tmp_path)["files"] == []


def test_a_folder_that_cannot_be_made_is_named(result: Arrays, batch: ImageBatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/out: cannot write the results .* choose another output folder"):
        write_scene(result, batch, tmp_path / "file" / "out")


def test_a_folder_in_the_place_of_a_file_is_named_and_no_part_is_left(
    result: Arrays, batch: ImageBatch, tmp_path: Path
) -> None:
    (tmp_path / "out" / "scene.npz").mkdir(parents=True)
    with pytest.raises(InputError, match="out/scene.npz is a folder where a file of the scene belongs; move it away"):
        write_scene(result, batch, tmp_path / "out", formats=["npz"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["scene.npz"]

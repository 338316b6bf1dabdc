"""`moe3d run`: its inputs, from standard input to videos, and a scene per size."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exports
import numpy as np
import pytest
from PIL import Image
from videos import write_video

from moe3d_deploy.cli.main import main
from moe3d_deploy.errors import InputError
from moe3d_deploy.runtime.onnx_backend import OnnxBackend
from moe3d_deploy.runtime.session import Session

Capture = pytest.CaptureFixture[str]
Run = Callable[..., int]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    for name, size in (("wide", (12, 8)), ("tall", (8, 12)), ("other", (12, 8))):
        blocks = rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(np.kron(blocks, np.ones((7, 7, 1), np.uint8))).save(folder / f"{name}.png")
    write_video(folder / "clip.mkv")
    return folder


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Run:
    """run("wide.png", "--json"): the bundle on files of `folder`, written as npz to tmp_path/out."""

    def run_on(*arguments: str) -> int:
        names = [str(folder / word) if "." in word and word[0] != "-" else word for word in arguments]
        return main(["run", str(exports.bundle().path), *names, "-o", str(tmp_path / "out"), "--formats", "npz"])

    return run_on


def view_names(folder: Path) -> list[str]:
    return [view["name"] for view in json.loads((folder / "cameras.json").read_text())["views"]]


def json_scenes(capsys: Capture) -> list[dict[str, Any]]:
    """The lines of --json that tell of a scene."""
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    return [line for line in lines if "views" in line]


def error_of(capsys: Capture) -> str:
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    return err.rstrip("\n")


def test_a_video_is_a_scene_and_its_choice_is_told(run: Run, tmp_path: Path, capsys: Capture) -> None:
    assert run("clip.mkv", "--max-views", "3") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[0] == "clip.mkv: 3 of 40 frames, evenly spaced from 6 to 33"
    assert out.splitlines()[1].startswith("small: 3 views of 42x28; load ")
    assert view_names(tmp_path / "out") == ["clip.mkv#000006", "clip.mkv#000020", "clip.mkv#000033"]


def test_stride_start_and_limit_choose_frames(run: Run, tmp_path: Path, capsys: Capture) -> None:
    assert run("clip.mkv", "wide.png", "--frame-stride", "10", "--start", "5", "--max-views", "3", "--json") == 0
    (report,) = json_scenes(capsys)
    assert report["notes"] == ["clip.mkv: 2 of 40 frames, every 10 from 5 to 15"]
    assert view_names(tmp_path / "out") == ["clip.mkv#000005", "clip.mkv#000015", "wide.png"]


def test_frames_of_an_animation_are_asked_for(run: Run, folder: Path, tmp_path: Path, capsys: Capture) -> None:
    frames = [Image.new("L", (84, 56), 90 * i) for i in range(3)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    assert run("moving.gif") == 0
    out, err = capsys.readouterr()
    assert err == (
        f'warning: image "{folder}/moving.gif" has several frames or pages; '
        "only the first is used (--all-frames takes them all)\n"
    )
    assert view_names(tmp_path / "out") == ["moving.gif"]
    assert run("moving.gif", "--all-frames") == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[0] == "moving.gif: all 3 frames"
    assert view_names(tmp_path / "out") == [f"moving.gif#{i:06d}" for i in range(3)]


def test_pictures_of_one_name_do_not_collide(folder: Path, tmp_path: Path) -> None:
    photo = str(folder / "wide.png")
    assert main(["run", str(exports.bundle().path), photo, photo, "-o", str(tmp_path), "--formats", "png"]) == 0
    assert {"000_wide_depth.png", "001_wide_depth.png"} <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("name", [b"caf\xe9.png", b"two\nlines.png", b"\x1b[31mred.png", b"-o.png"])
def test_a_strange_name_gives_a_scene(folder: Path, tmp_path: Path, capsys: Capture, name: bytes) -> None:
    path = os.fsencode(tmp_path) + b"/" + name
    with open(path, "wb") as file:
        file.write((folder / "wide.png").read_bytes())
    assert main(["run", str(exports.bundle().path), os.fsdecode(path), "-o", str(tmp_path / "out")]) == 0
    assert all(written.name.isascii() and written.name.isprintable() for written in (tmp_path / "out").iterdir())
    (shown,) = view_names(tmp_path / "out")
    assert shown.isprintable()


def test_an_image_is_read_from_standard_input(folder: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "moe3d_deploy",
        "run",
        str(exports.bundle().path),
        "-",
        "-o",
        str(tmp_path / "out"),
    ]
    data = (folder / "wide.png").read_bytes()
    done = subprocess.run(command, input=data, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert view_names(tmp_path / "out") == ["stdin"]
    done = subprocess.run(command, input=data[:200], capture_output=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(b"moe3d: image from standard input cannot be decoded (")


def test_a_large_image_is_not_warned_of(run: Run, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow warns from half its limit on; the limit is enforced anyway."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 84 * 56 - 1)
    assert run("wide.png") == 0
    assert capsys.readouterr().err == ""


def test_a_warning_of_the_image_reader_is_one_line(run: Run, folder: Path, capsys: Capture) -> None:
    image = Image.open(folder / "wide.png")
    image.save(folder / "exif.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert run("exif.png") == 0
    err = capsys.readouterr().err
    assert err.startswith("warning: an image may be damaged: Corrupt EXIF data.")
    assert all(line.startswith("warning: an image may be damaged: ") for line in err.splitlines())


# ---- a scene per size


def test_groups_are_scenes_in_folders_of_their_size(run: Run, tmp_path: Path, capsys: Capture) -> None:
    assert run("wide.png", "tall.png", "other.png", "--group-by-size") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "2 scenes, one per size: 42x28 (2 views), 42x42 (1 view); each has a world frame and a scale of its own"
    )
    assert [line.split(";")[0] for line in lines if line.startswith("small: ")] == [
        "small: 2 views of 42x28",
        "small: 1 views of 42x42",
    ]
    assert lines[-1] == f"2 files in {tmp_path / 'out' / '42x42'}: cameras.json, npz"
    assert view_names(tmp_path / "out" / "42x28") == ["wide.png", "other.png"]
    assert view_names(tmp_path / "out" / "42x42") == ["tall.png"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"42x28", "42x42"}


def test_a_group_is_computed_as_if_it_were_alone(run: Run, tmp_path: Path) -> None:
    assert run("wide.png", "tall.png", "other.png", "--group-by-size") == 0
    with np.load(tmp_path / "out" / "42x28" / "scene.npz") as arrays:
        grouped = arrays["depth"]
    assert run("wide.png", "other.png") == 0
    with np.load(tmp_path / "out" / "scene.npz") as arrays:
        np.testing.assert_array_equal(grouped, arrays["depth"])


def test_json_has_a_line_per_scene(run: Run, capsys: Capture) -> None:
    assert run("wide.png", "tall.png", "--group-by-size", "--json") == 0
    scenes = json_scenes(capsys)
    assert [(scene["views"], scene["width"], scene["height"]) for scene in scenes] == [(1, 42, 28), (1, 42, 42)]
    assert all(Path(name).is_file() for scene in scenes for name in scene["files"])
    assert [len(scene["notes"]) for scene in scenes] == [1, 1]
    assert [set(scene["seconds"]) for scene in scenes] == [{"load", "images", "model", "write"}, {"model", "write"}]


def test_another_run_leaves_nothing_of_the_earlier_scenes(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("wide.png") == 0
    assert run("wide.png", "tall.png", "--group-by-size") == 0
    assert {path.name for path in out.iterdir()} == {"42x28", "42x42"}
    (out / "42x42" / "mine.txt").touch()
    assert run("wide.png") == 0
    assert {path.name for path in out.iterdir()} == {"scene.npz", "cameras.json", "42x42"}
    assert [path.name for path in (out / "42x42").iterdir()] == ["mine.txt"], "what is not a scene's stays"


def test_a_folder_named_like_a_size_that_was_a_runs_own_output_stays(run: Run, folder: Path, tmp_path: Path) -> None:
    mine = tmp_path / "out" / "518x392"
    arguments = ["run", str(exports.bundle().path), str(folder / "wide.png"), "-o", str(mine), "--formats", "npz"]
    assert main(arguments) == 0
    for options in ((), ("--group-by-size",), ()):
        assert run("wide.png", "tall.png", *options) == 0
        assert {path.name for path in mine.iterdir()} == {"scene.npz", "cameras.json"}, options
    assert not (tmp_path / "out" / "42x28").exists()


def test_a_scene_of_a_group_that_got_a_new_owner_stays(run: Run, folder: Path, tmp_path: Path) -> None:
    """One written anew by a run of its own, one moved here from another output folder."""
    out, elsewhere = tmp_path / "out", tmp_path / "elsewhere"
    pictures = [str(folder / "wide.png"), str(folder / "tall.png")]
    bundle = str(exports.bundle().path)
    assert run("wide.png", "tall.png", "--group-by-size") == 0
    assert main(["run", bundle, pictures[0], "-o", str(out / "42x28"), "--formats", "npz"]) == 0
    assert main(["run", bundle, *pictures, "-o", str(elsewhere), "--formats", "npz", "--group-by-size"]) == 0
    (elsewhere / "42x28").rename(out / "41x27")
    assert run("tall.png") == 0
    assert {path.name for path in out.iterdir()} == {"42x28", "41x27", "scene.npz", "cameras.json"}
    assert view_names(out / "42x28") == view_names(out / "41x27") == ["wide.png"]


# ---- what is refused, before a model is loaded


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(self: OnnxBackend, model: Path) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(OnnxBackend, "__init__", load)


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("none.mp4",), '"{folder}/none.mp4" is neither a file nor a folder; check the path'),
        (("-", "-"), '"-" is given 2 times; standard input holds one image: name it once'),
        (
            ("wide.png", "--frame-stride", "2"),
            "a stride or a start is for videos (and animated images with --all-frames); none is given",
        ),
        (
            ("wide.png", "clip.mkv", "--max-views", "1"),
            "1 image and 1 video do not fit in 1 view; raise --max-views or name fewer",
        ),
        (("clip.mkv", "--start", "99"), 'video "{folder}/clip.mkv" has 40 frames; start at 0 to 39, not 99'),
    ],
)
def test_inputs_that_do_not_fit_are_one_line_and_code_2(
    arguments: tuple[str, ...], message: str, run: Run, folder: Path, tmp_path: Path, capsys: Capture
) -> None:
    assert run(*arguments) == 2
    assert error_of(capsys) == "moe3d: " + message.format(folder=folder)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_model")
def test_a_group_that_the_model_cannot_take_is_named(
    run: Run, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(self: Session, images: np.ndarray) -> None:
        if len(images) == 1:
            raise InputError("images: views is 1; accepted are 2 and more")

    monkeypatch.setattr(Session, "check", check)
    assert run("wide.png", "tall.png", "other.png", "--group-by-size") == 2
    assert error_of(capsys) == "moe3d: 42x42: images: views is 1; accepted are 2 and more"
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_model")
def test_a_terminal_as_standard_input_is_not_waited_for(
    run: Run, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Terminal(io.BytesIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(Terminal()))
    assert run("-") == 2
    assert error_of(capsys) == ('moe3d: "-" reads an image from standard input, but nothing is piped in; name a file')


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize("option", [("--max-views", "0"), ("--frame-stride", "0"), ("--start", "-1")])
def test_a_number_out_of_range_is_a_usage_error(option: tuple[str, str], run: Run, capsys: Capture) -> None:
    assert run("wide.png", *option) == 2
    assert error_of(capsys).endswith("(see moe3d --help)")

"""Which files inputs name, and files that cannot be opened: none may hang, crash or be taken for another."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from moe3d_deploy import image_files
from moe3d_deploy.errors import InputError
from moe3d_deploy.image_files import shown
from moe3d_deploy.images import find_images, load_images

# ---- what is found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("frame_10.png", "frame_2.PNG", "Frame_1.JPG", "notes.txt", ".hidden.png"):
        (tmp_path / "scan" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "scan" / name).touch()
    (tmp_path / "scan" / "deeper.png").mkdir()
    (tmp_path / "scan" / "deeper.png" / "a.png").touch()
    return tmp_path / "scan"


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_folder_gives_its_images_in_natural_order(folder: Path) -> None:
    assert names(find_images([folder])) == ["Frame_1.JPG", "frame_2.PNG", "frame_10.png"]


def test_pattern_gives_its_images_in_natural_order(folder: Path) -> None:
    assert names(find_images([f"{folder}/*_[12]*"])) == ["Frame_1.JPG", "frame_2.PNG", "frame_10.png"]
    assert names(find_images([f"{folder}/**/*.png"])) == ["a.png", "frame_10.png"]  # ** is any depth, none included


def test_arguments_keep_their_order_and_may_come_twice(folder: Path) -> None:
    files = [folder / "frame_10.png", folder / "notes.txt", folder / "deeper.png", folder / "frame_10.png"]
    assert names(find_images(files)) == ["frame_10.png", "notes.txt", "a.png", "frame_10.png"]


@pytest.mark.parametrize("name", ["a[1].png", "with space.png", "line\nbreak.png", "κάτι.png", "-", "*.png"])
def test_a_file_is_itself_whatever_its_name(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (28, 28)).save(tmp_path / name, "PNG")
    assert find_images([tmp_path / name]) == [tmp_path / name]
    assert len(load_images([tmp_path / name], size=28).views) == 1


def test_a_name_of_bytes_that_are_no_utf8_is_read_and_shown_escaped(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/caf\xe9 \n.png"
    with open(path, "wb") as file:
        Image.new("RGB", (28, 28)).save(file, "PNG")
    assert load_images([path], size=28).views[0].name == r"caf\xe9 \n.png"
    assert names(find_images([path])) == names(find_images([tmp_path])) == [os.fsdecode(b"caf\xe9 \n.png")]
    with open(path, "wb"):
        pass
    with pytest.raises(InputError) as caught:
        load_images([path])
    assert str(caught.value) == rf'image "{tmp_path}/caf\xe9 \n.png" is empty (0 bytes); copy or record it again'


def test_what_is_shown_is_printable() -> None:
    assert shown("κάτι ü.png") == "κάτι ü.png"
    assert shown("a\x1b[31m\u202eb\u2028.png") == r"a\x1b[31m\u202eb\u2028.png"


def test_a_link_to_an_image_is_the_image(tmp_path: Path) -> None:
    Image.new("RGB", (28, 28)).save(tmp_path / "real.png")
    (tmp_path / "link.png").symlink_to("real.png")
    assert names(find_images([tmp_path])) == ["link.png", "real.png"]
    assert load_images([tmp_path / "link.png"], size=28).views[0].name == "link.png"


def test_a_single_path_is_not_split_into_characters(folder: Path) -> None:
    assert len(find_images(str(folder))) == 3


def test_a_folder_of_ten_thousand_images_is_quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Making the files takes longer than finding them, so one stands for all."""
    (tmp_path / "f.JPG").touch()
    stat = os.stat
    asked = []

    def stat_of_one(path: str | Path) -> os.stat_result:
        asked.append(path)
        return stat(tmp_path / "f.JPG" if str(path) != str(tmp_path) else tmp_path)

    monkeypatch.setattr(os, "listdir", lambda folder: [f"f{i}.JPG" for i in reversed(range(10_000))])
    monkeypatch.setattr(os, "stat", stat_of_one)
    started = time.process_time()
    found = find_images([tmp_path])
    seconds = time.process_time() - started
    monkeypatch.undo()
    assert [names(found)[i] for i in (0, 1, 10, -1)] == ["f0.JPG", "f1.JPG", "f10.JPG", "f9999.JPG"]
    assert len(asked) == 10_001, "each file is looked at once, and none is opened"
    assert seconds < 3.0  # 0.15 s where it was measured


# ---- what is refused


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gone.png", '"{folder}/gone.png" is neither a file nor a folder; check the path'),
        ("gone_*.png", 'pattern "{folder}/gone_*.png" matches no image file; check the path'),
        ("*.txt", 'pattern "{folder}/*.txt" matches no image file; check the path'),
        ("empty", 'folder "{folder}/empty" holds no image; its sub-folders are not searched'),
        ("frame_2.PNG/a.png", '"{folder}/frame_2.PNG/a.png" is neither a file nor a folder; check the path'),
        ("x" * 300, f'"{{folder}}/{"x" * 300}" is neither a file nor a folder; check the path'),
        ("a\0b*.png", r'"{folder}/a\x00b*.png" is neither a file nor a folder; check the path'),
        ("\x1b[2J.png", r'pattern "{folder}/\x1b[2J.png" matches no image file; check the path'),
    ],
)
def test_input_without_images_is_named(folder: Path, name: str, message: str) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(InputError) as caught:
        find_images([folder / "frame_2.PNG", folder / name])
    assert str(caught.value) == message.format(folder=folder)


def test_an_empty_name_is_not_the_current_folder() -> None:
    with pytest.raises(InputError, match='"" is neither a file nor a folder'):
        find_images([""])


def test_no_inputs_are_refused() -> None:
    with pytest.raises(InputError, match="no images given; name at least one image file, folder or pattern"):
        find_images([])


def pipe(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(path))


def broken_link(path: Path) -> None:
    path.symlink_to("gone.png")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


SPECIAL = {
    pipe: "is a pipe, not a file; save what it gives to a file first",
    unix_socket: "is a socket, not a file; save what it gives to a file first",
    broken_link: 'is a link to "gone.png", which does not exist; mend or remove it',
    loop: "cannot be read: Too many levels of symbolic links",
}


@pytest.mark.parametrize("make", SPECIAL)
def test_what_is_no_file_is_named_and_nothing_waits(
    make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path is short
    make(Path("x.png"))
    for inputs in ("x.png", ".", "*.png"):
        with pytest.raises(InputError) as caught:
            find_images([inputs])
        assert str(caught.value) == f'"{"./x.png" if inputs == "." else "x.png"}" {SPECIAL[make]}'.replace("./x", "x")
    with pytest.raises(InputError, match=re.escape(f'image "x.png" {SPECIAL[make]}')):
        load_images(["x.png"])


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/dev/zero", 'image "/dev/zero" is a device, not a file; save what it gives to a file first'),
        ("/dev", 'image "/dev" is a folder; name the files in it'),
    ],
)
def test_a_device_or_folder_is_named(path: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_images([path])
    assert str(caught.value) == message


def test_a_pipe_put_in_place_after_the_check_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "x.png")
    monkeypatch.setattr(image_files, "fault_of", lambda path: None)
    with pytest.raises(InputError, match=r'x\.png" was replaced while it was opened; try again'):
        load_images([tmp_path / "x.png"])


def test_a_folder_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> list[str]:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(InputError) as caught:
        find_images([tmp_path])
    assert str(caught.value) == f'folder "{tmp_path}" cannot be read: Permission denied'


def test_a_file_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, flags: int) -> int:
        raise PermissionError(13, "Permission denied", path)

    (tmp_path / "a.png").touch()
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(InputError) as caught:
        load_images([tmp_path / "a.png"])
    assert str(caught.value) == f'image "{tmp_path}/a.png" cannot be read: Permission denied'


def test_an_enormous_file_is_refused_before_it_fills_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_files, "MAX_FILE_BYTES", 1000)
    with open(tmp_path / "a.png", "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InputError) as caught:
        load_images([tmp_path / "a.png"])
    assert str(caught.value) == (
        f'image "{tmp_path}/a.png" has more than 1000 bytes; save it compressed, as PNG or JPEG'
    )


SHRINKS = """
import sys, os
from PIL import Image
from moe3d_deploy.errors import InputError
from moe3d_deploy.images import load_images
path = sys.argv[1]
open_image = Image.open
def open_and_shrink(*args, **kwargs):
    image = open_image(*args, **kwargs)
    os.truncate(path, 200)
    return image
Image.open = open_and_shrink
try:
    print(load_images([path], size=28).images.shape)
except InputError as error:
    print(error)
"""


@pytest.mark.parametrize("suffix", ["bmp", "ppm", "tif"])
def test_a_file_that_shrinks_while_it_is_read_kills_nobody(tmp_path: Path, suffix: str) -> None:
    """Pillow maps uncompressed files into memory when it has their path; a page that is gone then ends the process."""
    path = tmp_path / f"a.{suffix}"
    Image.new("RGB" if suffix == "tif" else "L", (600, 400), 7).save(path)
    done = subprocess.run([sys.executable, "-c", SHRINKS, path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(1, 3, 14, 28)\n", "what was read at once is whole"

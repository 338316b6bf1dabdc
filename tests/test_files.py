"""Files appear whole or not at all, and a lock is held by one."""

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moe3d_deploy import files
from moe3d_deploy.files import (
    atomic_path,
    atomic_write,
    exclusive_lock,
    remove_partials,
    sha256_file,
    sha256_pieces,
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1])
def test_digest_is_that_of_the_whole_file_around_the_chunk_size(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "f").write_bytes(data)
    assert sha256_file(tmp_path / "f") == hashlib.sha256(data).hexdigest()


def test_digest_of_a_published_test_vector(tmp_path: Path) -> None:
    """FIPS 180-2, appendix B.1: SHA-256 of "abc"."""
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_file(tmp_path / "f") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 3 << 20])
def test_pieces_are_those_of_the_file_in_order(tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    (tmp_path / "f").write_bytes(data)
    length = max(1000, size // 2)  # of the largest: more than is read at once
    expected = [hashlib.sha256(data[i : i + length]).hexdigest() for i in range(0, size, length)]
    assert sha256_pieces(tmp_path / "f", length) == expected


def test_atomic_write_replaces_the_content_and_leaves_no_other_file(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a.json", b"old")
    atomic_write(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_bytes() == b"new"
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_block_that_raises_leaves_the_old_file_and_no_temporary_one(
    tmp_path: Path, error: type[BaseException]
) -> None:
    final = tmp_path / "a.plan"
    final.write_bytes(b"old")

    def write_half() -> None:
        with atomic_path(final) as temp:
            temp.write_bytes(b"half")
            raise error

    with pytest.raises(error):
        write_half()
    assert final.read_bytes() == b"old"
    assert names(tmp_path) == ["a.plan"]


def test_the_temporary_name_is_hidden_recognisable_beside_the_final_one_and_of_its_suffix(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "depth.png") as temp:
        assert temp.parent == tmp_path
        assert temp.name.startswith(".depth.partial-")
        assert temp.suffix == ".png"
        temp.write_bytes(b"x")


def test_nothing_written_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing was written for .*a.plan"), atomic_path(tmp_path / "a.plan"):
        pass
    assert names(tmp_path) == []


def test_the_content_is_synced_before_the_rename_and_the_folder_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[str] = []
    replace = os.replace

    def record_replace(source: Path, target: Path) -> None:
        steps.append("rename")
        replace(source, target)

    monkeypatch.setattr(files, "sync", lambda path: steps.append("folder" if Path(path).is_dir() else "file"))
    monkeypatch.setattr(os, "replace", record_replace)
    atomic_write(tmp_path / "a", b"x")
    assert steps == ["file", "rename", "folder"]


def test_remains_of_a_killed_writer_are_removed_and_nothing_else(tmp_path: Path) -> None:
    script = (
        "import os, signal, sys; from pathlib import Path; from moe3d_deploy.files import atomic_path\n"
        "with atomic_path(Path(sys.argv[1])) as temp:\n"
        "    temp.write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, tmp_path / "a.plan"], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(names(tmp_path)) == 1
    for name in ("a.plan", "b.partial-0123abcd.plan", ".partial", ".a.partial-xyz.plan"):
        (tmp_path / name).write_bytes(b"mine")
    remove_partials(tmp_path)
    assert names(tmp_path) == sorted(["a.plan", "b.partial-0123abcd.plan", ".partial", ".a.partial-xyz.plan"])


def test_a_lock_is_refused_while_held_and_its_file_goes_with_it(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with exclusive_lock(lock):
        with pytest.raises(BlockingIOError), exclusive_lock(lock):
            pass
        assert lock.exists()
    assert not lock.exists()
    with exclusive_lock(lock):
        pass


def test_a_lock_file_left_by_a_dead_process_does_not_block(tmp_path: Path) -> None:
    (tmp_path / "lock").touch()
    with exclusive_lock(tmp_path / "lock"):
        pass


def test_two_processes_never_hold_the_lock_at_once(tmp_path: Path) -> None:
    """Each holder creates a file that must not exist yet; a lock file removed under a waiting process would show."""
    script = (
        "import os, sys; from pathlib import Path; from moe3d_deploy.files import exclusive_lock\n"
        "folder, held = Path(sys.argv[1]), 0\n"
        "while held < 300:\n"
        "    try:\n"
        "        with exclusive_lock(folder / 'lock'):\n"
        "            os.close(os.open(folder / 'inside', os.O_CREAT | os.O_EXCL)); os.unlink(folder / 'inside')\n"
        "            held += 1\n"
        "    except BlockingIOError: pass\n"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, tmp_path]) for _ in range(3)]
    assert [process.wait(timeout=60) for process in running] == [0, 0, 0]


def test_a_held_lock_raises_what_it_is_told_and_nothing_of_the_block(tmp_path: Path) -> None:
    lock = tmp_path / ".lock"
    with exclusive_lock(lock), pytest.raises(ValueError, match="busy"):
        exclusive_lock(lock, ValueError("busy")).__enter__()
    with pytest.raises(BlockingIOError, match="of a pipe"), exclusive_lock(lock, ValueError("busy")):
        raise BlockingIOError("of a pipe")

"""A bundle is checked before anything reads it, and appears whole or not at all, however its writer ends."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from test_manifest import ENGINE, example_engine, example_manifest

from moe3d_deploy.bundle import Bundle, BundleWriter, add_engine, engine_name, is_bundle
from moe3d_deploy.errors import BundleError, InputError
from moe3d_deploy.manifest import MANIFEST_NAME, MAX_BYTES, EngineRecord, Manifest, Profile

# Field 2 of an ONNX file, its producer's name: tag, length, text.
OLD, NEW = b"\x12\x09old model", b"\x12\x11new model, longer"


def write_bundle(path: Path, model: bytes = OLD, overwrite: bool = False) -> Bundle:
    with BundleWriter(path, overwrite) as writer:
        (writer.folder / "model.onnx").write_bytes(model)
        (writer.folder / "model.onnx.data").write_bytes(b"weights")
        return writer.commit(example_manifest())


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A good bundle with one engine, alone in its folder."""
    path = tmp_path / "work" / "bundle"
    path.parent.mkdir()
    write_bundle(path)
    add_engine(path, example_engine(), build_old)
    return path


def build_old(temp: Path, manifest: Manifest) -> None:
    temp.write_bytes(b"old engine")


def build_new(temp: Path, manifest: Manifest) -> None:
    temp.write_bytes(b"new engine")


def siblings(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.parent.iterdir())


def content(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def refusal(path: Path, verify: str = "full") -> str:
    with pytest.raises(BundleError) as caught:
        Bundle.open(path, verify=verify)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert any(remedy in message for remedy in ("again", "give the folder", "rename")), "the message names no remedy"
    return message


def edit_manifest(path: Path, **changes: object) -> None:
    values = json.loads((path / MANIFEST_NAME).read_text())
    (path / MANIFEST_NAME).write_text(json.dumps({**values, **changes}))


# Opening


def test_a_good_bundle_opens_with_its_paths(bundle: Path) -> None:
    for opened in (Bundle.open(bundle), Bundle.open(str(bundle), verify="sizes")):
        assert opened.path == bundle
        assert opened.model_path.read_bytes() == OLD
        assert opened.engine_path(opened.manifest.engines[0]).read_bytes() == b"old engine"
        assert sorted(opened.manifest.files) == [ENGINE, "model.onnx", "model.onnx.data"]


def test_a_bundle_opens_where_it_was_copied_and_through_a_link_to_it(bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(bundle, tmp_path / "copy")
    (tmp_path / "current").symlink_to("copy")
    assert Bundle.open(tmp_path / "current").manifest == Bundle.open(bundle).manifest


def test_files_that_the_manifest_does_not_name_are_ignored(bundle: Path) -> None:
    (bundle / "README.md").write_text("notes")
    (bundle / ".DS_Store").write_bytes(b"")
    Bundle.open(bundle)


def test_a_record_of_another_bundle_has_no_path_here(bundle: Path) -> None:
    with pytest.raises(InputError, match=r"engines/other\.plan is no engine of bundle"):
        Bundle.open(bundle).engine_path(example_engine("engines/other.plan"))


def test_a_missing_bundle_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "bundle")


def test_a_file_in_place_of_a_bundle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bundle").write_bytes(b"")
    assert "is not a folder" in refusal(tmp_path / "bundle")


def test_a_folder_without_a_manifest_is_refused(bundle: Path) -> None:
    (bundle / MANIFEST_NAME).unlink()
    assert "has no manifest.json" in refusal(bundle)


@pytest.mark.parametrize("keep", [0, 1, 100, -2])
def test_a_truncated_manifest_is_refused(bundle: Path, keep: int) -> None:
    file = bundle / MANIFEST_NAME
    file.write_bytes(file.read_bytes().rstrip()[:keep])
    assert "manifest.json is not JSON" in refusal(bundle)


def test_a_manifest_that_is_not_utf8_is_refused(bundle: Path) -> None:
    (bundle / MANIFEST_NAME).write_bytes(b'{"name": "\xff"}')
    assert "is not UTF-8" in refusal(bundle)


def test_a_huge_manifest_is_refused_unread(bundle: Path) -> None:
    os.truncate(bundle / MANIFEST_NAME, MAX_BYTES + 1)
    assert f"has {MAX_BYTES + 1} bytes" in refusal(bundle)


def test_another_format_version_is_refused(bundle: Path) -> None:
    edit_manifest(bundle, format_version=7)
    with pytest.raises(BundleError, match=r"manifest\.json has format_version 7; .* update moe3d-deploy"):
        Bundle.open(bundle)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", ENGINE])
@pytest.mark.parametrize("verify", ["full", "sizes"])
def test_a_missing_file_is_refused(bundle: Path, name: str, verify: str) -> None:
    (bundle / name).unlink()
    assert f"{name} is missing" in refusal(bundle, verify)


@pytest.mark.parametrize("verify", ["full", "sizes"])
@pytest.mark.parametrize("size", [0, len(OLD) - 1, len(OLD) + 1])
def test_a_file_of_another_size_is_refused(bundle: Path, size: int, verify: str) -> None:
    os.truncate(bundle / "model.onnx", size)
    assert f"model.onnx has {size} bytes, not {len(OLD)}" in refusal(bundle, verify)


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", ENGINE])
def test_one_flipped_bit_is_refused_unless_digests_are_left_out(bundle: Path, name: str) -> None:
    data = bytearray((bundle / name).read_bytes())
    data[-1] ^= 1
    (bundle / name).write_bytes(data)
    assert f"{name} is damaged" in refusal(bundle)
    Bundle.open(bundle, verify="sizes")


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "engines\\model.plan", "engines//a"])
def test_a_name_that_leads_elsewhere_is_refused_before_that_file_is_touched(bundle: Path, name: str) -> None:
    (bundle.parent / "outside").write_bytes(b"abc")
    files = json.loads((bundle / MANIFEST_NAME).read_text())["files"]
    edit_manifest(bundle, files={**files, name: {"size": 3, "sha256": "0" * 64}})
    with pytest.raises(BundleError, match=r"manifest\.json: files: "):
        Bundle.open(bundle)


@pytest.mark.parametrize("name", ["model.onnx", ENGINE, MANIFEST_NAME])
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_a_link_in_place_of_a_file_is_refused_wherever_it_points(bundle: Path, name: str, where: str) -> None:
    target = (bundle if where == "inside" else bundle.parent) / "target"
    (bundle / name).rename(target)
    (bundle / name).symlink_to(target)
    assert f"{name} is a link" in refusal(bundle)


def test_a_linked_folder_is_refused(bundle: Path) -> None:
    (bundle / "engines").rename(bundle.parent / "engines")
    (bundle / "engines").symlink_to("../engines")
    assert "engines is a link" in refusal(bundle)


def test_a_link_that_the_manifest_does_not_name_is_refused(bundle: Path) -> None:
    (bundle / "engines" / "notes").symlink_to("nowhere")
    assert "notes is a link" in refusal(bundle)


@pytest.mark.parametrize("name", ["model.onnx", MANIFEST_NAME, "unnamed"])
def test_a_pipe_is_refused_without_waiting_for_it(bundle: Path, name: str) -> None:
    (bundle / name).unlink(missing_ok=True)
    os.mkfifo(bundle / name)
    assert f"{name} is neither a file nor a folder" in refusal(bundle)


def test_a_folder_that_is_no_bundle_is_called_so_whatever_else_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    assert "has no manifest.json, so it is not a bundle" in refusal(tmp_path)


def test_a_folder_in_place_of_the_manifest_is_refused(bundle: Path) -> None:
    (bundle / MANIFEST_NAME).unlink()
    (bundle / MANIFEST_NAME).mkdir()
    assert "manifest.json is not a regular file" in refusal(bundle)


def test_a_folder_in_place_of_a_file_is_refused(bundle: Path) -> None:
    (bundle / "model.onnx").unlink()
    (bundle / "model.onnx").mkdir()
    assert "model.onnx is not a regular file" in refusal(bundle)


def test_a_name_too_long_for_the_file_system_is_refused(bundle: Path) -> None:
    files = json.loads((bundle / MANIFEST_NAME).read_text())["files"]
    edit_manifest(bundle, files={**files, "x" * 5000: {"size": 3, "sha256": "0" * 64}})
    assert "cannot be read" in refusal(bundle)


def spoil(path: Path, how: str) -> None:
    """Do something to the engine of `bundle`."""
    if how == "no folder":
        shutil.rmtree(path / "engines")
    elif how == "missing":
        (path / ENGINE).unlink()
    elif how == "cut off":
        os.truncate(path / ENGINE, 3)
    else:
        (path / ENGINE).write_bytes(b"OLD ENGINE")


SPOILT = {
    "no folder": "is missing",
    "missing": "is missing",
    "cut off": "has 3 bytes, not 10",
    "damaged": "is damaged: its SHA-256 is not the manifest's",
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_engine_does_not_matter_to_a_reader_of_the_onnx_file(bundle: Path, how: str) -> None:
    spoil(bundle, how)
    refusal(bundle)
    opened = Bundle.open(bundle, engines=False)
    assert opened.model_path.read_bytes() == OLD
    remedy = "; copy the bundle again or build the engine again"
    assert opened.engine_faults() == {ENGINE: f"{bundle / ENGINE} {SPOILT[how]}{remedy}"}
    assert (opened.engine_faults("sizes") == {}) == (how == "damaged")


def test_whole_engines_have_no_faults(bundle: Path) -> None:
    assert Bundle.open(bundle).engine_faults() == {}


def test_without_the_engines_their_names_and_the_model_are_still_checked(bundle: Path) -> None:
    files = json.loads((bundle / MANIFEST_NAME).read_text())["files"]
    (bundle / "model.onnx.data").write_bytes(b"WEIGHTS")
    with pytest.raises(BundleError, match=r"model\.onnx\.data is damaged"):
        Bundle.open(bundle, engines=False)
    edit_manifest(bundle, files={**files, "engines/../../a": files[ENGINE]})
    with pytest.raises(BundleError, match="leads out of its folder"):
        Bundle.open(bundle, engines=False)


def test_what_is_to_be_opened_as_a_bundle(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "model.safetensors").write_bytes(b"")
    (tmp_path / "checkpoint" / "model.onnx").write_bytes(b"")
    for other in ("checkpoint", "nothing", "x" * 5000):
        assert not is_bundle(tmp_path / other)
    assert not is_bundle("moe3d-tiny")
    assert is_bundle(bundle)
    (bundle / MANIFEST_NAME).rename(bundle / "kept")
    assert is_bundle(str(bundle)), "it has lost its manifest, which Bundle.open says"
    (bundle / MANIFEST_NAME).symlink_to("kept")
    assert is_bundle(bundle), "its manifest is a link, which Bundle.open says"
    bundle.rename(bundle.with_name(".bundle.old-0123456789abcdef"))
    assert is_bundle(bundle), "it was moved aside, which Bundle.open says"


def external(location: str) -> bytes:
    """An ONNX file with one tensor whose values lie at `location`."""
    tensor = onnx.TensorProto(name="w", dims=[1], data_type=1, data_location=1)
    tensor.external_data.add(key="location", value=location)
    return onnx.ModelProto(graph=onnx.GraphProto(initializer=[tensor])).SerializeToString()


@pytest.mark.parametrize("verify", ["full", "sizes"])
@pytest.mark.parametrize(
    "location", ["stowaway", "./model.onnx.data", "../outside", "/etc/passwd", "", "manifest.json"]
)
def test_weights_in_a_file_that_the_manifest_does_not_name_are_refused(
    bundle: Path, location: str, verify: str
) -> None:
    (bundle / "stowaway").write_bytes(b"1234")
    write = external(location)
    files = json.loads((bundle / MANIFEST_NAME).read_text())["files"]
    (bundle / "model.onnx").write_bytes(write)
    entry = {"size": len(write), "sha256": hashlib.sha256(write).hexdigest()}
    edit_manifest(bundle, files={**files, "model.onnx": entry})
    assert f"model.onnx has weights in {location!r}, which is not among the manifest's files" in refusal(bundle, verify)


def test_weights_are_looked_for_before_a_bundle_is_committed(tmp_path: Path) -> None:
    write_bundle(tmp_path / "good", external("model.onnx.data"))
    assert Bundle.open(tmp_path / "good")
    with pytest.raises(BundleError, match=r"model\.onnx has weights in 'other\.data'"):
        write_bundle(tmp_path / "bad", external("other.data"))
    with pytest.raises(BundleError, match=r"model\.onnx is not an ONNX file: it ends too early"):
        write_bundle(tmp_path / "bad", b"\x12\x7fcut off")
    assert not (tmp_path / "bad").exists()


def test_an_unknown_way_to_verify_is_an_error(bundle: Path) -> None:
    with pytest.raises(InputError, match="verify is 'none'; use 'full' or 'sizes'"):
        Bundle.open(bundle, verify="none")  # type: ignore[arg-type]


# Writing


def test_nothing_is_under_the_final_name_before_the_commit_and_nothing_else_after_it(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    with BundleWriter(path) as writer:
        assert writer.folder.parent == tmp_path
        assert writer.folder.name.startswith(".bundle.partial-")
        (writer.folder / "model.onnx").write_bytes(OLD)
        assert not path.exists()
        written = writer.commit(example_manifest())
        assert Bundle.open(path) == written
    assert siblings(path) == ["bundle"]


def test_a_block_without_a_commit_leaves_nothing(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "bundle") as writer:
        (writer.folder / "model.onnx").write_bytes(OLD)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_an_exception_leaves_only_the_old_bundle(bundle: Path, error: type[BaseException]) -> None:
    before = content(bundle)

    def fail_half_way() -> None:
        with BundleWriter(bundle, overwrite=True) as writer:
            (writer.folder / "engines").mkdir()
            (writer.folder / "engines" / "half.plan").write_bytes(b"half")
            raise error

    with pytest.raises(error):
        fail_half_way()
    assert content(bundle) == before
    assert siblings(bundle) == ["bundle"]


@pytest.mark.parametrize("failing_call", [1, 2])
def test_an_interrupt_in_either_rename_of_an_overwrite_leaves_only_the_old_bundle(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, failing_call: int
) -> None:
    before = content(bundle)
    rename, calls = Path.rename, 0

    def interrupted(source: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == failing_call:
            raise KeyboardInterrupt
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_bundle(bundle, NEW, overwrite=True)
    assert content(bundle) == before
    assert siblings(bundle) == ["bundle"]


def test_an_existing_bundle_is_replaced_only_when_asked(bundle: Path) -> None:
    with pytest.raises(InputError, match="exists; choose another name or ask for it to be overwritten"):
        BundleWriter(bundle)
    write_bundle(bundle, NEW, overwrite=True)
    assert Bundle.open(bundle).model_path.read_bytes() == NEW
    assert not (bundle / ENGINE).exists(), "an engine of the old model is left"
    assert siblings(bundle) == ["bundle"]


def test_a_damaged_bundle_can_be_replaced(bundle: Path) -> None:
    (bundle / MANIFEST_NAME).write_bytes(b"")
    write_bundle(bundle, NEW, overwrite=True)
    Bundle.open(bundle)


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_not_a_bundle_is_never_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "photos"
    if kind == "folder":
        path.mkdir()
        (path / "a.jpg").write_bytes(b"precious")
    else:
        path.write_bytes(b"precious")
    with pytest.raises(InputError, match="exists and is not a bundle, so it is never overwritten"):
        BundleWriter(path, overwrite=True)


def test_an_empty_folder_may_become_the_bundle(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    write_bundle(tmp_path / "bundle")
    Bundle.open(tmp_path / "bundle")


def test_a_missing_parent_is_an_error_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"folder .*/absent does not exist; create it"):
        BundleWriter(tmp_path / "absent" / "bundle")


def test_a_mount_point_is_an_error_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path)
    with pytest.raises(InputError, match="is a mount point, which cannot be replaced; write to a folder inside it"):
        BundleWriter(tmp_path)


def test_everything_is_synced_before_the_bundle_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[str] = set()
    move = BundleWriter._move_in_place

    def record(path: Path) -> None:
        synced.add("/".join(path.parts[len(tmp_path.parts) + 1 :]))

    def move_when_synced(writer: BundleWriter, folder: Path) -> None:
        names = {name for name in synced if ".partial-" not in name}
        assert names == {"", "model.onnx", "engines", "engines/a", "engines/a/b.plan"}
        assert any(name.startswith(".manifest.partial-") for name in synced)
        move(writer, folder)

    monkeypatch.setattr("moe3d_deploy.bundle.sync", record)
    monkeypatch.setattr("moe3d_deploy.files.sync", record)
    monkeypatch.setattr(BundleWriter, "_move_in_place", move_when_synced)
    with BundleWriter(tmp_path / "bundle") as writer:
        (writer.folder / "engines" / "a").mkdir(parents=True)
        (writer.folder / "engines" / "a" / "b.plan").write_bytes(b"engine")
        (writer.folder / "model.onnx").write_bytes(OLD)
        writer.commit(example_manifest())


def test_files_that_appear_in_the_destination_meanwhile_are_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    with BundleWriter(path, overwrite=True) as writer:
        (writer.folder / "model.onnx").write_bytes(OLD)
        path.mkdir()
        (path / "a.jpg").write_bytes(b"precious")
        with pytest.raises(InputError, match="is not a bundle"):
            writer.commit(example_manifest())
    assert content(path) == {"a.jpg": b"precious"}
    assert siblings(path) == ["bundle"]


@pytest.mark.parametrize(
    ("name", "message"), [("a b.onnx", "staged file 'a b.onnx'"), (MANIFEST_NAME, "cannot be the manifest")]
)
def test_a_staged_name_that_no_reader_accepts_is_refused(tmp_path: Path, name: str, message: str) -> None:
    with BundleWriter(tmp_path / "bundle") as writer:
        (writer.folder / "model.onnx").write_bytes(OLD)
        (writer.folder / name).write_bytes(b"x")
        with pytest.raises(BundleError, match=message):
            writer.commit(example_manifest())
    assert list(tmp_path.iterdir()) == []


def test_a_staged_link_is_refused(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "bundle") as writer:
        (writer.folder / "model.onnx").symlink_to("/dev/null")
        with pytest.raises(BundleError, match=r"model\.onnx is a link"):
            writer.commit(example_manifest())


def test_a_bundle_without_its_model_is_not_committed(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "bundle") as writer, pytest.raises(BundleError, match=r"'model\.onnx' is not among"):
        writer.commit(example_manifest())
    assert list(tmp_path.iterdir()) == []


def test_a_writer_serves_one_commit_inside_its_block(tmp_path: Path) -> None:
    writer = BundleWriter(tmp_path / "bundle")
    with pytest.raises(InputError, match="is closed; use it in its with block, before commit"):
        writer.commit(example_manifest())
    with writer:
        (writer.folder / "model.onnx").write_bytes(OLD)
        writer.commit(example_manifest())
        with pytest.raises(InputError, match="is closed"):
            writer.commit(example_manifest())


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "model.onnx")

    monkeypatch.setattr("moe3d_deploy.bundle.sync", full)
    with pytest.raises(BundleError, match="cannot be written: .*No space left on device.*check space"):
        write_bundle(tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


# Processes that die or meet

KILL = "import os, signal; kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
WRITE_SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_bundle import NEW, write_bundle
from moe3d_deploy.bundle import BundleWriter
rename, step = Path.rename, [0]
def count(source, target):
    step[0] += 1
    if step[0] == 2: kill()
    return rename(source, target)
"""
KILL_POINTS = {
    "while staging": "Path.write_bytes = kill\n",
    "before the manifest": "import moe3d_deploy.bundle as b; b._write_manifest = kill\n",
    "after the manifest": "BundleWriter._move_in_place = kill\n",
    "with the old one aside": "Path.rename = count\n",
    "before the old one is removed": "import shutil; shutil.rmtree = kill\n",
}


def killed(script: str, *args: object) -> None:
    process = subprocess.run([sys.executable, "-c", script, *map(str, args)], check=False)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("point", KILL_POINTS)
def test_a_killed_writer_leaves_a_whole_bundle_and_the_next_one_cleans_up(bundle: Path, point: str) -> None:
    before = content(bundle)
    script = KILL + WRITE_SCRIPT + KILL_POINTS[point] + "write_bundle(Path(sys.argv[1]), NEW, True)"
    killed(script, bundle, Path(__file__).parent)
    assert len(siblings(bundle)) >= 2, "nothing was left, so this test shows nothing"
    if point == "with the old one aside":
        assert "was moved aside for a new one that did not come; rename" in refusal(bundle)
    elif point == "before the old one is removed":
        assert Bundle.open(bundle).model_path.read_bytes() == NEW
    else:
        assert content(bundle) == before
    with BundleWriter(bundle, overwrite=True):
        pass
    assert siblings(bundle) == ["bundle"]
    if point == "before the old one is removed":
        assert Bundle.open(bundle).model_path.read_bytes() == NEW
    else:
        assert content(bundle) == before


def test_a_bundle_that_a_killed_writer_moved_aside_is_back_before_the_next_one_decides(bundle: Path) -> None:
    before = content(bundle)
    script = KILL + WRITE_SCRIPT + KILL_POINTS["with the old one aside"] + "write_bundle(Path(sys.argv[1]), NEW, True)"
    killed(script, bundle, Path(__file__).parent)
    with pytest.raises(InputError, match="exists; choose another name"), BundleWriter(bundle):
        pytest.fail("the work was begun")
    assert content(bundle) == before
    assert siblings(bundle) == ["bundle"]


def test_cleaning_up_touches_no_other_name(tmp_path: Path) -> None:
    others = [".bundle.partial-mine", ".bundle2.partial-0123456789abcdef", ".bundle.x.partial-0123456789abcdef"]
    for name in others:
        (tmp_path / name).mkdir()
    (tmp_path / ".bundle.partial-0123456789abcdef").mkdir()
    write_bundle(tmp_path / "bundle")
    assert siblings(tmp_path / "bundle") == sorted([*others, "bundle"])


def test_the_second_of_two_writers_is_refused_and_the_first_undisturbed(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    with BundleWriter(path) as first:
        (first.folder / "model.onnx").write_bytes(OLD)
        with pytest.raises(BundleError, match="is being written by another process; wait until it has ended"):
            write_bundle(path, NEW)
        first.commit(example_manifest())
    assert Bundle.open(path).model_path.read_bytes() == OLD
    assert siblings(path) == ["bundle"]


def test_a_writer_of_another_process_keeps_its_folder_and_its_death_frees_the_name(tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    script = (
        "import sys; from moe3d_deploy.bundle import BundleWriter\n"
        "with BundleWriter(sys.argv[1]) as writer:\n"
        "    (writer.folder / 'model.onnx').touch(); print('ready', flush=True); sys.stdin.read()\n"
    )
    command = [sys.executable, "-c", script, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"ready\n"
        with pytest.raises(BundleError, match="is being written by another process"):
            write_bundle(path)
        assert any(name.startswith(".bundle.partial-") for name in siblings(path))
        other.kill()
    write_bundle(path)
    assert siblings(path) == ["bundle"]


# Engines


def test_an_engine_is_added_beside_the_others_and_one_of_the_same_name_replaced(bundle: Path) -> None:
    other = example_engine("engines/a.plan")
    added = add_engine(bundle, other, build_new)
    assert added == Bundle.open(bundle)
    assert [engine.file for engine in added.manifest.engines] == ["engines/a.plan", ENGINE]
    replaced = add_engine(bundle, replace(example_engine(), precision="bf16"), build_new)
    assert replaced == Bundle.open(bundle)
    assert [engine.precision for engine in replaced.manifest.engines] == ["fp16", "bf16"]
    assert (bundle / ENGINE).read_bytes() == b"new engine"
    assert siblings(bundle) == ["bundle"]


def test_what_is_known_only_after_the_build_goes_into_the_record(bundle: Path) -> None:
    def build(temp: Path, manifest: Manifest) -> EngineRecord:
        build_new(temp, manifest)
        return replace(example_engine(), build={"seconds": 51.5})

    add_engine(bundle, example_engine(), build)
    assert Bundle.open(bundle).manifest.engines[0].build == {"seconds": 51.5}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_build_that_fails_leaves_the_bundle_as_it_was(bundle: Path, error: type[BaseException]) -> None:
    before = content(bundle)

    def fail(temp: Path, manifest: Manifest) -> None:
        temp.write_bytes(b"half")
        raise error

    with pytest.raises(error):
        add_engine(bundle, example_engine(), fail)
    assert content(bundle) == before
    assert siblings(bundle) == ["bundle"]


def test_an_engine_that_cannot_be_recorded_leaves_the_bundle_as_it_was(bundle: Path) -> None:
    def build_another(temp: Path, manifest: Manifest) -> EngineRecord:
        build_new(temp, manifest)
        return example_engine("engines/other.plan")

    before = content(bundle)
    record = replace(example_engine(), audit={"share": float("nan")})
    with pytest.raises(BundleError, match="not finite"):
        add_engine(bundle, record, build_new)
    with pytest.raises(BundleError, match="is empty; build it again"):
        add_engine(bundle, example_engine(), lambda temp, manifest: temp.touch())
    with pytest.raises(BundleError, match=r"cannot be written: .*No such file"):
        add_engine(bundle, example_engine(), lambda temp, manifest: None)
    with pytest.raises(InputError, match=r"came back as engines/other\.plan; keep its file name"):
        add_engine(bundle, example_engine(), build_another)
    assert content(bundle) == before


def test_no_engine_is_added_to_a_bundle_that_is_missing_damaged_or_being_written(bundle: Path) -> None:
    def never(temp: Path, manifest: Manifest) -> None:
        pytest.fail("the build was started")

    with pytest.raises(BundleError, match="does not exist"):
        add_engine(bundle.parent / "absent" / "bundle", example_engine(), never)
    with BundleWriter(bundle, overwrite=True), pytest.raises(BundleError, match="being written by another process"):
        add_engine(bundle, example_engine(), never)
    (bundle / "model.onnx").unlink()
    with pytest.raises(BundleError, match=r"model\.onnx is missing"):
        add_engine(bundle, example_engine(), never)


@pytest.mark.parametrize("how", ["no folder", "missing", "cut off"])
def test_an_engine_that_is_gone_does_not_stop_another_and_its_record_goes(bundle: Path, how: str) -> None:
    kept = example_engine("engines/kept.plan")
    if how != "no folder":
        add_engine(bundle, kept, build_new)
    spoil(bundle, how)
    dropped: list[str] = []
    added = add_engine(bundle, example_engine("engines/a.plan"), build_new, on_drop=dropped.append)
    assert dropped == [ENGINE]
    assert added == Bundle.open(bundle)
    expected = ["engines/a.plan"] + (["engines/kept.plan"] if how != "no folder" else [])
    assert [engine.file for engine in added.manifest.engines] == expected
    assert ENGINE not in added.manifest.files


@pytest.mark.parametrize("how", SPOILT)
def test_building_a_spoilt_engine_again_repairs_the_bundle(bundle: Path, how: str) -> None:
    spoil(bundle, how)
    dropped: list[str] = []
    add_engine(bundle, example_engine(), build_new, on_drop=dropped.append)
    assert dropped == []
    assert Bundle.open(bundle).engine_path(example_engine()).read_bytes() == b"new engine"


def test_a_failed_build_drops_no_record(bundle: Path) -> None:
    def fail(temp: Path, manifest: Manifest) -> None:
        raise RuntimeError

    spoil(bundle, "missing")
    before = content(bundle)
    with pytest.raises(RuntimeError):
        add_engine(bundle, example_engine("engines/a.plan"), fail, on_drop=pytest.fail)
    assert content(bundle) == before


def test_the_build_gets_the_manifest_as_it_is_under_the_lock(bundle: Path) -> None:
    seen: list[Manifest] = []

    def build(temp: Path, manifest: Manifest) -> None:
        seen.append(manifest)
        temp.write_bytes(b"engine")

    with BundleWriter(bundle, overwrite=True) as writer:
        (writer.folder / "model.onnx").write_bytes(NEW)
        writer.commit(replace(example_manifest(), precision="fp32"))
    add_engine(bundle, example_engine(), build)
    assert [manifest.precision for manifest in seen] == ["fp32"]


ENGINE_SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_bundle import build_new, example_engine
from moe3d_deploy.bundle import add_engine
import moe3d_deploy.files as files
replace, calls, fatal = files.os.replace, [0], int(sys.argv[3])
def count(source, target):
    calls[0] += 1
    if calls[0] == fatal and sys.argv[4] == "before": kill()
    replace(source, target)
    if calls[0] == fatal: kill()
files.os.replace = count
add_engine(sys.argv[1], example_engine(), build_new)
"""


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_kill_at_any_rename_of_a_replacement_leaves_a_valid_bundle(bundle: Path, step: int, when: str) -> None:
    """Three renames: the manifest without the engine, the engine, the manifest with it."""
    killed(KILL + ENGINE_SCRIPT, bundle, Path(__file__).parent, step, when)
    opened = Bundle.open(bundle)
    engines = {opened.engine_path(engine).read_bytes() for engine in opened.manifest.engines}
    done = 2 * step - (when == "before")  # 1 .. 6, odd before the rename and even after it
    assert engines == ({b"old engine"} if done == 1 else {b"new engine"} if done == 6 else set())
    add_engine(bundle, example_engine(), build_new)
    assert Bundle.open(bundle).engine_path(example_engine()).read_bytes() == b"new engine"
    assert not [name for name in content(bundle) if ".partial-" in name], "remains of the killed process"


@pytest.mark.parametrize(
    ("low", "best", "high", "capabilities", "builder", "version", "expected"),
    [
        ((1, 1, 392, 518), (1, 4, 392, 518), (1, 8, 392, 518), [89], "tensorrt-rtx", "1.6.1",
         "moe3d-1b_1-4-8x392x518_fp16_sm89_rtx1.6.1.plan"),
        ((1, 2, 140, 518), (1, 2, 392, 518), (1, 2, 518, 518), [89, 80, 86], "tensorrt", "10.16.1.11",
         "moe3d-1b_2x140-392-518x518_fp16_sm80-86-89_trt10.16.1.11.plan"),
        ((1, 1, 140, 140), (1, 2, 392, 518), (2, 8, 518, 518), [120], "tensorrt", "11.1",
         "moe3d-1b_1-1-2x1-2-8x140-392-518x140-518-518_fp16_sm120_trt11.1.plan"),
        ((2, 4, 518, 518), (2, 4, 518, 518), (2, 4, 518, 518), [90], "tensorrt", "11.1",
         "moe3d-1b_2x4x518x518_fp16_sm90_trt11.1.plan"),
    ],
)  # fmt: skip
def test_an_engine_is_named_by_shapes_precision_capabilities_and_builder(
    low: tuple[int, int, int, int],
    best: tuple[int, int, int, int],
    high: tuple[int, int, int, int],
    capabilities: list[int],
    builder: str,
    version: str,
    expected: str,
) -> None:
    assert engine_name("moe3d-1b", Profile(low, best, high), "fp16", capabilities, builder, version) == expected


def test_a_model_name_with_other_characters_still_names_an_engine_of_a_bundle() -> None:
    profile = Profile((1, 1, 14, 14), (1, 1, 14, 14), (1, 1, 14, 14))
    name = engine_name("my model/v2", profile, "fp16", [89], "tensorrt", "11.1")
    assert name == "my-model-v2_1x14x14_fp16_sm89_trt11.1.plan"
    example_engine(f"engines/{name}")


def test_an_engine_that_cannot_be_named_is_an_error() -> None:
    profile = Profile((1, 1, 14, 14), (1, 1, 14, 14), (1, 1, 14, 14))
    with pytest.raises(InputError, match="builder 'tvm' is unknown; use one of tensorrt, tensorrt-rtx"):
        engine_name("m", profile, "fp16", [89], "tvm", "1")
    with pytest.raises(InputError, match="at least one compute capability"):
        engine_name("m", profile, "fp16", [], "tensorrt", "1")
    with pytest.raises(InputError, match="choose another model name"):
        engine_name("../m", profile, "fp16", [89], "tensorrt", "1")

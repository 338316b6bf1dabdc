"""Writers of a bundle that are killed, and two that meet: a whole bundle is left, and the next one cleans up."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from bundles import NEW, OLD, build_new, content, refusal, siblings, write_bundle
from manifests import example_engine, example_manifest

from moe3d_deploy.bundle import Bundle, BundleWriter, add_engine
from moe3d_deploy.errors import BundleError, InputError

pytest_plugins = ["bundle_fixtures"]

KILL = "import os, signal; kill = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
WRITE_SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from bundles import NEW, write_bundle
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


ENGINE_SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from bundles import build_new
from manifests import example_engine
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

"""The cache of engines: what makes a key, who may have an entry, and that nothing damaged or half-written is taken."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe3d_deploy.engines import cache as cache_module
from moe3d_deploy.engines.cache import EngineCache, engine_key
from moe3d_deploy.engines.shapes import ShapeProfile
from moe3d_deploy.errors import Moe3dWarning
from moe3d_deploy.files import exclusive_lock
from moe3d_deploy.trt import BuildFlags

KEY, OTHER = "a" * 64, "b" * 64
BUILT = {"builder": "tensorrt-rtx", "audit": {}, "build": {"seconds": 51.5}}


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def cache(tmp_path: Path, notes: list[str]) -> EngineCache:
    return EngineCache(tmp_path / "cache" / "engines", on_note=notes.append)


def keep(
    cache: EngineCache, folder: Path, key: str = KEY, plan: bytes = b"plan", built: dict[str, Any] = BUILT
) -> None:
    (folder / "built.plan").write_bytes(plan)
    (folder / "built.log").write_text("a line\n")
    with cache.entry(key) as entry:
        assert entry is not None
        entry.store(folder / "built.plan", built, folder / "built.log")


def take(cache: EngineCache, folder: Path, key: str = KEY) -> tuple[bytes, dict[str, Any]] | None:
    plan, log = folder / "taken.plan", folder / "taken.log"
    for path in (plan, log):
        path.unlink(missing_ok=True)
    with cache.entry(key) as entry:
        assert entry is not None
        built = entry.fetch(plan, log)
    if built is None:
        assert not plan.exists()
        return None
    assert log.read_text() == "a line\n"
    return plan.read_bytes(), built


def names(cache: EngineCache) -> list[str]:
    return sorted(path.name for path in cache.folder.iterdir())


# The key


@pytest.fixture
def model(tmp_path: Path) -> Path:
    onnx = pytest.importorskip("onnx", reason="writes ONNX models: pip install 'moe3d-deploy[export]'")
    weight = onnx.numpy_helper.from_array(np.float32([1, 2]), "w")
    node = onnx.helper.make_node("Add", ["x", "w"], ["y"])
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:], [weight])
    (tmp_path / "model").mkdir()
    path = tmp_path / "model" / "model.onnx"
    onnx.save(
        onnx.helper.make_model(graph), path, save_as_external_data=True, location="model.onnx.data", size_threshold=0
    )
    return path


def key_of(model: Path, **changes: Any) -> str:
    profiles = changes.pop("profiles", [ShapeProfile.from_ranges()])
    usual: dict[str, Any] = {
        "builder": "tensorrt-rtx",
        "builder_version": "1.7.1.116",
        "compute_capabilities": [(8, 6), (8, 9)],
        "flags": BuildFlags(),
    }
    return engine_key(model, profiles, **usual | changes)


def test_a_key_is_of_the_content_alone(model: Path, tmp_path: Path) -> None:
    before = key_of(model)
    os.utime(model, (0, 0))
    moved = model.parent.rename(tmp_path / "elsewhere") / model.name
    assert key_of(moved) == before
    assert key_of(moved, compute_capabilities=[(8, 9), (8, 6)]) == before  # one engine in any order
    assert key_of(moved, flags=BuildFlags(timing_cache="timings")) == before


def test_whatever_decides_what_is_built_changes_the_key(model: Path, tmp_path: Path) -> None:
    plugin = tmp_path / "libplugin.so"
    plugin.write_bytes(b"one")
    keys = [
        key_of(model),
        key_of(model, profiles=[ShapeProfile.from_ranges(views="4")]),
        key_of(model, profiles=[ShapeProfile.from_ranges(), ShapeProfile.from_ranges(views="4")]),
        key_of(model, builder="tensorrt"),
        key_of(model, builder_version="1.6.1.120"),
        key_of(model, compute_capabilities=[(8, 9)]),
        key_of(model, flags=BuildFlags(optimization_level=3)),
        key_of(model, flags=BuildFlags(tf32=True)),
        key_of(model, plugin=plugin),
    ]
    plugin.write_bytes(b"two")
    keys.append(key_of(model, plugin=plugin))
    weights = model.with_name("model.onnx.data")
    content = bytearray(weights.read_bytes())
    content[0] ^= 1
    weights.write_bytes(content)
    keys.append(key_of(model))
    model.write_bytes(model.read_bytes().replace(b"Add", b"Sub"))
    keys.append(key_of(model))
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 64 for key in keys)


# An entry


def test_what_was_kept_is_taken_by_its_key(cache: EngineCache, tmp_path: Path, notes: list[str]) -> None:
    assert take(cache, tmp_path) is None
    keep(cache, tmp_path)
    assert take(cache, tmp_path) == (b"plan", BUILT)
    assert take(cache, tmp_path, OTHER) is None
    assert names(cache) == [KEY]
    assert notes == []


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("engine.plan", b"plam"),
        ("engine.plan", b"pla"),
        ("engine.plan", b""),
        ("engine.plan", None),
        ("record.json", b""),
        ("record.json", b"[]"),
        ("record.json", b'{"size": 4}'),
        ("record.json", b'{"size": 4, "sha256": "0", "built": {}}'),
        ("record.json", b'{"size": 4, "sha256": "0", "built": []}'),
        ("record.json", None),
    ],
)
def test_a_damaged_entry_is_nobodys_and_goes(
    cache: EngineCache, tmp_path: Path, notes: list[str], file: str, content: bytes | None
) -> None:
    keep(cache, tmp_path)
    path = cache.folder / KEY / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert take(cache, tmp_path) is None
    assert notes == ["the cached engine is damaged: building it again"]
    assert names(cache) == []


def test_keeping_again_replaces_the_entry(cache: EngineCache, tmp_path: Path) -> None:
    keep(cache, tmp_path)
    keep(cache, tmp_path, plan=b"another")
    assert take(cache, tmp_path) == (b"another", BUILT)


def test_the_entries_used_longest_ago_go_first(cache: EngineCache, tmp_path: Path) -> None:
    small = EngineCache(cache.folder, limit_bytes=3000)
    for key in "cba":
        keep(small, tmp_path, key * 64, bytes(1000))
    assert names(small) == ["a" * 64, "b" * 64], "three with their records are more than 3000 bytes"
    take(small, tmp_path, "b" * 64)  # the older one is used
    keep(small, tmp_path, "d" * 64, bytes(1000))
    assert names(small) == ["b" * 64, "d" * 64]
    keep(small, tmp_path, "e" * 64, bytes(5000))
    assert names(small) == ["e" * 64], "one that is larger than the limit is kept alone"


def test_an_entry_in_use_does_not_go(cache: EngineCache, tmp_path: Path) -> None:
    small = EngineCache(cache.folder, limit_bytes=10)
    keep(small, tmp_path)
    with small.entry(KEY):
        keep(small, tmp_path, OTHER)
    assert KEY in names(small)
    keep(small, tmp_path, "c" * 64)
    assert names(small) == ["c" * 64]


def test_a_cache_that_cannot_be_made_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    unusable = EngineCache(tmp_path / "file" / "engines").entry(KEY)
    said = r"file/engines cannot be used: Not a directory; building without it$"
    with pytest.warns(Moe3dWarning, match=said), unusable as entry:
        assert entry is None


def test_an_engine_that_the_disk_does_not_take_is_a_warning(
    cache: EngineCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "sync", full)
    with pytest.warns(Moe3dWarning, match="does not keep this engine: No space left on device$"):
        keep(cache, tmp_path)
    assert names(cache) == []


# Several processes

PRELUDE = """
    import os, sys, time
    from pathlib import Path
    from moe3d_deploy.engines.cache import EngineCache
    folder, key = Path(sys.argv[1]), sys.argv[2]
    cache = EngineCache(folder / "cache")
"""
BUILDER = """
    with cache.entry(key) as entry:
        mine = folder / f"{os.getpid()}.plan"
        if entry.fetch(mine, folder / f"{os.getpid()}.log") is None:
            with open(folder / "builds", "a") as file:
                file.write("build\\n")
            time.sleep(1)
            mine.write_bytes(b"plan")
            entry.store(mine, {"of": os.getpid()}, folder / "none.log")
        print(mine.read_bytes().decode())
"""
KILLED = """
    import moe3d_deploy.engines.cache as module
    def stay(path):
        print("staged", flush=True)
        time.sleep(60)
    (folder / "mine.plan").write_bytes(b"half of a plan")
    with cache.entry(key) as entry:
        module.sync = stay
        entry.store(folder / "mine.plan", {}, folder / "none.log")
"""


def start(script: str, folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", textwrap.dedent(PRELUDE) + textwrap.dedent(script), str(folder), KEY]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_builders_at_once_build_once(tmp_path: Path) -> None:
    builders = [start(BUILDER, tmp_path) for _ in range(2)]
    assert [builder.communicate(timeout=60)[0] for builder in builders] == ["plan\n", "plan\n"]
    assert (tmp_path / "builds").read_text() == "build\n"


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """A cache in which a process was killed while it stored an engine."""
    with start(KILLED, tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "staged\n"
        process.send_signal(signal.SIGKILL)
    return tmp_path / "cache"


def test_a_killed_builder_leaves_nothing_that_is_taken_for_an_engine(killed: Path, tmp_path: Path) -> None:
    left = sorted(path.name.rpartition("-")[0] or path.name for path in killed.iterdir())
    assert left == [f".{KEY}.lock", f".{KEY}.partial"]
    cache = EngineCache(killed)
    assert take(cache, tmp_path) is None
    assert names(cache) == [], "the next one that holds the key cleans up"


def test_what_a_killed_builder_left_goes_with_any_other_build(killed: Path, tmp_path: Path) -> None:
    cache = EngineCache(killed)
    with cache.entry(KEY):
        pass
    (killed / f".{KEY}.partial-00000000").mkdir()
    (killed / f".{'c' * 64}.partial-00000000").mkdir()
    with exclusive_lock(killed / f".{KEY}.lock"):
        keep(cache, tmp_path, OTHER)
        assert names(cache) == [f".{KEY}.lock", f".{KEY}.partial-00000000", OTHER], "but not what is held"
    keep(cache, tmp_path, OTHER)
    assert names(cache) == [OTHER]


def test_one_who_waits_says_so_once_and_goes_on(cache: EngineCache, tmp_path: Path, notes: list[str]) -> None:
    cache.folder.mkdir(parents=True)
    held = exclusive_lock(cache.folder / f".{KEY}.lock")
    held.__enter__()
    release = threading.Timer(0.5, lambda: held.__exit__(None, None, None))
    release.start()
    started = time.monotonic()
    assert take(cache, tmp_path) is None
    assert time.monotonic() - started > 0.4
    assert notes == ["another process builds this very engine: waiting for it"]
    release.join()

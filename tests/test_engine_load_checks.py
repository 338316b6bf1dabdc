"""Which engines may be loaded, the command that rebuilds the others, and that no other reaches a deserialiser."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bundles import build_new, build_old, spoil, write_bundle
from manifests import ENGINE, example_engine

from moe3d_deploy import trt
from moe3d_deploy.bundle import Bundle, add_engine
from moe3d_deploy.engines.options import parse_size, parse_targets
from moe3d_deploy.engines.profiles import ShapeFlags, read_profiles
from moe3d_deploy.errors import EngineError, InputError
from moe3d_deploy.manifest import EngineRecord, Profile, Range, ShapeRanges
from moe3d_deploy.trt import installed
from moe3d_deploy.trt.load_checks import load_faults, loads_version, rebuild_command, runs_on

RTX = replace(example_engine(), plugin=None)  # 1.6.1, for compute capability 8.9
COMPATIBLE = {"version_compatible": True, "hardware_compatible": True}


def of_tensorrt(version: str, **flags: Any) -> EngineRecord:
    return replace(RTX, builder="tensorrt", builder_version=version, build={"flags": flags})


# Versions


@pytest.mark.parametrize(
    ("built", "here", "loads"),
    [
        ("10.16.1.11", "10.16.1.11", True),
        ("10.16.1.11", "10.16.1.12", False),  # the build number counts as well
        ("10.16.1.11", "10.16.1", False),
        ("10.13.3.9", "10.13.3.9.post1", True),  # the library says one, its package the other
        ("10.3.0.30", "10.16.1.11", False),
        ("unknown", "unknown", False),
    ],
)
@pytest.mark.parametrize("builder", ["tensorrt", "tensorrt-rtx"])
def test_an_engine_loads_in_the_version_that_built_it(builder: str, built: str, here: str, loads: bool) -> None:
    assert loads_version(replace(of_tensorrt(built), builder=builder), here) is loads


@pytest.mark.parametrize(
    ("built", "here", "loads"),
    [
        ("10.3.0.26", "10.3.0.26", True),
        ("10.3.0.26", "10.16.1.11", True),
        ("10.16.1.11", "10.3.0.26", False),  # forward only
        ("10.3.0.26", "11.4.1.7", True),
        ("11.0.0.1", "11.1.0.2", True),
        ("11.0.0.1", "10.16.1.11", False),
        ("11.0.0.1", "12.0.0.1", False),  # across majors only what NVIDIA names: 10 in 11
        ("8.6.1.6", "11.0.0.1", False),
    ],
)
def test_a_version_compatible_engine_loads_in_later_versions(built: str, here: str, loads: bool) -> None:
    assert loads_version(of_tensorrt(built, version_compatible=True), here) is loads


@pytest.mark.parametrize("flags", [None, [], {"version_compatible": "yes"}, {"version_compatible": 1}])
def test_only_a_flag_that_is_true_makes_an_engine_compatible(flags: Any) -> None:
    record = replace(of_tensorrt("10.3.0.26"), build={"flags": flags})
    assert not loads_version(record, "10.16.1.11")
    assert not loads_version(replace(RTX, build={"flags": COMPATIBLE}), "1.7.1.116")  # no TensorRT-RTX has it


# GPUs


@pytest.mark.parametrize(
    ("record", "gpu", "runs"),
    [
        (RTX, (8, 9), True),
        (RTX, (8, 6), False),
        (replace(RTX, compute_capabilities=(80, 86, 89, 120)), (12, 0), True),
        (replace(RTX, compute_capabilities=(80, 86, 89, 120)), (9, 0), False),
        (replace(RTX, build={"flags": COMPATIBLE}), (9, 0), False),  # no TensorRT-RTX has it
        (of_tensorrt("10.16.1.11"), (9, 0), False),
        (of_tensorrt("10.16.1.11", hardware_compatible=True), (9, 0), True),
        (of_tensorrt("10.16.1.11", hardware_compatible=True), (8, 0), True),
        (of_tensorrt("10.16.1.11", hardware_compatible=True), (7, 5), False),
        (of_tensorrt("10.16.1.11", hardware_compatible=True), (8, 7), False),  # Orin
        (replace(of_tensorrt("10.3.0", hardware_compatible=True), compute_capabilities=(87,)), (8, 9), False),
    ],
)
def test_an_engine_runs_on_the_gpus_it_was_built_for(record: EngineRecord, gpu: trt.Capability, runs: bool) -> None:
    assert runs_on(record, gpu) is runs
    assert bool(load_faults(record, version=None, gpus=[gpu])) is not runs


def test_every_fault_of_a_record_is_told() -> None:
    wrong = replace(of_tensorrt("10.16.1.11", **COMPATIBLE, strip_weights=True), plugin={"layers": ["mix"]})
    assert load_faults(wrong, version="10.3.0.26", gpus=[(7, 5), (8, 7)]) == [
        "built by TensorRT 10.16.1.11 for later ones, here is 10.3.0.26",
        "it needs a plugin library, and its record does not say which",
        "it has no weights (--strip-weights), and this version puts none in",
        "built for compute capability 8.9 and every GPU from 8.0 on but Jetson's, the GPUs here have 7.5, 8.7",
    ]
    assert load_faults(wrong, version=None, gpus=[])[0].startswith("it needs a plugin library")


# The command


def test_the_command_has_the_profile_gpus_and_flags_of_the_engine() -> None:
    flags = {"workspace_bytes": 3 << 29, "optimization_level": 2, "weight_streaming": True, "tf32": True, "new": True}
    flags["strip_weights"] = True  # no runtime here would load the engine
    record = replace(RTX, build={"flags": flags}, compute_capabilities=(89, 86))
    assert rebuild_command("my bundle", record) == (
        "moe3d-export 'my bundle' --builder tensorrt-rtx --views 1:4:8 --height 392 --width 518 --target sm86,sm89 "
        "--workspace 1536M --optimization-level 2 --weight-streaming"
    )


def test_the_gpu_that_is_here_is_added_and_tensorrt_builds_for_what_tensorrt_rtx_does_not() -> None:
    command = "moe3d-export b --builder {} --views 1:4:8 --height 392 --width 518{}"
    assert rebuild_command("b", RTX, [(7, 5)]) == command.format("tensorrt-rtx", " --target sm75,sm89")
    default = replace(RTX, compute_capabilities=(80, 86, 89, 120))
    assert rebuild_command("b", default, [(8, 6)]) == command.format("tensorrt-rtx", "")
    assert rebuild_command("b", default, [(9, 0)]) == command.format("tensorrt", "")
    assert rebuild_command("b", of_tensorrt("10.3.0"), [(8, 9)]) == command.format("tensorrt", "")
    assert rebuild_command("b", replace(RTX, build={"flags": COMPATIBLE})) == command.format(
        "tensorrt-rtx", " --target sm89"  # no flag that it does not have
    )  # fmt: skip


@pytest.mark.parametrize(
    "profiles",
    [
        [((1, 1, 140, 518), (1, 4, 392, 518), (1, 8, 518, 518))],
        [((1, 1, 392, 518),) * 3, ((1, 2, 392, 518), (1, 4, 392, 518), (2, 16, 392, 518))],
        [((2, 8, 392, 518),) * 3, ((1, 8, 14, 518), (1, 8, 14, 518), (1, 8, 28, 518)), ((3, 9, 14, 28),) * 3],
    ],
)
def test_the_command_gives_back_the_very_profiles(profiles: list[Any]) -> None:
    wanted = [Profile(*shapes) for shapes in profiles]
    words = shlex.split(rebuild_command("b", replace(RTX, profiles=tuple(wanted))))[4:]
    values: dict[str, list[str]] = {}
    for flag, value in zip(words[::2], words[1::2], strict=True):
        values.setdefault(flag.removeprefix("--"), []).append(value)
    assert parse_targets(values.pop("target")[0]) == ((8, 9),)
    pixels = Range(14, None, 14)
    flags = ShapeFlags(**{name: tuple(texts) for name, texts in values.items()})
    read = read_profiles(flags, ShapeRanges(Range(1, None), Range(1, None), pixels, pixels), 14, 518)
    assert [Profile(profile.min, profile.opt, profile.max) for profile in read] == wanted


@pytest.mark.parametrize("count", [1 << 30, 5 << 20, 1024, 7 << 10])
def test_the_workspace_of_the_command_is_that_of_the_engine(count: int) -> None:
    words = rebuild_command("b", replace(RTX, build={"flags": {"workspace_bytes": count}})).split()
    assert parse_size("--workspace", words[words.index("--workspace") + 1]) == count


# The deserialiser, a spy in its place


class Spy:
    """Stands in for the library: keeps what reached its deserialiser, and gives no engine."""

    def __init__(self) -> None:
        self.plans: list[bytes] = []
        self.engine_host_code_allowed = False
        self.__version__ = "1.6.1"

    def Runtime(self, logger: object) -> "Spy":
        return self

    def deserialize_cuda_engine(self, plan: bytes) -> None:
        self.plans.append(plan)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    """A machine with a GPU of compute capability 8.9, TensorRT-RTX 1.6.1 and TensorRT 10.16.1.11."""
    pytest.importorskip("tensorrt_rtx", reason="stands in for its runtime: pip install 'moe3d-deploy[rtx]'")
    installed.load("tensorrt-rtx")  # Polygraphy asks once which library it is for
    stand_in = Spy()
    monkeypatch.setattr(installed, "visible_gpus", lambda: [(8, 9), (9, 0)])
    monkeypatch.setattr(installed, "available", lambda: {"tensorrt-rtx": "1.6.1", "tensorrt": "10.16.1.11"})
    monkeypatch.setattr(installed, "require", lambda builder: None)
    monkeypatch.setattr(installed, "load", lambda builder: stand_in)
    return stand_in


def bundle_with(path: Path, record: EngineRecord) -> tuple[Bundle, EngineRecord]:
    write_bundle(path)
    add_engine(path, record, build_old)
    bundle = Bundle.open(path)
    return bundle, bundle.manifest.engines[0]


def load(path: Path, record: EngineRecord, spoiled: Callable[[Path], None] = lambda path: None) -> str:
    """The line that loading the engine ends with; the spy gives no engine, so there always is one."""
    bundle, found = bundle_with(path, record)
    spoiled(path)
    with pytest.raises(EngineError) as error:
        trt.EngineRunner.of_bundle(bundle, found)
    text = str(error.value)
    assert "\n" not in text
    assert ENGINE in text
    return text


def test_the_right_engine_reaches_the_deserialiser(tmp_path: Path, spy: Spy) -> None:
    """Or the tests below would show nothing."""
    assert "TensorRT-RTX 1.6.1 cannot load it: " in load(tmp_path / "bundle", RTX)
    assert spy.plans == [b"old engine"]
    assert spy.engine_host_code_allowed is False
    load(tmp_path / "later", of_tensorrt("10.3.0.26", version_compatible=True))
    assert len(spy.plans) == 2
    assert spy.engine_host_code_allowed is True  # such an engine brings its own runtime


@pytest.mark.parametrize(
    ("record", "why", "builder", "target"),
    [
        (replace(RTX, builder_version="1.7.1.116"), "built by TensorRT-RTX 1.7.1.116, here is 1.6.1", None, "sm89"),
        (replace(RTX, builder_version="1.6.1.2"), "built by TensorRT-RTX 1.6.1.2, here is 1.6.1", None, "sm89"),
        (of_tensorrt("10.3.0.26"), "built by TensorRT 10.3.0.26, here is 10.16.1.11", "tensorrt", None),
        (
            # the other GPU of this machine, 9.0, is not the one that it would run on
            replace(RTX, compute_capabilities=(90, 120)),
            "built for compute capability 9.0, 12.0, the GPUs here have 8.9",
            None,
            "sm89,sm120",
        ),
        (
            replace(RTX, plugin={"layers": ["expert_mix"]}),
            "it needs a plugin library, and TensorRT-RTX takes none",
            None,
            "sm89",
        ),
    ],
)
def test_no_wrong_engine_reaches_the_deserialiser(
    tmp_path: Path, spy: Spy, record: EngineRecord, why: str, builder: str | None, target: str | None
) -> None:
    path = tmp_path / "bundle"
    command = f"moe3d-export {path} --builder {builder or 'tensorrt-rtx'} --views 1:4:8 --height 392 --width 518"
    command += f" --target {target}" if target else ""
    assert load(path, record) == f"{path / ENGINE} cannot be used here: {why}; build it again: {command}"
    assert spy.plans == []


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("missing", "is missing"),
        ("cut off", "has 3 bytes, not 10"),
        ("damaged", "is damaged: its SHA-256 is not the manifest's"),
    ],
)
def test_no_damaged_file_reaches_the_deserialiser(tmp_path: Path, spy: Spy, how: str, why: str) -> None:
    path = tmp_path / "bundle"
    command = f"moe3d-export {path} --builder tensorrt-rtx --views 1:4:8 --height 392 --width 518 --target sm89"
    assert load(path, RTX, lambda path: spoil(path, how)) == f"{path / ENGINE} {why}; build it again: {command}"
    assert spy.plans == []


def test_an_engine_of_another_bundle_is_refused(tmp_path: Path, spy: Spy) -> None:
    bundle, _ = bundle_with(tmp_path / "bundle", RTX)
    add_engine(tmp_path / "bundle", RTX, build_new)
    with pytest.raises(InputError, match=r"is no engine of bundle .*; take one of its manifest$"):
        trt.EngineRunner.of_bundle(bundle, replace(RTX, builder_version="1.6.1.post1"))
    assert spy.plans == []


def test_an_engine_without_a_bundle_is_refused_by_its_version_at_least(tmp_path: Path, spy: Spy) -> None:
    (tmp_path / "a.plan").write_bytes(b"plan")
    with pytest.raises(EngineError, match=r"^a\.plan: built by TensorRT-RTX 1\.5\.0, here is 1\.6\.1; build it again"):
        trt.EngineRunner(tmp_path / "a.plan", builder="tensorrt-rtx", built_by="1.5.0")
    assert spy.plans == []


# An engine that another version has really built

FOREIGN = "tensorrt_rtx<1.7"


@pytest.fixture(scope="module")
def foreign_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An older TensorRT-RTX in a folder of its own."""
    pytest.importorskip("tensorrt_rtx", reason="compares two versions: pip install 'moe3d-deploy[rtx]'")
    folder = tmp_path_factory.mktemp("foreign")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    ended = subprocess.run(
        [*pip, "--target", str(folder), FOREIGN], capture_output=True, text=True, timeout=600, check=False
    )
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["pip says nothing"])[-1]
        pytest.skip(f"{FOREIGN} cannot be installed here: {last}")
    return folder


@pytest.mark.full  # downloads about 100 MB
def test_an_engine_that_an_older_tensorrt_rtx_has_built_never_reaches_the_deserialiser(
    foreign_packages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exports = pytest.importorskip("exports", reason="exports a model: pip install 'moe3d-deploy[export]'")
    path = shutil.copytree(exports.bundle().path, tmp_path / "small")
    shapes = ["--views", "1:2:3", "--height", "28:42", "--width", "42", "--target", "sm89"]
    root = str(Path(__file__).resolve().parent.parent)
    ended = subprocess.run(
        [sys.executable, "-m", "moe3d_deploy", "export", str(path), "--builder", "tensorrt-rtx", *shapes, "--no-cache"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(foreign_packages), root])},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    bundle = Bundle.open(path)
    (record,) = bundle.manifest.engines
    here = trt.available()["tensorrt-rtx"]
    assert record.builder_version != here
    library = installed.load("tensorrt-rtx")
    reached: list[bytes] = []
    monkeypatch.setattr(library, "Runtime", lambda logger: reached.append(b"") or pytest.fail("a runtime was made"))
    monkeypatch.setattr(installed, "visible_gpus", lambda: [(8, 9)])
    with pytest.raises(EngineError) as error:
        trt.EngineRunner.of_bundle(bundle, record)
    assert str(error.value) == (
        f"{path / record.file} cannot be used here: built by TensorRT-RTX {record.builder_version}, here is {here}; "
        f"build it again: moe3d-export {path} --builder tensorrt-rtx --views 1:2:3 --height 28:42:42 --width 42 "
        "--target sm89"
    )
    assert reached == []
    assert re.fullmatch(r"1\.[0-6]\.\d+\.\d+", record.builder_version)

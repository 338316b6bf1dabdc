"""What each builder version has: the rule table on versions that are not installed, and the flags as they are set."""

import types
from pathlib import Path
from typing import Any

import pytest

from moe3d_deploy import trt
from moe3d_deploy.engines.build import check_request, resolve_builder
from moe3d_deploy.errors import EngineError, InputError
from moe3d_deploy.trt.features import RULES, BuildFlags, apply_flags, check_flags, check_targets, version_of
from moe3d_deploy.trt.timing import save_timing_cache, set_timing_cache

EVERYTHING = BuildFlags(
    workspace_bytes=1 << 30, optimization_level=5, version_compatible=True, hardware_compatible=True,
    weight_streaming=True, strip_weights=True, timing_cache="timings", tf32=True,
)  # fmt: skip


@pytest.mark.parametrize("version", ["10.3.0.26", "10.9.0.34", "10.16.1.11", "11.0.0.114", "11.4.0.106"])
def test_tensorrt_from_10_3_on_has_every_flag(version: str) -> None:
    check_flags("tensorrt", version, EVERYTHING)


@pytest.mark.parametrize("version", ["8.6.1", "9.3.0.1", "10.0.1", "10.2.0.19"])
def test_an_older_tensorrt_builds_nothing_and_the_error_says_which_does(version: str) -> None:
    with pytest.raises(EngineError) as caught:
        check_flags("tensorrt", version, BuildFlags())
    assert str(caught.value) == (
        f"TensorRT {version} is too old: engines are built by 10.3 or newer, whose networks are strongly typed; "
        "update it"
    )


@pytest.mark.parametrize("version", ["1.0.0.1", "1.4.0.76", "1.7.1.116", "1.12.0"])
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "version_compatible",
            "--version-compatible: no TensorRT-RTX has it, TensorRT 8.6 or newer does; leave it out, build again for "
            "each version",
        ),
        (
            "hardware_compatible",
            "--hardware-compatible: no TensorRT-RTX has it, TensorRT 8.6 or newer does; leave it out, name the GPUs "
            "with --target",
        ),
        (
            "timing_cache",
            "--timing-cache: no TensorRT-RTX has it, TensorRT 8.0 or newer does; leave it out, it times no kernels "
            "when it builds",
        ),
    ],
)
def test_what_no_tensorrt_rtx_has_says_who_has_it(version: str, flag: str, message: str) -> None:
    value: Any = "timings" if flag == "timing_cache" else True
    with pytest.raises(InputError) as caught:
        check_flags("tensorrt-rtx", version, BuildFlags(**{flag: value}))
    assert str(caught.value) == message


def test_the_other_flags_are_tensorrt_rtxs_too() -> None:
    flags = BuildFlags(workspace_bytes=1, optimization_level=0, weight_streaming=True, tf32=True)
    check_flags("tensorrt-rtx", "1.7.1.116", flags, gpu=False)


def test_tensorrt_rtx_strips_weights_only_beside_a_gpu() -> None:
    """Without one, 1.7.1 fails inside the compiler, a minute into the build."""
    check_flags("tensorrt-rtx", "1.7.1.116", BuildFlags(strip_weights=True), gpu=True)
    check_flags("tensorrt", "10.3.0", BuildFlags(strip_weights=True), gpu=False)
    with pytest.raises(EngineError, match=r"^--strip-weights: TensorRT-RTX 1\.7\.1 needs a GPU for it and none is vis"):
        check_flags("tensorrt-rtx", "1.7.1", BuildFlags(strip_weights=True), gpu=False)


def test_a_version_before_a_flag_is_told_the_first_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """No flag of today is younger than the oldest builder; the next one may be."""
    monkeypatch.setitem(RULES, "weight_streaming", RULES["weight_streaming"]._replace(tensorrt=(10, 9)))
    check_flags("tensorrt", "10.10.0", BuildFlags(weight_streaming=True))
    with pytest.raises(EngineError) as caught:
        check_flags("tensorrt", "10.3.0.26", BuildFlags(weight_streaming=True))
    assert str(caught.value) == (
        "--weight-streaming: TensorRT 10.3.0.26 does not have it, 10.9 or newer does; update it, or leave the flag out"
    )


def test_targets_are_checked_before_the_library_is_loaded() -> None:
    check_targets("1.4.0.76", [(7, 5), (8, 0), (8, 6), (8, 9), (12, 0)])
    check_targets("1.5.0.114", [(12, 1)])
    with pytest.raises(
        EngineError, match=r"^--target sm121: TensorRT-RTX 1\.4\.0\.76 does not build for it, 1\.5 or n"
    ):
        check_targets("1.4.0.76", [(8, 9), (12, 1)])
    with pytest.raises(InputError) as caught:
        check_targets("1.7.1.116", [(9, 0)])
    assert str(caught.value) == (
        "--target sm90: TensorRT-RTX 1.7.1.116 builds for sm75, sm80, sm86, sm89, sm120, sm121; for another GPU build "
        "with TensorRT on its machine"
    )
    check_targets("1.8.0", [(9, 0)])  # unknown: the library itself says


def test_versions_compare_as_numbers() -> None:
    assert version_of("10.16.1.11") > version_of("10.9") > version_of("10.3.0rc1") == (10, 3, 0)


@pytest.mark.parametrize("level", [-1, 6])
def test_a_level_that_does_not_exist_is_refused(level: int) -> None:
    with pytest.raises(InputError, match=rf"^optimization level {level}: levels are 0 to 5$"):
        BuildFlags(optimization_level=level)


# Which builder


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    versions = {"tensorrt": "10.3.0.26", "tensorrt-rtx": "1.7.1.116"}
    monkeypatch.setattr(trt, "require", lambda builder: None)
    monkeypatch.setattr(trt, "available", lambda: versions)
    monkeypatch.setattr(trt, "visible_gpus", lambda: [(8, 7)])
    return versions


def test_auto_passes_over_a_tensorrt_that_is_too_old(installed: dict[str, str]) -> None:
    assert resolve_builder("auto") == "tensorrt"
    installed["tensorrt"] = "9.3.0"
    assert resolve_builder("auto") == "tensorrt-rtx"
    del installed["tensorrt-rtx"]
    with pytest.raises(EngineError, match=r"^TensorRT 9\.3\.0 is too old: engines are built by 10\.3 or newer"):
        resolve_builder("auto")


def test_a_request_is_checked_against_the_builder_that_is_taken(installed: dict[str, str]) -> None:
    flags = BuildFlags(version_compatible=True)
    assert check_request("auto", flags, None) == "tensorrt"
    with pytest.raises(InputError, match="no TensorRT-RTX has it"):
        check_request("tensorrt-rtx", flags, None)
    with pytest.raises(InputError, match=r"^--target sm90: "):
        check_request("tensorrt-rtx", BuildFlags(), [(9, 0)])
    assert check_request("tensorrt", BuildFlags(), [(9, 0)]) == "tensorrt"  # its own check knows the GPU


# On the library


class Config:
    """Stands in for an IBuilderConfig."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: self.calls.append((name, *arguments))


def library(**without: str) -> Any:
    """Stands in for TensorRT, with the names of its Python module; `without` leaves out members of a class."""
    members = {
        "BuilderFlag": ["TF32", "VERSION_COMPATIBLE", "WEIGHT_STREAMING", "STRIP_PLAN"],
        "MemoryPoolType": ["WORKSPACE"],
        "HardwareCompatibilityLevel": ["NONE", "AMPERE_PLUS"],
        "IBuilderConfig": ["builder_optimization_level", "hardware_compatibility_level", "create_timing_cache"],
    }
    classes = {
        owner: types.SimpleNamespace(**{name: name for name in names if without.get(owner) != name})
        for owner, names in members.items()
    }
    return types.SimpleNamespace(__version__="10.3.0.26", **classes)


def test_every_flag_reaches_the_builders_configuration() -> None:
    config = Config()
    apply_flags(library(), "tensorrt", config, EVERYTHING)
    assert config.calls == [
        ("set_flag", "TF32"),
        ("set_memory_pool_limit", "WORKSPACE", 1 << 30),
        ("set_flag", "VERSION_COMPATIBLE"),
        ("set_flag", "WEIGHT_STREAMING"),
        ("set_flag", "STRIP_PLAN"),
    ]
    assert config.builder_optimization_level == 5
    assert config.hardware_compatibility_level == "AMPERE_PLUS"


def test_without_flags_only_tf32_is_touched() -> None:
    """It is on by default in both libraries, and fp32 means fp32."""
    config = Config()
    apply_flags(library(), "tensorrt", config, BuildFlags())
    assert config.calls == [("clear_flag", "TF32")]
    assert set(vars(config)) == {"calls"}


def test_a_library_that_lacks_what_its_version_has_is_an_error() -> None:
    with pytest.raises(EngineError) as caught:
        apply_flags(library(BuilderFlag="WEIGHT_STREAMING"), "tensorrt", Config(), EVERYTHING)
    assert str(caught.value) == (
        "--weight-streaming: TensorRT 10.3.0.26 has no BuilderFlag.WEIGHT_STREAMING, which came with 10.0; leave the "
        "flag out, or use another version"
    )


def test_the_table_names_what_the_installed_library_has() -> None:
    library = pytest.importorskip("tensorrt_rtx", reason="reads its names: pip install 'moe3d-deploy[rtx]'")
    for rule in RULES.values():
        for place in rule.needs:
            owner, _, member = place.partition(".")
            assert hasattr(getattr(library, owner), member), place


# The timing cache, which TensorRT-RTX does not have


class Timings:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content

    def combine(self, others: "Timings", ignore_mismatch: bool) -> bool:
        self.content += b"+" + others.content
        return True


class TimingConfig:
    """Stands in for the part of an IBuilderConfig that has timings; those that begin with X are of another GPU."""

    cache: Timings | None = None

    def create_timing_cache(self, content: bytes) -> Timings:
        return Timings(content)

    def set_timing_cache(self, cache: Timings, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return not cache.content.startswith(b"X") or ignore_mismatch

    def get_timing_cache(self) -> Timings | None:
        return self.cache


def test_timings_are_read_and_added_to_the_file(tmp_path: Path) -> None:
    path, config = tmp_path / "timings", TimingConfig()
    set_timing_cache(config, path, "TensorRT")  # there is none yet
    assert config.cache is not None
    config.cache.content = b"first"
    save_timing_cache(config, path)
    assert path.read_bytes() == b"first+"

    again = TimingConfig()
    set_timing_cache(again, path, "TensorRT")
    assert again.cache is not None
    assert again.cache.content == b"first+"
    again.cache.content = b"second"
    path.write_bytes(b"of another builder")  # which has ended meanwhile
    save_timing_cache(again, path)
    assert path.read_bytes() == b"second+of another builder"
    assert [entry.name for entry in tmp_path.iterdir()] == ["timings"]


def test_timings_of_another_gpu_are_refused_and_stay(tmp_path: Path) -> None:
    path = tmp_path / "timings"
    path.write_bytes(b"X")
    with pytest.raises(EngineError, match=r"timings is damaged, or of another TensorRT or GPU; name another file"):
        set_timing_cache(TimingConfig(), path, "TensorRT")
    assert path.read_bytes() == b"X"


def test_a_timing_file_that_cannot_be_used_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: Is a directory; name another file"):
        set_timing_cache(TimingConfig(), tmp_path, "TensorRT")
    config = TimingConfig()
    config.cache = Timings(b"")
    with pytest.raises(InputError, match="cannot be written: No such file or directory; name another file"):
        save_timing_cache(config, tmp_path / "absent" / "timings")

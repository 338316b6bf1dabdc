"""The plugin library: what its file has to be before it is loaded, and how it is registered."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from bundles import write_bundle
from native_sources import compiled
from plugin_files import FakeTensorRT, load_polygraphy, plugin_file, shared_library

from moe3d_deploy.errors import EngineError, InputError
from moe3d_deploy.native.elf import NotLoadableError, exported_names
from moe3d_deploy.trt import PluginLibrary, plugin_library

HOW = "build it as docs/plugin.md says"


@pytest.fixture(autouse=True)
def nothing_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin_library, "_registered", [])


def refused(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        PluginLibrary.of(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The file


def test_the_names_of_a_compilers_library_are_read(tmp_path: Path) -> None:
    """Defined and visible ones alone: neither what it needs from others nor what is hidden or static."""
    source = """
    #include <cstdlib>
    extern "C" void getCreators() { std::abort(); }
    extern "C" __attribute__((visibility("hidden"))) void hidden() {}
    extern "C" __attribute__((weak)) void weak() {}
    extern "C" { extern const int moe3d_plugin_for_tensorrt_11; const int moe3d_plugin_for_tensorrt_11 = 11; }
    static void local() {}
    void (*volatile keep)() = local;
    """
    names = exported_names(compiled(tmp_path / "lib.so", source).read_bytes())
    assert {"getCreators", "weak", "moe3d_plugin_for_tensorrt_11"} <= names
    assert not {"abort", "hidden", "local"} & names


def test_the_hand_written_library_of_these_tests_is_read_alike() -> None:
    assert exported_names(shared_library(["a", "getCreators"], undefined=["abort"])) == {"a", "getCreators"}


def test_a_library_tells_its_digest_and_its_tensorrt(tmp_path: Path) -> None:
    path = plugin_file(tmp_path / "lib.so", 11)
    found = PluginLibrary.of(path)
    assert (found.path, found.major) == (path, 11)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_path_that_leads_nowhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "none.so"
    assert refused(path) == f"plugin library {path} cannot be read: No such file or directory; {HOW}"
    assert refused(tmp_path) == f"plugin library {tmp_path} cannot be read: Is a directory; {HOW}"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "is no shared library (no ELF file)"),
        (b"import os\n", "is no shared library (no ELF file)"),
        (b"\x7fELF\x01\x01" + bytes(99), "is a shared library of another kind of machine (not 64-bit little-endian)"),
        (shared_library(["getCreators"], kind=2), "is an ELF file, but no shared library"),
        (shared_library(["getCreators"], machine=40), "is a shared library for another processor, this machine is "),
        (shared_library(["getCreators"])[:-100], "is a damaged shared library"),
        (shared_library(["getCreators"])[:40], "is a damaged shared library"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_refused_with_the_reason(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "lib.so"
    path.write_bytes(content)
    line = refused(path)
    assert line.startswith(f"plugin library {path} {why}")
    assert line.endswith(HOW)


@pytest.mark.parametrize("cut", range(0, 500, 7))
def test_no_damage_is_anything_but_a_refusal(cut: int) -> None:
    whole = shared_library(["getCreators", "moe3d_plugin_for_tensorrt_10"])
    damaged = bytearray(whole)
    damaged[cut % len(whole)] ^= 0xFF
    for content in (bytes(damaged), whole[:cut]):
        try:
            exported_names(content)
        except NotLoadableError:
            continue


def test_a_library_that_is_no_plugin_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "libmoe3d_expert_mix.so"
    path.write_bytes(shared_library(["moe3d_expert_mix"], undefined=["getCreators"]))
    assert refused(path) == (
        f"plugin library {path} exports no getCreators, so it is no TensorRT plugin (libmoe3d_expert_mix.so is "
        f"PyTorch's); {HOW}"
    )


@pytest.mark.parametrize("more", [[], ["moe3d_plugin_for_tensorrt_10", "moe3d_plugin_for_tensorrt_11"]])
def test_a_plugin_that_does_not_say_for_which_tensorrt_it_is_is_refused(tmp_path: Path, more: list[str]) -> None:
    path = tmp_path / "other.so"
    path.write_bytes(shared_library(["getCreators", *more]))
    assert "does not say which TensorRT it is for, so it is not this version's libmoe3d_plugin_trt*.so" in refused(path)


@pytest.mark.parametrize("inside", ["lib.so", "engines/lib.so"])
def test_no_library_of_a_bundle_is_taken_not_even_by_a_link(tmp_path: Path, inside: str) -> None:
    bundle = tmp_path / "bundle"
    write_bundle(bundle)
    (bundle / "engines").mkdir(exist_ok=True)
    path, link = plugin_file(bundle / inside), tmp_path / "link.so"
    link.symlink_to(path)
    for given in (path, link):
        assert refused(given) == (
            f"plugin library {given} lies in the bundle {bundle}, and no code is loaded from a bundle; give one that "
            "you built, from another place"
        )
    PluginLibrary.of(Path(shutil.copy(path, tmp_path / "lib.so")))


@pytest.mark.parametrize("version", ["11.1.0.2", "9.3.0", ""])
def test_a_library_for_another_major_is_refused(tmp_path: Path, version: str) -> None:
    found = PluginLibrary.of(plugin_file(tmp_path / "lib.so", 10))
    found.check_version("10.3.0.26")
    with pytest.raises(InputError, match=rf"lib\.so is for TensorRT 10, here is {version}; give libmoe3d_plugin_trt"):
        found.check_version(version)


# The registry


@pytest.fixture
def library(tmp_path: Path) -> PluginLibrary:
    load_polygraphy()
    return PluginLibrary.of(plugin_file(tmp_path / "lib.so"))


def test_a_library_is_registered_once_and_its_plugin_looked_for(library: PluginLibrary) -> None:
    trt = FakeTensorRT()
    library.register(trt)
    library.register(trt)
    assert trt.calls == [("load_library", str(library.path)), ("get_creator", "ExpertMix", "1", "")]


def test_a_process_takes_one_library(library: PluginLibrary, tmp_path: Path) -> None:
    library.register(FakeTensorRT())
    other, trt = PluginLibrary.of(plugin_file(tmp_path / "other.so", more=["x"])), FakeTensorRT()
    with pytest.raises(EngineError) as caught:
        other.register(trt)
    assert str(caught.value) == (
        f"this process already has the plugin library of SHA-256 {library.sha256}, so it cannot take {other.path}; "
        "start another process"
    )
    assert trt.calls == []


def test_a_library_that_changed_after_it_was_looked_at_is_not_loaded(library: PluginLibrary) -> None:
    trt = FakeTensorRT()
    plugin_file(library.path, more=["x"])
    with pytest.raises(EngineError, match=r"lib\.so has changed since it was looked at; start again$"):
        library.register(trt)
    assert trt.calls == []


@pytest.mark.parametrize(
    ("behaviour", "why"),
    [
        ({"takes": False}, "TensorRT 10.16.1.11 does not load plugin library {path}: "),
        ({"creator": False}, "plugin library {path} brings no plugin ExpertMix; " + HOW),
    ],
)
def test_a_library_that_tensorrt_does_not_take_is_an_error(
    library: PluginLibrary, behaviour: dict[str, Any], why: str
) -> None:
    with pytest.raises(EngineError) as caught:
        library.register(FakeTensorRT(**behaviour))
    assert str(caught.value).startswith(why.format(path=library.path))
    assert str(caught.value).endswith(HOW)
    assert plugin_library._registered == []

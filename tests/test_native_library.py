"""Finding, loading and building the expert-mix library, and which form of the mix a model then gets."""

import os
import subprocess
import sys
from pathlib import Path

import native_host
import pytest
from click.testing import CliRunner
from native_host import NATIVE, run, tool
from native_sources import compiled, spoilt_entry

from moe3d_deploy.config import ModelConfig, MoeConfig
from moe3d_deploy.errors import InputError, Moe3dError
from moe3d_deploy.files import sha256_file
from moe3d_deploy.native import __main__ as command_line
from moe3d_deploy.native import build as building
from moe3d_deploy.native import loading
from moe3d_deploy.runtime.expert_mix_choice import choose_mix

pytest_plugins = ["native_fixtures", "native_library"]

MOE = ModelConfig(moe=MoeConfig())
BUILD_IT = "build it again with: python -m moe3d_deploy.native build"


@pytest.fixture(autouse=True)
def nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No library is named, built or installed; returns the folder that stands for the package's."""
    monkeypatch.delenv(loading.VARIABLE, raising=False)
    monkeypatch.setattr(loading, "PACKAGE_FOLDER", tmp_path / "package")
    monkeypatch.setattr(loading.sys, "prefix", str(tmp_path / "prefix"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    if any(path.is_file() for path in loading._usual_places()):
        pytest.skip("the kernel's library is installed for the whole machine")
    return tmp_path / "package"


def place(path: Path) -> Path:
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    return path


def test_a_named_library_comes_before_the_packages_and_that_before_an_installed_one(
    nothing_installed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert loading.find() is None
    installed = place(tmp_path / "home" / ".local" / "lib64" / "libmoe3d_expert_mix.so")
    assert loading.find() == loading.Found(installed)
    nearer = place(tmp_path / "prefix" / "lib" / "libmoe3d_expert_mix.so")
    assert loading.find() == loading.Found(nearer)
    built = place(nothing_installed / "libmoe3d_expert_mix.so")
    assert loading.find() == loading.Found(built)
    monkeypatch.setenv("MOE3D_NATIVE", "mine.so")
    assert loading.find() == loading.Found(Path("mine.so"), "MOE3D_NATIVE")


def test_the_structures_are_those_that_the_kernels_tests_use() -> None:
    """tests/native_host.py was written from the header on its own."""
    for mine, theirs in ((loading.Sizes, native_host.Sizes), (loading.Tensors, native_host.Tensors)):
        assert [(name, kind) for name, kind in mine._fields_] == [(name, kind) for name, kind in theirs._fields_]
    assert native_host.TYPES == loading.TYPES
    assert {"nchw": loading.NCHW, "channels_last": loading.CHANNELS_LAST} == native_host.LAYOUTS


def test_a_library_is_loaded_once_and_tells_its_digest(stand_in: Path) -> None:
    loaded = loading.load(stand_in)
    assert loading.load(stand_in) is loaded
    assert loaded.digest() == sha256_file(stand_in)
    assert loaded.text(4) == "the number of experts is out of range; expected 1 to 16"


def test_a_real_build_of_the_entry_is_accepted(native_build: tuple[Path, str]) -> None:
    """The GPU's library by CMake: the ABI check needs no device."""
    assert loading.load(native_build[0] / "libmoe3d_expert_mix.so").text(0) == "ok"


def test_a_path_that_leads_nowhere_names_the_command_that_builds_it(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        loading.load(tmp_path / "none.so")
    assert str(caught.value) == (
        f"{tmp_path / 'none.so'}: there is no such file; build the expert-mix kernel with: "
        "python -m moe3d_deploy.native build"
    )


def test_a_file_that_is_no_library_is_said_to_be_none(tmp_path: Path) -> None:
    path = tmp_path / "text.so"
    path.write_text("no ELF\n")
    with pytest.raises(Moe3dError) as caught:
        loading.load(path)
    assert str(caught.value).startswith(f"{path} cannot be loaded: ")
    assert str(caught.value).endswith(BUILD_IT)
    assert "\n" not in str(caught.value)


def test_another_library_such_as_the_tensorrt_plugin_is_refused(tmp_path: Path) -> None:
    path = compiled(tmp_path / "libmoe3d_plugin_trt11.so", 'extern "C" int getCreators() { return 0; }')
    with pytest.raises(Moe3dError, match=r"has no function moe3d_expert_mix, so it is not this version's libmoe3d_exp"):
        loading.load(path)


@pytest.mark.parametrize("version", [0, 2])
def test_a_library_of_another_version_of_the_interface_is_refused(tmp_path: Path, version: int) -> None:
    path = compiled(tmp_path / "lib.so", spoilt_entry(0, version))
    with pytest.raises(Moe3dError) as caught:
        loading.load(path)
    assert str(caught.value) == (
        f"{path} has version {version} of the C interface, this version of moe3d-deploy has 1; {BUILD_IT}"
    )


def test_the_versions_of_header_and_loader_are_one() -> None:
    header = (NATIVE / "plugin" / "moe3d_expert_mix.h").read_text(encoding="utf-8")
    assert f"#define MOE3D_ABI_VERSION {loading.ABI_VERSION}\n" in header


# A structure of another version: a field more at its front, within it, and among the addresses.
@pytest.mark.parametrize(
    ("before", "after", "fault"),
    [
        ("int32_t type;  ", "int32_t version; int32_t type;", "a mix of no view gives status 4, expected 0"),
        (
            "int64_t expert_width;",
            "int64_t reserved; int64_t expert_width;",
            "a mix of no view gives status 5, expected 0",
        ),
        (
            "float* confidence; ",
            "float* confidence; float* variance; ",
            "a wrong address of weights gives status 10, expected 9",
        ),
    ],
)
def test_a_library_of_another_abi_is_refused(tmp_path: Path, before: str, after: str, fault: str) -> None:
    header = (NATIVE / "plugin" / "moe3d_expert_mix.h").read_text(encoding="utf-8")
    assert header.count(before) == 1
    (tmp_path / "moe3d_expert_mix.h").write_text(header.replace(before, after), encoding="utf-8")
    launch = NATIVE / "plugin" / "expert_mix_launch.h"
    (tmp_path / "launch.h").write_text(launch.read_text(encoding="utf-8"), encoding="utf-8")
    source = """
#include "launch.h"
extern "C" int moe3d_abi_version() { return MOE3D_ABI_VERSION; }
extern "C" int moe3d_expert_mix(const moe3d::Sizes* sizes, const moe3d::Tensors* tensors, void*) {
    moe3d::Plan plan;
    return moe3d::make_plan(*sizes, *tensors, &plan);
}
extern "C" const char* moe3d_error_text(int status) { return moe3d::status_text(status); }
"""
    path = compiled(tmp_path / "lib.so", source, f"-I{tmp_path}")
    with pytest.raises(Moe3dError) as caught:
        loading.load(path)
    assert str(caught.value) == f"{path} is of another version of this package: {fault}; {BUILD_IT}"


def test_a_library_that_refuses_nothing_is_refused(tmp_path: Path) -> None:
    path = compiled(tmp_path / "lib.so", spoilt_entry(0))
    with pytest.raises(Moe3dError, match="a wrong type gives status 0, expected 2"):
        loading.load(path)


def test_loading_needs_neither_torch_nor_a_gpu_package(stand_in: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from moe3d_deploy.native import build, loading\n"
        f"loading.load(Path({str(stand_in)!r}))\n"
        "assert not {'torch', 'numpy', 'onnxruntime', 'tensorrt'} & set(sys.modules)"
    )
    assert run(sys.executable, "-c", script) == ""


@pytest.mark.parametrize(
    ("asked", "here", "expected"),
    [
        ([], [], [75, 80, 90, 120]),  # no GPU: all but those below TensorRT's floor
        ([], [90, 90], [90]),
        ([], [89, 121], [80, 120]),  # what nvcc does not know runs on what it knows, by binary or by PTX
        ([120, 80], [90], [80, 120]),
    ],
)
def test_architectures_are_those_asked_for_else_the_gpus_else_all(
    asked: list[int], here: list[int], expected: list[int]
) -> None:
    assert building.choose_architectures(asked, [50, 75, 80, 90, 120], here) == expected


def test_architectures_that_nvcc_lacks_are_refused() -> None:
    with pytest.raises(InputError, match="^architecture 89 is none that nvcc offers; choose from 75, 80$"):
        building.choose_architectures([80, 89], [75, 80], [])
    with pytest.raises(Moe3dError, match=r"^this GPU is of compute capability 7\.0; nvcc offers 75, 80: name an arch"):
        building.choose_architectures([], [75, 80], [70])
    with pytest.raises(Moe3dError, match="^nvcc names no compute capability from 75 up"):
        building.choose_architectures([], [50], [])


def fake_nvcc(folder: Path, does: str) -> None:
    folder.mkdir()
    script = folder / "nvcc"
    script.write_text(
        f'#!/bin/sh\nif [ "$1" = --list-gpu-arch ]; then echo compute_75; echo compute_89; exit; fi\n{does}'
    )
    script.chmod(0o755)


def test_a_build_calls_nvcc_once_and_checks_what_came(
    tmp_path: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stand-in comes out of this nvcc; its words are kept."""
    words = tmp_path / "words"
    last = 'for word; do out="$word"; done'
    fake_nvcc(tmp_path / "bin", f'echo "$@" >> {words}\n{last}\ncp {stand_in} "$out"')
    monkeypatch.setenv("CUDACXX", str(tmp_path / "bin" / "nvcc"))
    path = building.build(tmp_path / "new" / "out", [89])
    assert path == tmp_path / "new" / "out" / "libmoe3d_expert_mix.so"
    assert loading.load(path).text(0) == "ok"
    (line,) = words.read_text().splitlines()
    assert "-gencode=arch=compute_89,code=sm_89 -gencode=arch=compute_89,code=compute_89" in line
    assert "compute_75" not in line
    sources = {Path(word.rpartition("=")[2]) for word in line.split() if word.endswith((".cu", ".map"))}
    assert len(sources) == 2
    assert all(source.is_file() for source in sources)


@pytest.mark.parametrize(
    ("does", "message"),
    [
        (
            "echo; echo 'kernel.cu(3): error: no such thing' >&2; exit 2",
            "nvcc ended with code 2: kernel.cu(3): error: no",
        ),
        ("exit 1", "nvcc ended with code 1: no message"),
        ('for word; do out="$word"; done; echo text > "$out"', "cannot be loaded: "),
    ],
)
def test_a_failed_build_says_why_and_leaves_what_was_there(
    tmp_path: Path, does: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_nvcc(tmp_path / "bin", does)
    monkeypatch.setenv("CUDACXX", str(tmp_path / "bin" / "nvcc"))
    before = place(tmp_path / "out" / "libmoe3d_expert_mix.so")
    before.write_text("the old one")
    with pytest.raises(Moe3dError) as caught:
        building.build(tmp_path / "out", [89])
    assert message in str(caught.value)
    assert before.read_text() == "the old one"
    assert list((tmp_path / "out").iterdir()) == [before]


def test_without_nvcc_the_build_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(building.shutil, "which", lambda *_, **__: None)
    with pytest.raises(Moe3dError, match="^nvcc was not found; install the CUDA toolkit, or set CUDA_HOME"):
        building.build(tmp_path)


@pytest.mark.full
def test_the_library_by_nvcc_alone_is_that_of_cmake(tmp_path: Path) -> None:
    """Built for real, for one architecture: it loads, and exports the functions of the C entry alone."""
    tool("nvcc", "compiles the kernels")
    path = building.build(tmp_path, [89])
    assert loading.load(path).text(0) == "ok"
    exported = run(tool("nm", "lists symbols"), "-D", "--defined-only", path)
    names = sorted(line.split()[-1] for line in exported.splitlines())
    assert names == ["moe3d_abi_version", "moe3d_error_text", "moe3d_expert_mix"]


def test_the_command_builds_and_says_how_to_use_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def build(out: Path, architectures: list[int]) -> Path:
        asked.append((out, architectures))
        return place(out / "libmoe3d_expert_mix.so")

    monkeypatch.setattr(command_line, "build", build)
    out = tmp_path / "made"
    done = CliRunner().invoke(command_line.command, ["build", "--out", str(out), "--arch", "89, 90"])
    assert asked == [(out, [89, 90])]
    path = out / "libmoe3d_expert_mix.so"
    assert done.output.splitlines() == [f"{path}: 0.0 MB", f"to use it: MOE3D_NATIVE={path}"]
    done = CliRunner().invoke(command_line.command, ["build", "--arch", "sm_89"])
    assert isinstance(done.exception, InputError)
    assert str(done.exception).startswith("--arch sm_89: expected compute capabilities times 10")


def test_the_command_tells_which_library_is_used(stand_in: Path) -> None:
    command = [sys.executable, "-m", "moe3d_deploy.native", "which"]
    environment = {**os.environ, "MOE3D_NATIVE": str(stand_in)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{stand_in}: sha256 {sha256_file(stand_in)}\n"
    environment["MOE3D_NATIVE"] = "none.so"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("python -m moe3d_deploy.native: none.so: there is no such file")


def test_the_kernel_is_chosen_where_its_library_is_found(stand_in: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOE3D_NATIVE", str(stand_in))
    choice = choose_mix(None, MOE, ("expert_weights",), "cuda")
    assert choice.library == stand_in
    assert choice.note == "expert mix: the kernel in libmoe3d_expert_mix.so"
    named = choose_mix(str(stand_in), MOE, (), "cuda")
    assert named == choice


def test_without_a_library_the_plain_form_runs_and_says_so() -> None:
    choice = choose_mix(None, MOE, (), "cuda")
    assert choice.library is None
    assert choice.note == (
        "expert mix: PyTorch's operators (there is no library of the kernel; build it with: "
        "python -m moe3d_deploy.native build)"
    )


def narrow(**changed: int) -> ModelConfig:
    return ModelConfig(moe=MoeConfig(**changed))


UNSUITABLE = [
    (MOE, (), "cpu", "the kernel needs a GPU that PyTorch sees, and there is none"),
    (
        MOE,
        ("depth_variance",),
        "cuda",
        "the kernel does not keep each expert's depth, which output depth_variance needs",
    ),
    (narrow(num_experts=17), (), "cuda", "the kernel mixes at most 16 experts, this model has 17"),
    (narrow(hidden_channels=12), (), "cuda", "the kernel takes widths that are multiples of 8, this model has 12"),
    (narrow(gate_hidden_channels=4), (), "cuda", "the kernel takes widths that are multiples of 8, this model has 4"),
]


@pytest.mark.parametrize(("config", "outputs", "device", "reason"), UNSUITABLE)
def test_where_the_kernel_cannot_serve_asking_for_it_is_an_error_and_finding_it_a_note(
    stand_in: Path,
    monkeypatch: pytest.MonkeyPatch,
    config: ModelConfig,
    outputs: tuple[str, ...],
    device: str,
    reason: str,
) -> None:
    with pytest.raises(InputError) as caught:
        choose_mix(stand_in, config, outputs, device)
    assert str(caught.value) == f"plugin {stand_in}: {reason}; leave it out"
    monkeypatch.setenv("MOE3D_NATIVE", str(stand_in))
    choice = choose_mix(None, config, outputs, device)
    assert choice.library is None
    assert choice.note == f"expert mix: PyTorch's operators ({reason})"


def test_a_model_without_experts_has_nothing_to_choose(stand_in: Path) -> None:
    assert choose_mix(None, ModelConfig(), (), "cuda").note is None
    with pytest.raises(InputError, match="this model has no experts, so there is nothing to mix; leave it out$"):
        choose_mix(stand_in, ModelConfig(), (), "cuda")


def test_on_a_cpu_nothing_is_said_unless_a_library_is_named() -> None:
    assert choose_mix(None, MOE, (), "cpu").note is None
    assert choose_mix("none", MOE, (), "cuda").note == "expert mix: PyTorch's operators (as asked)"


def test_a_broken_library_is_an_error_where_it_is_named_and_a_note_where_it_is_found(
    nothing_installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = place(nothing_installed / "libmoe3d_expert_mix.so")
    choice = choose_mix(None, MOE, (), "cuda")
    assert choice.library is None
    assert choice.note is not None
    assert choice.note.startswith(f"expert mix: PyTorch's operators ({path} cannot be loaded: ")
    monkeypatch.setenv("MOE3D_NATIVE", str(path))
    with pytest.raises(Moe3dError, match="cannot be loaded: "):
        choose_mix(None, MOE, (), "cuda")
    with pytest.raises(Moe3dError, match="cannot be loaded: "):
        choose_mix(path, MOE, (), "cuda")

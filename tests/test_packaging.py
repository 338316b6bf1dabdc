"""Wheel, source distribution and editable install: the linked stages arrive in each as ordinary sub-packages."""

import email
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import moe3d_deploy
from moe3d_deploy.errors import EXTRA_OF

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("export", "engines", "benchmarks")

DATA = {
    "moe3d_deploy/export/limits.json",
    "moe3d_deploy/benchmarks/results/of-a-test.json",
    "moe3d_deploy/engines/native/plugin/expert_mix_kernel.cu",
    "moe3d_deploy/engines/native/plugin/moe3d_expert_mix.h",
    "moe3d_deploy/engines/native/plugin/c_entry.map",
    "moe3d_deploy/weights/of-a-test.json",
    "moe3d_deploy/weights/of-a-test.safetensors",
}

# Needs a file that is no module: a share of the 16-bit range, from export/limits.json.
LIMIT = "from moe3d_deploy.export.compare import Limits; print(Limits.of('fp16').headroom)"

# Trained weights are found beside the package's modules.
WEIGHTS = "from moe3d_deploy import shipped_weights as s; print(s.weights_file('of-a-test').read_text(), end='')"

# What builds the expert-mix kernel is there, all of it: the compiler would fail without one of its headers.
SOURCES = (
    "from moe3d_deploy.native.build import SOURCES\nprint(*sorted(path.name for path in SOURCES.iterdir()), sep='\\n')"
)

# Run from elsewhere: import every stage, say where they come from and whether that loaded a heavy library.
PROBE = """
import sys
import moe3d_deploy
heavy = {"torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "polygraphy", "cv2", "PIL"}
assert not heavy.intersection(sys.modules), heavy.intersection(sys.modules)
import moe3d_deploy.export, moe3d_deploy.engines, moe3d_deploy.benchmarks
for name in ("export", "engines", "benchmarks"):
    print(sys.modules["moe3d_deploy." + name].__file__)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the tree with its links as they are: building leaves files beside the sources."""
    copy = tmp_path_factory.mktemp("packaging") / "source"
    copy.mkdir()
    ignore = shutil.ignore_patterns("__pycache__", "build", "*.egg-info", ".*")
    for name in ("moe3d_deploy", *STAGES, "docs", "tests"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy2(path, copy)
    results = copy / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    (results / "of-a-test.json").write_text("{}\n")
    weights = copy / "moe3d_deploy" / "weights"
    weights.mkdir(exist_ok=True)
    (weights / "of-a-test.json").write_text("{}\n")
    (weights / "of-a-test.safetensors").write_text("weights\n")
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    return build(source, "--wheel")


@pytest.fixture(scope="module")
def sdist(source: Path) -> Path:
    return build(source, "--sdist")


def build(source: Path, kind: str) -> Path:
    """Build with the setuptools of this environment, so that nothing is downloaded."""
    out = source.parent / kind.strip("-")
    succeed([sys.executable, "-m", "build", "--no-isolation", kind, "--outdir", str(out), str(source)])
    (path,) = out.iterdir()
    return path


def succeed(command: list[str], cwd: Path | None = None) -> str:
    result = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def environment() -> dict[str, str]:
    """This process's, without what would let an import find the checkout."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}


def install(what: str, folder: Path, *options: str) -> Path:
    """Install into a new virtual environment in `folder` without any download; returns its folder of commands.

    The dependencies are those of this environment, by a .pth file: it puts them behind the new environment's own
    packages, and does not follow the .pth files among them, so an editable install made here stays out of sight.
    """
    succeed([sys.executable, "-m", "venv", "--without-pip", str(folder)])
    python = folder / "bin" / "python"
    site_packages = Path(succeed([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    here = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
    (site_packages / "dependencies.pth").write_text("\n".join(here) + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-index"]
    succeed([*pip, "--no-deps", "--no-build-isolation", "--ignore-installed", *options, what])
    return folder / "bin"


def check_installed(commands: Path, place: Path, elsewhere: Path) -> None:
    """The stages come from below `place`, and the commands are there."""
    origins = succeed([str(commands / "python"), "-c", PROBE], cwd=elsewhere).splitlines()
    assert origins == [str(place / "moe3d_deploy" / stage / "__init__.py") for stage in STAGES]
    for command in ("moe3d", "python -m moe3d_deploy"):
        program, *rest = command.split()
        version = succeed([str(commands / program), *rest, "--version"], cwd=elsewhere)
        assert version == f"moe3d {moe3d_deploy.__version__}\n"
    assert (commands / "moe3d-export").is_file()


def site_packages_of(commands: Path) -> Path:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return commands.parent / "lib" / version / "site-packages"


def package_modules(root: Path) -> set[str]:
    """Every .py file of a package below moe3d_deploy/, through the links, relative to `root`."""
    return {
        os.path.relpath(os.path.join(folder, name), root)
        for folder, _, names in os.walk(root / "moe3d_deploy", followlinks=True)
        if "__init__.py" in names
        for name in names
        if name.endswith(".py")
    }


def test_stages_are_relative_links_to_the_top_level_folders() -> None:
    if not (ROOT / "export").is_dir():
        pytest.skip("an unpacked source distribution has ordinary folders instead")
    assert {stage: os.readlink(ROOT / "moe3d_deploy" / stage) for stage in STAGES} == {
        stage: f"../{stage}" for stage in STAGES
    }


def test_wheel_holds_the_package_as_ordinary_files_and_nothing_else(wheel: Path, source: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        members = archive.infolist()
    assert all(stat.S_ISREG(member.external_attr >> 16) for member in members)
    files = {member.filename for member in members}
    assert {f"moe3d_deploy/{stage}/__init__.py" for stage in STAGES} < files
    assert {name for name in files if name.endswith(".py")} == package_modules(source)
    assert {"moe3d_deploy/py.typed", *DATA} <= files
    dist_info = f"moe3d_deploy-{moe3d_deploy.__version__}.dist-info"
    assert {name.split("/")[0] for name in files} == {"moe3d_deploy", dist_info}
    assert f"{dist_info}/licenses/LICENSE" in files


def test_wheel_metadata_names_version_licence_extras_and_commands(wheel: Path) -> None:
    dist_info = f"moe3d_deploy-{moe3d_deploy.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read(f"{dist_info}/METADATA"))
        entry_points = archive.read(f"{dist_info}/entry_points.txt").decode()
    assert metadata["Name"] == "moe3d-deploy"
    assert metadata["Version"] == moe3d_deploy.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"export", "cpu", "gpu", "trt", "rtx", "dev"} <= set(metadata.get_all("Provides-Extra", []))
    core = {re.split(r"[^\w-]", r)[0] for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r}
    assert core == {"numpy", "opencv-python-headless", "Pillow", "click"}
    assert "moe3d = moe3d_deploy.cli.main:main" in entry_points
    assert "moe3d-export = moe3d_deploy.cli.main:export_main" in entry_points


def test_sdist_holds_ordinary_files_and_what_it_takes_to_build_and_test(sdist: Path, source: Path) -> None:
    with tarfile.open(sdist) as archive:
        assert all(member.isfile() or member.isdir() for member in archive)
        files = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"setup.cfg", "pyproject.toml", "constraints.txt", "Makefile", "LICENSE"}
    assert wanted | {"README.md", "CHANGELOG.md", "SECURITY.md", "tests/conftest.py", *DATA} <= files
    assert package_modules(source) <= files
    assert not [name for name in files if re.match(r"(export|engines|benchmarks)/.*\.py$", name)]
    native = {str(path.relative_to(source)) for path in (source / "engines" / "native").rglob("*") if path.is_file()}
    assert native <= files


def test_installed_wheel_runs_from_elsewhere(wheel: Path, tmp_path: Path) -> None:
    commands = install(str(wheel), tmp_path / "venv")
    check_installed(commands, site_packages_of(commands), tmp_path)
    assert succeed([str(commands / "python"), "-c", LIMIT], cwd=tmp_path) == "0.5\n"
    assert succeed([str(commands / "python"), "-c", WEIGHTS], cwd=tmp_path) == "weights\n"
    sources = succeed([str(commands / "python"), "-c", SOURCES], cwd=tmp_path).split()
    assert sources == sorted(path.name for path in (ROOT / "engines" / "native" / "plugin").iterdir())


def test_unpacked_sdist_finds_its_data(sdist: Path, tmp_path: Path) -> None:
    shutil.unpack_archive(sdist, tmp_path)
    (unpacked,) = tmp_path.iterdir()
    assert succeed([sys.executable, "-c", LIMIT], cwd=unpacked) == "0.5\n"
    assert succeed([sys.executable, "-c", WEIGHTS], cwd=unpacked) == "weights\n"
    place = [sys.executable, "-c", "import moe3d_deploy.export; print(moe3d_deploy.export.__file__)"]
    assert succeed(place, cwd=unpacked) == f"{unpacked}/moe3d_deploy/export/__init__.py\n"


def test_installed_sdist_runs_from_elsewhere(sdist: Path, tmp_path: Path) -> None:
    commands = install(str(sdist), tmp_path / "venv")
    check_installed(commands, site_packages_of(commands), tmp_path)


def test_editable_install_runs_from_elsewhere(source: Path, tmp_path: Path) -> None:
    check_installed(install(str(source), tmp_path / "venv", "--editable"), source, tmp_path)


def test_constraints_pin_every_direct_dependency_of_setup() -> None:
    """make setup installs the core and these extras; whatever of them is not pinned changes under the tests."""
    pinned = {name.lower() for name in re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.M)}
    config = (ROOT / "setup.cfg").read_text()
    installed = {"install_requires", "export", "cpu", "rtx", "train", "viz", "bench", "dev"}
    sections = re.findall(rf"^({'|'.join(installed)}) =\n((?:    .+\n)+)", config, re.M)
    assert {name for name, _ in sections} == installed
    wanted = {line.split()[0].lower() for _, lines in sections for line in lines.splitlines()}
    assert wanted <= pinned


def test_the_extra_that_an_error_names_brings_the_package() -> None:
    """Import names: onnx_ir is the package onnx-ir, rerun is rerun-sdk, skimage is scikit-image."""
    imported_as = {"rerun-sdk": "rerun", "scikit-image": "skimage"}
    config = (ROOT / "setup.cfg").read_text()
    extras = dict(re.findall(r"^(\w+) =\n((?:    .+\n)+)", config.partition("[options.extras_require]")[2], re.M))
    brought = {
        (imported_as.get(line.split()[0], line.split()[0].lower().replace("-", "_")), extra)
        for extra, lines in extras.items()
        for line in lines.splitlines()
    }
    assert set(EXTRA_OF.items()) <= brought
    assert {package for package, extra in brought if extra == "export"} <= EXTRA_OF.keys()


def test_no_file_of_the_repository_names_a_folder_of_one_machine() -> None:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs git and a clone: it lists the files of the repository")
    listing = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    files = [ROOT / name for name in succeed(listing).split("\0") if name]
    assert files
    # an absolute path: not the middle of a relative one or of a URL
    pattern = re.compile(rb"(?<![\w.~-])/(?:" + b"|".join((b"root", b"home", b"work")) + rb")/[^\n]*")
    found = {}
    for path in files:
        if path.is_file() and not path.is_symlink() and b"\0" not in (content := path.read_bytes()):
            found.update({str(path.relative_to(ROOT)): match[0] for match in pattern.finditer(content)})
    assert found == {}

"""`moe3d doctor` as users run it: on this machine, among broken libraries, with the core alone, on bundles."""

import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from bundles import build_new, spoil, write_bundle
from click.testing import CliRunner, Result
from manifests import ENGINE, example_engine

from moe3d_deploy import doctor, probe
from moe3d_deploy.bundle import add_engine
from moe3d_deploy.cli.doctor import doctor_command
from moe3d_deploy.errors import BundleError, Moe3dError
from moe3d_deploy.probe import Answer

ROOT = Path(__file__).resolve().parent.parent
CARD = {"name": "Test Card 9000", "compute_capability": [8, 9], "memory_bytes": 24_000_000_000}
ANSWERS = {
    **{module: Answer({"version": "1.2.3"}) for module in probe.PACKAGES},
    "tensorrt": Answer({"version": "1.6.1"}),
    "tensorrt_rtx": Answer({"version": "1.6.1"}),
    "onnxruntime": Answer({"version": "1.31.1", "providers": ["CPUExecutionProvider"]}),
    "cuda": Answer({"status": 0, "api": "13.0", "gpus": [CARD], "version": "580.10.01"}),
}


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, Answer]:
    """What the libraries of a machine with a GPU answer; without a process for each, so that tests are quick."""
    answers = dict(ANSWERS)
    monkeypatch.setattr(doctor, "_is_installed", lambda module: module in answers)
    monkeypatch.setattr(probe, "ask", lambda names, timeout: {name: answers[name] for name in names})
    return answers


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    path = tmp_path / "bundle"
    write_bundle(path)
    add_engine(path, replace(example_engine(), plugin=None), build_new)
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(doctor_command, [str(argument) for argument in arguments])


def section(output: str, label: str) -> list[str]:
    """The lines of one section, without the label column."""
    lines = output.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(label))
    end = next((i for i in range(start + 1, len(lines)) if not lines[i].startswith("   ")), len(lines))
    return [line[14:] for line in lines[start:end]]


@pytest.mark.usefixtures("answers")
def test_the_report_tells_of_libraries_machine_and_bundle(bundle: Path) -> None:
    result = run(bundle)
    assert result.exit_code == 0, result.output
    out = result.stdout
    assert section(out, "python")[0].startswith(".".join(map(str, sys.version_info[:3])) + ", Linux ")
    assert section(out, "ONNX Runtime") == ["1.31.1, loads, providers CPUExecutionProvider"]
    assert section(out, "TensorRT-RTX")[0].endswith("1.6.1, loads, builds engines without a GPU")
    assert section(out, "CUDA driver") == ["580.10.01, up to CUDA 13.0"]
    assert section(out, "GPUs") == ["Test Card 9000, compute capability 8.9, 24.0 GB"]
    assert f"{len(os.sched_getaffinity(0))} usable by this process" in section(out, "CPU")[0]
    assert "available, container limit" in section(out, "memory")[0]
    assert any("(temporary files" in line or ", temporary files" in line for line in section(out, "disk"))
    assert section(out, "  ONNX file") == ["model.onnx", "can run here in ONNX Runtime on the CPU"]
    assert section(out, "  engine") == [ENGINE, "nothing speaks against running it here"]


def test_what_speaks_against_an_engine_stands_below_it_and_what_to_do_at_the_end(
    bundle: Path, answers: dict[str, Answer]
) -> None:
    answers["tensorrt_rtx"] = Answer({"version": "1.7.1.116"})
    answers["cuda"] = Answer({"status": None, "api": None, "gpus": [], "version": None})
    result = run(bundle)
    assert result.exit_code == 0, result.output
    assert section(result.stdout, "CUDA driver") == ["none (no libcuda.so.1): no engine runs here"]
    assert section(result.stdout, "GPUs") == ["none visible"]
    assert section(result.stdout, "  engine") == [
        ENGINE,
        "does not run here:",
        "- built by TensorRT-RTX 1.6.1, here is 1.7.1.116",
        "- there is no CUDA driver",
    ]
    rebuild = f"moe3d-export {bundle} --builder tensorrt-rtx --views 1:4:8 --height 392 --width 518 --target sm89"
    assert f"  note: {rebuild}" in result.stdout.splitlines()
    assert result.stdout.index("to do") < result.stdout.index("note: run engines on a machine with an NVIDIA GPU")


@pytest.mark.usefixtures("answers")
def test_a_missing_bundle_stands_in_the_report_beside_the_others_and_ends_with_2(bundle: Path) -> None:
    result = run(bundle, bundle.parent / "absent")
    assert isinstance(result.exception, BundleError)
    assert result.exception.exit_code == 2
    assert str(result.exception) == (
        f"{bundle.parent / 'absent'}: missing or broken, see the report; copy the bundle again, or build it again"
    )
    assert "can run here in ONNX Runtime on the CPU" in result.stdout
    assert result.stdout.partition("to do\n")[2].startswith("  error: give the folder that was exported\n")


@pytest.mark.usefixtures("answers")
def test_a_damaged_engine_ends_with_2(bundle: Path) -> None:
    spoil(bundle, "cut off")
    result = run(bundle, "--json")
    assert isinstance(result.exception, BundleError)
    assert json.loads(result.stdout)["bundles"][0]["damaged_engines"] == [ENGINE]


def test_a_core_that_does_not_work_ends_with_1(bundle: Path, answers: dict[str, Answer]) -> None:
    answers["numpy"] = Answer(None, "does not load: ImportError: libgfortran.so.5")
    result = run(bundle.parent / "absent")
    assert isinstance(result.exception, Moe3dError)
    assert result.exception.exit_code == 1
    assert result.stdout.partition("to do\n")[2].startswith("  error: pip install --force-reinstall numpy\n")


@pytest.mark.usefixtures("answers")
def test_json_has_the_documented_keys_and_nothing_else_is_printed(bundle: Path) -> None:
    facts = json.loads(run(bundle, "--json").stdout)
    page = (ROOT / "docs" / "doctor.md").read_text(encoding="utf-8")
    for keys in (facts, facts["bundles"][0], facts["bundles"][0]["engines"][0], facts["cuda"], facts["machine"]):
        assert [key for key in keys if f"`{key}`" not in page] == []


def test_no_line_is_longer_than_a_hundred_columns(bundle: Path, answers: dict[str, Answer]) -> None:
    answers["tensorrt"] = Answer(None, "does not load: OSError: " + "libnvinfer.so.11 cannot be opened " * 8)
    text = run(bundle, "absent").stdout
    long = [line for line in text.splitlines() if len(line) > 100 and len(line.split()[-1]) < 60]
    assert long == []
    assert section(text, "TensorRT")[0].startswith("installed, but does not load: OSError: libnvinfer.so.11")
    assert len(section(text, "TensorRT")) >= 3


def test_control_characters_of_a_library_do_not_reach_the_terminal(answers: dict[str, Answer]) -> None:
    answers["torch"] = Answer(None, "does not load: OSError: \x1b]0;title\x07")
    assert section(run().stdout, "PyTorch") == ["installed, but does not load: OSError: ?]0;title?"]


def test_the_help_has_an_example_that_runs(answers: dict[str, Answer]) -> None:
    lines = run("--help").stdout.splitlines()
    example = next(line.split() for line in lines if line.strip().startswith("moe3d doctor"))
    assert run(*example[2:]).exit_code == 0


# In processes


def run_doctor(
    *arguments: object, python: str = sys.executable, **environment: str
) -> "subprocess.CompletedProcess[str]":
    command = [python, "-m", "moe3d_deploy", "doctor", *map(str, arguments)]
    env = {**os.environ, **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=120)


BROKEN = {
    "onnxruntime": "import time; time.sleep(600)",
    "tensorrt_rtx": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "tensorrt": "raise OSError('libnvinfer.so.11: cannot open shared object file')",
    "torch": "import os; os._exit(7)",
}


def test_libraries_that_hang_crash_or_fail_do_not_take_doctor_along(tmp_path: Path) -> None:
    for module, code in BROKEN.items():
        (tmp_path / module).mkdir()
        (tmp_path / module / "__init__.py").write_text(code)
    done = run_doctor("--json", "--timeout", 4, PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 0, done.stderr
    libraries = json.loads(done.stdout)["libraries"]
    assert {module: libraries[module]["fault"] for module in (*BROKEN, "numpy")} == {
        "onnxruntime": "does not load within 4 s",
        "tensorrt_rtx": "ends the process that loads it with SIGSEGV",
        "tensorrt": "does not load: OSError: libnvinfer.so.11: cannot open shared object file",
        "torch": "ends the process that loads it with code 7",
        "numpy": None,
    }


@pytest.mark.parametrize("module", ["numpy", "cv2"])
def test_a_crashing_core_library_is_reported_too(tmp_path: Path, module: str) -> None:
    (tmp_path / f"{module}.py").write_text("import os; os.abort()")
    done = run_doctor(PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert done.returncode == 1
    text = f"    because   {module}, without which nothing works, ends the process that loads it with SIGABRT"
    assert text in done.stdout.splitlines()
    assert done.stderr == "moe3d: the core does not work here, see the report; install moe3d-deploy again\n"


def core_only(folder: Path) -> str:
    """A virtual environment that sees this package and what its core needs, by links; returns its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    for name in ("numpy", "opencv-python-headless", "Pillow", "click"):
        for file in importlib.metadata.files(name) or ():
            top = Path(file.parts[0])
            source = Path(str(importlib.metadata.distribution(name).locate_file(top)))
            if top.name != ".." and not (packages / top).exists():
                (packages / top).symlink_to(source)
    own = Path(str(importlib.metadata.distribution("moe3d-deploy").locate_file(""))).resolve()
    assert own in {Path(sysconfig.get_path("purelib")).resolve(), ROOT}
    for info in own.glob("moe3d_deploy*-info"):
        (packages / info.name).symlink_to(info)
    (packages / "checkout.pth").write_text(f"{ROOT}\n")
    return str(folder / "bin" / "python")


def test_with_the_core_alone_it_says_what_each_extra_is_for(tmp_path: Path, bundle: Path) -> None:
    python = core_only(tmp_path / "venv")
    done = run_doctor(bundle, python=python, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert section(done.stdout, "ONNX Runtime") == ["not installed (pip install 'moe3d-deploy[cpu]')"]
    assert section(done.stdout, "PyTorch") == ["not installed (pip install 'moe3d-deploy[export]')"]
    assert "cpu: not installed (pip install 'moe3d-deploy[cpu]')" in section(done.stdout, "extras")
    assert "- ONNX Runtime is not installed" in section(done.stdout, "  ONNX file")
    to_do: dict[str, Any] = json.loads(run_doctor("--json", python=python, PYTHONPATH="").stdout)["problems"]
    assert [problem["remedy"] for problem in to_do] == ["pip install 'moe3d-deploy[cpu]'"]


def test_nothing_heavy_is_loaded_in_doctors_own_process() -> None:
    code = """
import sys
from moe3d_deploy import doctor, probe
from moe3d_deploy.cli import doctor as command
doctor.examine(["absent"])
heavy = {"torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "polygraphy", "cv2", "numpy", "PIL"}
print(sorted(heavy.intersection(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"

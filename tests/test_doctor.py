"""What `moe3d doctor` makes of packages, libraries, the driver and disks: what is wrong, and what to do."""

import os
from pathlib import Path

import pytest

from moe3d_deploy import doctor, machine, probe
from moe3d_deploy.doctor import Requirement, examine, requirements
from moe3d_deploy.probe import Answer

VERSIONS = {
    "numpy": "2.4.6",
    "opencv-python-headless": "5.0.0.93",
    "Pillow": "13.0.0",
    "click": "8.5.1",
    "onnxruntime": "1.31.1",
}
METADATA = [
    "numpy>=1.24",
    "opencv-python-headless>=4.7",
    "Pillow>=9.4",
    "click>=8.2",
    'torch>=2.10; extra == "export"',
    'onnx>=1.18; extra == "export"',
    'onnxruntime>=1.20; extra == "cpu"',
    'onnxruntime-gpu>=1.20; extra == "gpu"',
    'tensorrt>=10.3; extra == "trt"',
    'polygraphy>=0.49.20; extra == "trt"',
    'tensorrt_rtx>=1.4; extra == "rtx"',
    'polygraphy>=0.49.26; extra == "rtx"',
    'pytest; extra == "dev"',
    'ruff; extra == "dev"',
]
ANSWERS = {
    **{module: Answer({"version": "1"}) for module in ("numpy", "cv2", "PIL", "click")},
    "onnxruntime": Answer({"version": "1.31.1", "providers": ["CPUExecutionProvider"]}),
    "cuda": Answer({"status": None, "api": None, "gpus": [], "version": None}),
}


class Setup:
    """A machine in which `examine` looks around: installed versions, metadata of this package, answers of libraries."""

    def __init__(self) -> None:
        self.versions = dict(VERSIONS)
        self.metadata: list[str] | None = list(METADATA)
        self.answers = dict(ANSWERS)

    def problems(self) -> list[tuple[str, str, str]]:
        found = examine()["problems"]
        return [(problem["level"], problem["problem"], problem["remedy"]) for problem in found]


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> Setup:
    setup = Setup()
    metadata = doctor.importlib.metadata

    def version(name: str) -> str:
        if name not in setup.versions:
            raise metadata.PackageNotFoundError(name)
        return setup.versions[name]

    def requires(name: str) -> list[str]:
        assert name == "moe3d-deploy"
        if setup.metadata is None:
            raise metadata.PackageNotFoundError(name)
        return setup.metadata

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", requires)
    monkeypatch.setattr(doctor, "_is_installed", lambda module: module in setup.answers)
    monkeypatch.setattr(probe, "ask", lambda names, timeout: {name: setup.answers[name] for name in names})
    return setup


# Packages and extras


def test_requirements_are_read_by_name_lowest_version_and_extra() -> None:
    lines = ["numpy>=1.24", "a[b,c] >= 2.0, <3 ; extra == 'x'", 'd; python_version < "3.11" and extra == "y"', "e"]
    assert requirements(lines) == [
        Requirement("numpy", "1.24", None, conditional=False),
        Requirement("a", "2.0", "x", conditional=False),
        Requirement("d", None, "y", conditional=True),
        Requirement("e", None, None, conditional=False),
    ]


def test_a_machine_that_runs_bundles_has_nothing_to_do(setup: Setup) -> None:
    facts = examine()
    assert facts["problems"] == []
    assert facts["core_works"]
    states = {extra: group["state"] for extra, group in facts["extras"].items()}
    assert states == {
        "core": "complete", "export": "absent", "cpu": "complete", "gpu": "absent", "trt": "absent", "rtx": "absent",
        "dev": "absent",
    }  # fmt: skip


def test_an_extra_with_a_part_missing_or_too_old_is_incomplete(setup: Setup) -> None:
    setup.versions |= {"torch": "2.9.1+cu130"}
    expected = "moe3d-deploy[export] is incomplete: torch is older than 2.10, onnx is not installed"
    assert setup.problems() == [("note", expected, "pip install --upgrade 'moe3d-deploy[export]'")]


@pytest.mark.parametrize("version", ["2.10", "2.10.0", "2.10.0a1", "2.11+cpu", "3"])
def test_versions_are_compared_as_numbers(setup: Setup, version: str) -> None:
    """As text, 2.10 would come before 2.9."""
    setup.versions |= {"torch": version, "onnx": "1.18.0"}
    assert examine()["extras"]["export"]["state"] == "complete"


def test_what_another_extra_has_brought_does_not_begin_one(setup: Setup) -> None:
    setup.versions |= {"tensorrt_rtx": "1.7.1.116", "polygraphy": "0.53.6"}
    states = {extra: group["state"] for extra, group in examine()["extras"].items()}
    assert (states["rtx"], states["trt"]) == ("complete", "absent")


def test_a_package_under_another_name_counts(setup: Setup) -> None:
    setup.versions |= {"tensorrt-cu13": "11.4.0", "polygraphy": "0.53.6", "opencv-python": "4.10"}
    del setup.versions["opencv-python-headless"]
    extras = examine()["extras"]
    assert extras["trt"]["state"] == extras["core"]["state"] == "complete"
    assert extras["trt"]["packages"][0] == {
        "name": "tensorrt", "version": "11.4.0", "brought_by": "tensorrt-cu13", "fault": None,
    }  # fmt: skip


def test_a_package_for_some_machines_only_is_not_missed(setup: Setup) -> None:
    assert setup.metadata is not None
    setup.metadata.append('tomli; python_version < "3.11" and extra == "cpu"')
    assert examine()["extras"]["cpu"]["state"] == "complete"


def test_developers_tools_are_nobodys_problem(setup: Setup) -> None:
    setup.versions["pytest"] = "9.2.0"
    assert examine()["extras"]["dev"]["state"] == "incomplete"
    assert setup.problems() == []


def test_a_core_package_that_is_too_old_is_told(setup: Setup) -> None:
    setup.versions["click"] = "8.1.8"
    expected = (
        "warning",
        "moe3d-deploy is incomplete: click is older than 8.2",
        "pip install --upgrade 'moe3d-deploy'",
    )
    assert setup.problems() == [expected]


def test_a_folder_that_is_not_installed_has_no_extras_to_check(setup: Setup) -> None:
    setup.metadata = None
    assert examine()["extras"] is None
    ((level, problem, remedy),) = setup.problems()
    assert (level, remedy) == ("note", "pip install -e . in that folder")
    assert problem.startswith("moe3d-deploy runs from a folder without being installed")


@pytest.mark.parametrize(
    ("present", "module"),
    [(("onnxruntime", "onnxruntime-gpu"), "onnxruntime"), (("opencv-python-headless", "opencv-python"), "cv2")],
)
def test_packages_that_overwrite_each_other_are_told(setup: Setup, present: tuple[str, str], module: str) -> None:
    setup.versions[present[1]] = "4.13"
    first, second = present
    assert setup.problems() == [
        (
            "warning",
            f"{first} and {second} are installed side by side and overwrite each other's files of {module}",
            f"pip uninstall -y {first} {second}, then pip install the one that is wanted",
        )
    ]


# Libraries


def test_a_core_library_that_does_not_load_is_an_error(setup: Setup) -> None:
    setup.answers["cv2"] = Answer(None, "does not load: ImportError: libGL.so.1")
    assert not examine()["core_works"]
    assert setup.problems() == [
        (
            "error",
            "cv2, without which nothing works, does not load: ImportError: libGL.so.1",
            "pip install --force-reinstall opencv-python-headless",
        )
    ]


def test_a_core_library_that_is_missing_is_an_error(setup: Setup) -> None:
    del setup.answers["numpy"]
    assert ("error", "numpy, without which nothing works, is not installed") in [p[:2] for p in setup.problems()]


def test_a_library_of_an_extra_that_does_not_load_is_a_warning(setup: Setup) -> None:
    setup.answers["tensorrt_rtx"] = Answer(None, "ends the process that loads it with SIGSEGV")
    facts = examine()
    assert facts["core_works"]
    assert facts["libraries"]["tensorrt_rtx"] == {
        "installed": True, "version": None, "fault": "ends the process that loads it with SIGSEGV",
    }  # fmt: skip
    assert setup.problems() == [
        (
            "warning",
            "tensorrt_rtx is installed but ends the process that loads it with SIGSEGV",
            "pip install --force-reinstall tensorrt_rtx",
        )
    ]


def test_what_is_to_be_installed_again_is_named_as_it_was_installed(setup: Setup) -> None:
    setup.versions["onnxruntime-gpu"] = setup.versions.pop("onnxruntime")
    setup.answers["onnxruntime"] = Answer(None, "does not load: ImportError: libcudart.so.13")
    assert setup.problems() == [
        (
            "warning",
            "onnxruntime is installed but does not load: ImportError: libcudart.so.13",
            "pip install --force-reinstall onnxruntime-gpu",
        )
    ]


def test_without_onnxruntime_bundles_do_not_run(setup: Setup) -> None:
    del setup.answers["onnxruntime"], setup.versions["onnxruntime"]
    expected = "onnxruntime is not installed, so bundles do not run"
    assert setup.problems() == [("note", expected, "pip install 'moe3d-deploy[cpu]'")]


@pytest.mark.parametrize(("version", "fine"), [((3, 10), True), ((3, 13), True), ((3, 14), False), ((4, 0), False)])
def test_a_python_that_the_project_does_not_know_is_told(version: tuple[int, int], fine: bool) -> None:
    problems = doctor._problems_of_python(version)
    assert (problems == []) is fine
    for problem in problems:
        assert problem["problem"].endswith("is outside 3.10 to 3.13, which this project is for")


# Driver, disk


def test_a_driver_that_does_not_start_is_told_with_its_status(setup: Setup) -> None:
    setup.answers["cuda"] = Answer({"status": 803, "api": None, "gpus": [], "version": "580.10.01"})
    ((level, problem, remedy),) = setup.problems()
    assert (level, problem) == (
        "warning", "the CUDA driver does not start: cuInit gives CUresult 803, so nothing runs on a GPU",
    )  # fmt: skip
    assert "docker run --gpus all" in remedy
    assert examine()["cuda"]["driver"] == "faulty"


def test_a_driver_that_hangs_is_told(setup: Setup) -> None:
    setup.answers["cuda"] = Answer(None, "does not load within 60 s")
    assert setup.problems()[0][1] == "the CUDA driver does not load within 60 s, so nothing runs on a GPU"


def test_cards_are_shown_as_their_driver_tells_them(setup: Setup) -> None:
    gpu = {"name": "Test Card", "compute_capability": [8, 9], "memory_bytes": 24 << 30}
    setup.answers["cuda"] = Answer({"status": 0, "api": "13.0", "gpus": [gpu], "version": "580.10.01"})
    assert examine()["cuda"] == {
        "driver": "working", "fault": None, "api": "13.0", "version": "580.10.01",
        "gpus": [{"name": "Test Card", "compute_capability": "8.9", "memory_bytes": 24 << 30}],
    }  # fmt: skip


def test_a_machine_without_a_driver_is_no_problem(setup: Setup) -> None:
    assert examine()["cuda"]["driver"] == "absent"
    assert setup.problems() == []


def test_a_disk_that_is_full_or_closed_is_told(setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(machine, "free_disk_bytes", lambda folder: 300_000_000)
    text = f"{tmp_path} (working folder, temporary files) has 0.3 GB free"
    assert [problem[:2] for problem in setup.problems()] == [("warning", text)]
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    text = f"{tmp_path} (working folder, temporary files) cannot be written to"
    assert [problem[:2] for problem in setup.problems()] == [("warning", text)]


def test_a_machine_without_a_place_for_temporary_files_is_told(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(doctor.tempfile, "gettempdir", none)
    expected = ("warning", "no folder for temporary files can be written to", "set TMPDIR to one that can")
    assert expected in setup.problems()

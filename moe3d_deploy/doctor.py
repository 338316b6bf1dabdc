"""What this machine has for exporting, building and running bundles, what is wrong with it, and what to do.

Everything here is JSON-able. No heavy library is loaded in this process: versions come from package metadata, and what
has to be loaded is loaded by `probe` elsewhere. What a bundle needs is looked at in `doctor_bundles`.
"""

import contextlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moe3d_deploy import __version__, machine, probe
from moe3d_deploy.distributions import SUBSTITUTES, installed, reinstall, version_of
from moe3d_deploy.doctor_bundles import examine_bundle
from moe3d_deploy.errors import EXTRA_OF
from moe3d_deploy.probe import Answer

CORE_MODULES = {"numpy": "numpy", "opencv-python-headless": "cv2", "Pillow": "PIL", "click": "click"}
PYTHON_VERSIONS = ((3, 10), (3, 13))  # the lowest and the highest that the project says it runs on
LOW_DISK_BYTES = 1_000_000_000

_DISTRIBUTION = "moe3d-deploy"
_REQUIREMENT = re.compile(r"(?P<name>[A-Za-z0-9._-]+)\s*(?P<versions>[^;]*)(?:;(?P<marker>.*))?")
_EXTRA = re.compile(r"""extra\s*==\s*["']([\w-]+)["']""")

# Distributions that write into one folder: the last one installed wins, and removing one breaks the other.
_RIVALS = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "cv2": ("opencv-python-headless", *SUBSTITUTES["opencv-python-headless"]),
}


class Requirement(NamedTuple):
    """A package that an extra (None: the core) needs: the lowest version, if any, and whether a marker decides it."""

    name: str
    minimum: str | None
    extra: str | None
    conditional: bool


def examine(bundles: Sequence[str] = (), *, timeout_seconds: float = 60) -> dict[str, Any]:
    """Everything that there is to say about this machine and `bundles`; docs/doctor.md lists the keys.

    timeout_seconds   how long a library may take to load before it counts as one that hangs
    """
    modules = [name for name in probe.QUESTIONS if name == "cuda" or _is_installed(name)]
    answers = probe.ask(modules, timeout_seconds)
    cuda = _cuda(answers["cuda"])
    libraries = {name: _library(answers.get(name)) for name in probe.QUESTIONS if name != "cuda"}
    facts: dict[str, Any] = {
        "moe3d_deploy": __version__,
        "python": {"version": platform.python_version(), "executable": sys.executable, "system": _system()},
        "extras": _extras(),
        "libraries": libraries,
        "cuda": cuda,
        "machine": _machine(),
        "disk": _disk(bundles),
    }
    available = facts["machine"]["available_memory_bytes"]
    facts["bundles"] = [examine_bundle(path, libraries, cuda, available) for path in bundles]
    facts["problems"] = [*_problems(facts), *(p for bundle in facts["bundles"] for p in bundle.pop("problems"))]
    facts["core_works"] = all(libraries[module]["fault"] is None for module in CORE_MODULES.values())
    return facts


def _system() -> str:
    return f"{platform.system()} {platform.machine()}"


def _is_installed(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.origin is not None  # a mere folder of that name has no origin


def _library(answer: Answer | None) -> dict[str, Any]:
    """`installed`, `version`, `fault` and what else was found out; a library that does not load is installed."""
    if answer is None:
        return {"installed": False, "version": None, "fault": "is not installed"}
    return {"installed": True, "version": None, **(answer.value or {}), "fault": answer.fault}


def _cuda(answer: Answer) -> dict[str, Any]:
    """`driver`: absent, faulty or working; with `fault`, `version`, `api` and `gpus`."""
    value = answer.value or {"status": None, "api": None, "gpus": [], "version": None}
    status, fault = value["status"], answer.fault
    if status is not None and status != 0:
        fault = f"does not start: cuInit gives CUresult {status}" + (", no device" if status == 100 else "")
    gpus = [{**gpu, "compute_capability": "{}.{}".format(*gpu["compute_capability"])} for gpu in value["gpus"]]
    driver = "faulty" if fault else "absent" if status is None else "working"
    return {"driver": driver, "fault": fault, "version": value["version"], "api": value["api"], "gpus": gpus}


def _machine() -> dict[str, Any]:
    return {
        "cpu": machine.cpu_name(),
        "logical_cores": os.cpu_count(),
        "usable_cores": machine.usable_cores(),
        "core_limit": machine.core_limit(),
        "memory_bytes": machine.memory_bytes(),
        "available_memory_bytes": machine.available_memory_bytes(),
        "memory_limit_bytes": machine.memory_limit_bytes(),
    }


def _disk(bundles: Iterable[str]) -> list[dict[str, Any]]:
    """Where bundles lie or would be written, and where temporary files go: each folder once."""
    places = [("working folder", os.getcwd()), *((f"beside {path}", str(Path(path).parent)) for path in bundles)]
    with contextlib.suppress(FileNotFoundError):  # none of all the usual ones can be written
        places.append(("temporary files", tempfile.gettempdir()))
    rows: dict[str, dict[str, Any]] = {}
    for use, folder in places:
        real = os.path.realpath(folder)
        if real in rows:
            rows[real]["use"] += f", {use}"
        elif os.path.isdir(real):
            free, writable = machine.free_disk_bytes(Path(real)), os.access(real, os.W_OK | os.X_OK)
            rows[real] = {"use": use, "folder": folder, "free_bytes": free, "writable": writable}
    return list(rows.values())


def requirements(lines: Iterable[str]) -> list[Requirement]:
    """The requirements of package metadata (PEP 508), as far as names, lowest versions and extras."""
    found = []
    for line in lines:
        match = _REQUIREMENT.fullmatch(line.strip())
        if match is None:
            continue
        minimum = re.search(r">=\s*([\d.]+)", match["versions"])
        marker = match["marker"] or ""
        extra = _EXTRA.search(marker)
        conditional = bool(_EXTRA.sub("", marker).strip(" ()"))
        found.append(Requirement(match["name"], minimum and minimum[1], extra and extra[1], conditional))
    return found


def _extras() -> dict[str, Any] | None:
    """Per extra, and for `core`: its packages and whether it is complete; None where this package has no metadata."""
    try:
        wanted = requirements(importlib.metadata.requires(_DISTRIBUTION) or ())
    except importlib.metadata.PackageNotFoundError:
        return None
    groups: dict[str, list[dict[str, Any]]] = {}
    for requirement in wanted:
        groups.setdefault(requirement.extra or "core", []).append(_package(requirement))
    complete = {extra for extra, packages in groups.items() if all(package["fault"] is None for package in packages)}
    shared = {package["name"] for extra in complete for package in groups[extra]}
    return {
        extra: {
            "state": "complete"
            if extra in complete
            # what came with another extra does not make this one begun
            else "incomplete"
            if any(package["version"] and package["name"] not in shared for package in packages)
            else "absent",
            "packages": packages,
        }
        for extra, packages in groups.items()
    }


def _package(requirement: Requirement) -> dict[str, Any]:
    name = installed(requirement.name)
    version = name and version_of(name)
    if version is None:
        fault = None if requirement.conditional else "is not installed"
        return {"name": requirement.name, "version": None, "brought_by": None, "fault": fault}
    old = requirement.minimum is not None and _release(version) < _release(requirement.minimum)
    fault = f"is older than {requirement.minimum}" if old else None
    return {"name": requirement.name, "version": version, "brought_by": name, "fault": fault}


def _release(version: str) -> tuple[int, ...]:
    """1.10.2rc1+cpu -> (1, 10, 2), without zeros at the end: 1.18 and 1.18.0 are one."""
    numbers = [int(number) for number in re.findall(r"\d+", re.split(r"[^\d.]", version)[0])]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _problem(level: str, what: str, remedy: str) -> dict[str, str]:
    """level is "error" (the core does not work), "warning", or "note" for what matters to some uses only."""
    return {"level": level, "problem": what, "remedy": remedy}


def _problems(facts: dict[str, Any]) -> list[dict[str, str]]:
    return [
        *_problems_of_python(sys.version_info[:2]),
        *_problems_of_libraries(facts["libraries"]),
        *_problems_of_packages(facts["extras"]),
        *_problems_of_machine(facts["cuda"], facts["disk"]),
    ]


def _problems_of_python(version: tuple[int, int]) -> list[dict[str, str]]:
    low, high = PYTHON_VERSIONS
    if low <= version <= high:
        return []
    text = "Python {}.{} is outside {}.{} to {}.{}, which this project is for".format(*version, *low, *high)
    return [_problem("warning", text, "if something fails, use one of those")]


def _problems_of_libraries(libraries: dict[str, Any]) -> list[dict[str, str]]:
    found = []
    for distribution, module in CORE_MODULES.items():
        if fault := libraries[module]["fault"]:
            text = f"{module}, without which nothing works, {fault}"
            found.append(_problem("error", text, reinstall(distribution)))
    for module in EXTRA_OF:
        library = libraries.get(module, {"installed": False})
        if library["installed"] and library["fault"]:
            text = f"{module} is installed but {library['fault']}"
            found.append(_problem("warning", text, reinstall(module)))  # all are called as their distributions
    if not libraries["onnxruntime"]["installed"]:
        text = "onnxruntime is not installed, so bundles do not run"
        found.append(_problem("note", text, "pip install 'moe3d-deploy[cpu]'"))
    for module, rivals in _RIVALS.items():
        if len(present := [name for name in rivals if version_of(name)]) > 1:
            remedy = f"pip uninstall -y {' '.join(present)}, then pip install the one that is wanted"
            text = f"{' and '.join(present)} are installed side by side and overwrite each other's files of {module}"
            found.append(_problem("warning", text, remedy))
    return found


def _problems_of_packages(extras: dict[str, Any] | None) -> list[dict[str, str]]:
    if extras is None:
        text = "moe3d-deploy runs from a folder without being installed, so its extras cannot be checked"
        return [_problem("note", text, "pip install -e . in that folder")]
    found = []
    for extra, group in extras.items():
        if group["state"] != "incomplete" or extra == "dev":
            continue
        lacking = ", ".join(f"{p['name']} {p['fault']}" for p in group["packages"] if p["fault"])
        name, level = ("moe3d-deploy", "warning") if extra == "core" else (f"moe3d-deploy[{extra}]", "note")
        found.append(_problem(level, f"{name} is incomplete: {lacking}", f"pip install --upgrade '{name}'"))
    return found


def _problems_of_machine(cuda: dict[str, Any], disk: list[dict[str, Any]]) -> list[dict[str, str]]:
    found = []
    if cuda["driver"] == "faulty":
        remedy = "check nvidia-smi; in a container, give it the GPU (docker run --gpus all)"
        found.append(_problem("warning", f"the CUDA driver {cuda['fault']}, so nothing runs on a GPU", remedy))
    if not any("temporary files" in place["use"] for place in disk):
        found.append(
            _problem("warning", "no folder for temporary files can be written to", "set TMPDIR to one that can")
        )
    for place in disk:
        name = f"{place['folder']} ({place['use']})"
        if not place["writable"]:
            found.append(
                _problem("warning", f"{name} cannot be written to", "write to another folder, or change rights")
            )
        elif place["free_bytes"] < LOW_DISK_BYTES:
            free = place["free_bytes"] / 1e9
            remedy = "free some space, or choose another folder (TMPDIR for temporary files)"
            found.append(_problem("warning", f"{name} has {free:.1f} GB free", remedy))
    return found

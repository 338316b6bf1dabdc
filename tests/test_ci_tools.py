"""What CI says of the compilers before the tests, and of what is skipped without them."""

import subprocess
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parent.parent / ".ci" / "tools"
pytestmark = pytest.mark.skipif(not TOOLS.exists(), reason=".ci is in a checkout alone")


def said(path: str, headers: Path | None = None) -> list[str]:
    named = {} if headers is None else {"MOE3D_TENSORRT_HEADERS": str(headers)}
    done = subprocess.run(
        ["/bin/bash", str(TOOLS)], env={"PATH": path, **named}, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


def program(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/bash\n[ \"$1\" = --version ] && printf '%s\\n' {text}\n")
    path.chmod(0o755)


def test_what_is_absent_is_said_with_what_is_skipped(tmp_path: Path) -> None:
    assert said(str(tmp_path)) == [
        "nvcc: absent; skipped is all that compiles the kernels",
        "cmake: absent; skipped is all that builds engines/native",
        "MOE3D_TENSORRT_HEADERS: not set; skipped is the TensorRT plugin: its build and its harness",
    ]


def test_versions_and_headers_are_printed(tmp_path: Path) -> None:
    program(tmp_path, "nvcc", "'nvcc: a compiler' 'release 13.0, V13.0.88'")
    program(tmp_path, "cmake", "'cmake version 3.25.1'")
    headers = tmp_path / "headers"
    for version in ("10.3", "11.1"):
        (headers / version).mkdir(parents=True)
    assert said(f"{tmp_path}:/usr/bin:/bin", headers) == [
        "nvcc: release 13.0, V13.0.88",
        "cmake: cmake version 3.25.1",
        "MOE3D_TENSORRT_HEADERS: 10.3 11.1 ",
    ]


def test_headers_that_are_no_folder_are_said(tmp_path: Path) -> None:
    missing = tmp_path / "gone"
    assert said(str(tmp_path), missing)[2].startswith(f"MOE3D_TENSORRT_HEADERS: {missing} is no folder; skipped is")


def test_ci_prints_them_before_the_tests() -> None:
    run = TOOLS.with_name("run").read_text(encoding="utf-8")
    assert run.index("\n.ci/tools\n") < run.index("in_tree test")

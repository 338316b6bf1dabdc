"""The frame around the GPU checks: whatever a check does, it ends as one of four results, in a file that is whole.

The checks here are those of fake_gpu_checks.py; no GPU is needed.
"""

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from manifests import example_manifest

from moe3d_deploy.benchmarks import gpu_checks
from moe3d_deploy.benchmarks.checks import Check
from moe3d_deploy.benchmarks.gpu_checks import CHECKS, exit_code, main, run_checks, table
from moe3d_deploy.bundle import BundleWriter
from moe3d_deploy.manifest import Tensor


def fake(name: str, limit: float = 60.0) -> Check:
    return Check(name, f"fake_gpu_checks:{name}", limit, f"does {name} do what it says?")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The file of one run of every fake check."""
    out = tmp_path_factory.mktemp("report") / "gpu.json"
    names = ["passes", "fails", "skips", "lacks_an_extra", "lacks_a_module", "raises", "raises_ours", "crashes"]
    checks = [fake(name) for name in (*names, "fails_then_crashes")] + [fake("hangs", 1.0), fake("sees_what_was_left")]
    returned = run_checks(checks, out, facts={"cpu": "test"}, bundle=Path("some") / "bundle")
    found: dict[str, Any] = json.loads(out.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found == returned
    return found


@pytest.mark.parametrize(
    ("name", "status", "reason"),
    [
        ("passes", "passed", None),
        ("fails", "failed", "depth is off by 0.5 (and 1 more)"),
        ("skips", "skipped", "no such library here"),
        ("lacks_an_extra", "skipped", "tensorrt_rtx is not installed: pip install 'moe3d-deploy[rtx]'"),
        ("lacks_a_module", "skipped", "no_such_library is not installed"),
        ("raises", "error", "its process failed: ValueError: what went wrong in file.py (at: second step)"),
        ("raises_ours", "error", "the engine did not run: nothing"),
        ("crashes", "error", f"ended with code {-signal.SIGABRT}"),
        ("crashes", "error", "(at: calling the library)"),
        ("hangs", "error", "took longer than its limit of 1 s (at: waiting)"),
        ("sees_what_was_left", "passed", None),
    ],
)
def test_every_end_of_a_check_is_a_status_with_a_reason(
    report: dict[str, Any], name: str, status: str, reason: str | None
) -> None:
    check = report["checks"][name]
    assert check["status"] == status
    assert (reason in check["reason"]) if reason else "reason" not in check
    assert "\n" not in check.get("reason", "")


def test_report_holds_all_checks_in_order_and_is_complete(report: dict[str, Any]) -> None:
    assert list(report["checks"]) == report["planned"]
    assert report["complete"] is True
    assert report["environment"] == {"cpu": "test"}
    assert report["format_version"] == 1
    for check in report["checks"].values():
        assert check["seconds"] >= 0
        assert check["question"].startswith("does ")


def test_figures_notes_and_failures_are_kept_without_absolute_paths(report: dict[str, Any]) -> None:
    passes = report["checks"]["passes"]
    assert passes["figures"] == {"sum": 2, "where": "file.bin", "error": "inf"}
    assert passes["notes"] == ["a note on file.bin"]
    assert passes["peak_host_bytes"] > 1e6
    fails = report["checks"]["fails"]
    assert fails["failures"] == ["depth is off by 0.5", "so is confidence"]
    assert fails["figures"] == {"error": 0.5, "later": True}


@pytest.mark.parametrize("name", ["crashes", "hangs"])
def test_what_was_recorded_before_a_crash_or_a_hang_is_kept(report: dict[str, Any], name: str) -> None:
    assert report["checks"][name]["figures"] == {"before": 1}


def test_a_failure_before_a_crash_is_kept_beside_the_error(report: dict[str, Any]) -> None:
    check = report["checks"]["fails_then_crashes"]
    assert check["status"] == "error"
    assert check["failures"] == ["depth is off by 0.5"]


def test_checks_of_one_run_share_a_folder_and_get_the_bundle(report: dict[str, Any]) -> None:
    assert report["checks"]["sees_what_was_left"]["figures"]["left"] == "bundle"  # an absolute path, shown shortened


def test_a_hanging_check_is_ended_soon_after_its_limit(report: dict[str, Any]) -> None:
    assert 1 <= report["checks"]["hangs"]["seconds"] < 8  # the limit, the start of a process, a slow machine


def test_file_is_whole_and_true_at_every_moment(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    seen = []

    def look(line: str) -> None:
        found = json.loads(out.read_text())
        seen.append((line, found["complete"], {name: check["status"] for name, check in found["checks"].items()}))

    run_checks([fake("passes"), fake("raises")], out, facts={}, tell=look)
    assert seen == [
        ("passes: does passes do what it says?", False, {}),
        ("passes: adding up", False, {"passes": "error"}),  # what it is if the run ends now
        ("raises: does raises do what it says?", False, {"passes": "passed"}),
        ("raises: second step", False, {"passes": "passed", "raises": "error"}),
    ]
    assert json.loads(out.read_text())["complete"] is True
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen within 20 s"
        time.sleep(0.05)


def test_a_killed_run_leaves_the_checks_that_were_done(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    script = f"""
from pathlib import Path
from moe3d_deploy.benchmarks.checks import Check
from moe3d_deploy.benchmarks.gpu_checks import run_checks
run_checks([Check(n, "fake_gpu_checks:" + n, 60, "?") for n in ("passes", "hangs")], Path({str(out)!r}), facts={{}})
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.Popen([sys.executable, "-c", script], env=environment)
    try:
        wait_for(lambda: out.exists() and "waiting" in out.read_text())
    finally:
        run.kill()
        run.wait()
    found = json.loads(out.read_text())
    assert found["complete"] is False
    assert found["checks"]["passes"]["status"] == "passed"
    assert found["checks"]["hangs"]["status"] == "error"
    assert found["checks"]["hangs"]["reason"] == "the run ended before this check did"
    assert found["checks"]["hangs"]["figures"] == {"before": 1}


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        (["passed", "passed"], 0),
        (["passed", "skipped"], 0),
        (["passed", "failed"], 1),
        (["error", "passed"], 1),
    ],
)
def test_exit_code_is_1_where_a_check_failed_or_could_not_be_done(statuses: list[str], code: int) -> None:
    assert exit_code({"checks": {str(i): {"status": status} for i, status in enumerate(statuses)}}) == code


def test_table_has_a_line_for_each_check_and_each_note(report: dict[str, Any]) -> None:
    lines = table(report).splitlines()
    assert [line.split()[0] for line in lines if "note:" not in line] == report["planned"]
    assert lines[0].split()[1] == "passed"
    assert lines[1].split() == ["note:", "a", "note", "on", "file.bin"]


@pytest.fixture
def with_fake_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "environment", lambda revision: {"gpus": [{"name": "fake"}], "revision": revision})
    monkeypatch.setattr(gpu_checks, "CHECKS", (fake("passes"), fake("fails"), fake("skips")))


def test_command_runs_all_checks_and_prints_the_table(
    with_fake_gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    assert main(["--out", str(out), "--revision", "abc"]) == 1
    printed = capsys.readouterr()
    found = json.loads(out.read_text())
    assert printed.out == table(found) + f"\nwritten to {out}\n"
    assert "passes: adding up" in printed.err
    assert list(found["checks"]) == ["passes", "fails", "skips"]
    assert found["environment"]["revision"] == "abc"


def test_only_selects_checks_in_the_order_of_the_registry(
    with_fake_gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    assert main(["--out", str(out), "--only", "skips", "--only", "passes"]) == 0
    assert json.loads(out.read_text())["planned"] == ["passes", "skips"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--out", "gpu.json", "--only", "fast"],
            "gpu_checks: --only fast: there is no such check; choose from passes",
        ),
        (["--out", "none/gpu.json"], "gpu_checks: --out none/gpu.json: folder none does not exist; create it"),
        (["--out", "gpu.json", "--bundle", "nowhere"], "gpu_checks: bundle nowhere does not exist; give the folder"),
        ([], "Error: Missing option '--out'"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(
    with_fake_gpu: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_that_takes_pixels_is_refused(
    with_fake_gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = Tensor("images", "uint8", ("B", "S", "H", "W", 3), "RGB")
    with BundleWriter(tmp_path / "pixels") as writer:
        (writer.folder / "model.onnx").write_bytes(b"")
        writer.commit(dataclasses.replace(example_manifest(), inputs=(images,)))
    assert main(["--out", str(tmp_path / "gpu.json"), "--bundle", str(tmp_path / "pixels")]) == 2
    assert "pixels takes uint8 images and the checks give float32: export" in capsys.readouterr().err


def test_an_interrupt_ends_the_command_with_130(
    with_fake_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_checks, "run_checks", interrupted)
    assert main(["--out", str(tmp_path / "gpu.json")]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        "gpu_checks: interrupted; the checks that were done are in the file"
    )


def test_without_a_gpu_the_command_says_so_in_one_line_and_exits_2(tmp_path: Path) -> None:
    """An empty CUDA_VISIBLE_DEVICES hides the cards of a machine that has some."""
    command = [sys.executable, "-m", "moe3d_deploy.benchmarks.gpu_checks", "--out", str(tmp_path / "gpu.json")]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "gpu_checks: these checks need an NVIDIA GPU and its driver, and none is visible; run them where one is\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_every_entry_of_the_registry_names_a_function() -> None:
    assert len({check.name for check in CHECKS}) == len(CHECKS)
    for check in CHECKS:
        module, _, function = check.target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))
        assert check.limit_seconds > 0


def test_checks_import_without_the_libraries_that_some_of_them_need() -> None:
    """So that the others run where these are not installed. None in sys.modules makes an import fail."""
    missing = ("onnx", "onnx_ir", "onnxscript", "onnxruntime", "polygraphy", "tensorrt", "tensorrt_rtx", "safetensors")
    modules = [check.target.partition(":")[0] for check in CHECKS]
    script = f"import sys; sys.modules.update(dict.fromkeys({missing}))\nimport {', '.join(dict.fromkeys(modules))}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_golden_files_on_this_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    assert main(["--out", str(out), "--only", "torch_golden"]) == 0, capsys.readouterr().out
    assert json.loads(out.read_text())["checks"]["torch_golden"]["status"] in ("passed", "skipped")

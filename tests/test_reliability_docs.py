"""docs/reliability.md covers the survival matrix: every row has a test or a reason, every test has a row."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from click.testing import CliRunner

from moe3d_deploy.benchmarks import kill_campaign, reliability, tables
from moe3d_deploy.benchmarks.commands import Command, Ended
from moe3d_deploy.benchmarks.gpu_checks import CHECKS
from moe3d_deploy.benchmarks.kill_campaign import Campaign
from moe3d_deploy.benchmarks.survival_table import ROW_OF, ROWS, survival_fuzz, survival_kills, survival_matrix
from moe3d_deploy.manifest import MANIFEST_NAME

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "reliability_cpu.json"
MARKER = re.compile(r"pytest\.mark\.survival\(\s*row=\"([^\"]+)\",\s*how=\"([^\"]+)\"")


def marked() -> dict[str, list[str]]:
    """Rows that tests are marked with -> the files of those tests."""
    rows: dict[str, list[str]] = {}
    for path in sorted((ROOT / "tests").glob("test_survival_*.py")):
        for row, _ in MARKER.findall(path.read_text(encoding="utf-8")):
            rows.setdefault(row, []).append(path.name)
    return rows


def test_every_row_has_a_test_or_says_why_it_needs_a_gpu() -> None:
    assert [row.name for row in ROWS if row.name not in marked() and not (row.gpu or row.missing)] == []


def test_every_test_is_of_a_row() -> None:
    rows = marked()
    assert set(rows) <= set(ROW_OF)
    count = sum(path.read_text().count("mark.survival(") for path in (ROOT / "tests").glob("test_survival_*.py"))
    assert sum(map(len, rows.values())) == count, "a marker in another form is not counted here"


def test_row_names_are_unique() -> None:
    assert len(ROW_OF) == len(ROWS)


def test_the_gpu_checks_that_rows_name_exist() -> None:
    assert {row.check for row in ROWS if row.check} <= {check.name for check in CHECKS}


def test_the_page_has_the_three_tables() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    for table in ("survival_matrix", "survival_kills", "survival_fuzz"):
        assert f"<!-- table: {table} results/reliability_cpu.json -->" in page
    assert tables.render(page, ROOT) == page


def measured() -> dict[str, Any]:
    report: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return report


def test_the_measured_campaigns_found_no_fault() -> None:
    report = measured()
    assert [test["test"] for test in report["tests"] if test["outcome"] == "failed"] == []
    for campaign in report["kills"].values():
        assert campaign["faults"] == []
        assert campaign["stray"] == 0
        assert campaign["next_succeeded"] == campaign["kills"]
    assert {name for name, run in report["fuzz"].items() if run["findings"]} == set()
    assert set(report["fuzz"]) == set(reliability.TARGETS)
    assert set(report["kills"]) == {"export", "engine build"}


def test_the_measured_tests_are_those_of_the_tree() -> None:
    """A test that was added or renamed since the measurement: run `make reliability`."""
    functions = {test["test"].partition("[")[0] for test in measured()["tests"]}
    defined = set()
    for path in (ROOT / "tests").glob("test_survival_*.py"):
        text = path.read_text(encoding="utf-8")
        defined |= {f"tests/{path.name}::{name}" for name in re.findall(r"^def (test_\w+)", text, re.MULTILINE)}
    assert functions == defined


def test_the_measurement_names_no_folder_of_a_machine() -> None:
    assert re.search(r"(?<![\w.])/(home|root|tmp|work)/", RESULTS.read_text(encoding="utf-8")) is None


# ---- the tables themselves


def record(row: str, **changes: Any) -> dict[str, Any]:
    shown = [{"text": "moe3d: bundle | is `damaged`", "exit_code": 2}]
    return {
        "row": row, "how": "cut off", "test": "tests/test_survival_x.py::test_it[a]", "printed": shown,
        "outcome": "passed", "reason": None, **changes,
    }  # fmt: skip


FACTS = {
    "cpu": {"usable_cores": 2, "name": "CPU"},
    "memory_bytes": 2**34,
    "python": "3.11.7",
    "packages": {"torch": "2.13.0", "click": "8.0"},
    "git": {"revision": "0123456789abcdef", "dirty": False},
    "command": "python -m x",
}


def test_a_row_shows_what_was_printed_and_its_test() -> None:
    cases = [record("manifest damaged"), record("manifest damaged", test="tests/test_survival_x.py::test_it[b]")]
    table = survival_matrix({"tests": cases, "environment": FACTS})
    (line,) = [line for line in table.splitlines() if line.startswith("| **manifest damaged**")]
    assert line.endswith("| cut off | `moe3d: bundle \\| is 'damaged'` (2) | test_it, 2 cases |")
    assert (
        "2 passed; 2 cores of CPU, 16 GiB, Python 3.11.7, torch 2.13.0; revision 0123456789ab; `python -m x`." in table
    )


def test_a_failed_and_a_skipped_test_show_as_such() -> None:
    failed = record("manifest damaged", outcome="failed")
    skipped = record("disk full", outcome="skipped", printed=[], reason="cannot be mounted here")
    table = survival_matrix({"tests": [failed, skipped], "environment": FACTS})
    assert "| test_it (failed) |" in table
    assert "| cut off | cannot be mounted here | test_it (skipped) |" in table
    assert "1 failed, 1 skipped; " in table


def test_every_row_of_a_gpu_names_its_reason() -> None:
    table = survival_matrix({"tests": [], "environment": FACTS})
    assert table.count("needs a GPU: not run (") == sum(1 for row in ROWS if row.gpu)
    assert "GPU check `rtx_engine_runs`" in table
    assert table.count("| not built yet: ") == sum(1 for row in ROWS if row.missing) > 0


def test_every_part_names_its_own_measurement_and_an_older_file_one_for_all() -> None:
    dirty = FACTS | {"git": {"revision": "fedcba9876543210", "dirty": True}, "command": "python -m y"}
    report = {"tests": [], "kills": {}, "fuzz": {}, "environment": FACTS, "environments": {"fuzz": dirty}}
    assert "revision 0123456789ab; `python -m x`." in survival_kills(report)
    assert "revision 0123456789ab; `python -m x`." in survival_matrix(report)
    assert "revision fedcba987654 with uncommitted changes; `python -m y`." in survival_fuzz(report)


def test_a_part_that_runs_again_leaves_the_others_their_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    old = {"format_version": 1, "environment": FACTS, "seconds": {"kills": 9}, "tests": [record("disk full")]}
    out.write_text(json.dumps(old | {"kills": {"export": {}}, "fuzz": {}}))
    monkeypatch.setattr(reliability, "environment", lambda: FACTS | {"command": "python -m y"})
    monkeypatch.setattr(reliability, "_run_tests", lambda work: ([record("disk full", how="new")], []))
    assert CliRunner().invoke(reliability.main, ["--out", str(out), "--only", "tests"]).exit_code == 0
    report = json.loads(out.read_text())
    assert report["tests"][0]["how"] == "new"
    assert "environment" not in report
    commands = {part: facts["command"] for part, facts in report["environments"].items()}
    assert commands == {"tests": "python -m y", "kills": "python -m x"}, "fuzz was never measured"


def campaign() -> Campaign:
    return Campaign(whole_seconds=1.0, moments=[0.25])


def test_a_damaged_bundle_after_a_kill_is_a_fault_and_the_campaign_goes_on(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / MANIFEST_NAME).write_text("{")
    kills = campaign()
    assert kill_campaign._state(tmp_path, b"", kills) == "damaged"
    (fault,) = kills.faults
    assert fault.startswith("after a kill at 0.25 s: ")


class Done:
    """A command that has ended well."""

    def __enter__(self) -> "Done":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait(self) -> Ended:
        return Ended(0, "", [], [], [], 0.1)


def test_only_a_next_run_with_its_engines_succeeds_and_stray_files_are_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills, command = campaign(), cast(Command, Done())
    opened = SimpleNamespace(manifest=SimpleNamespace(engines=[]))
    monkeypatch.setattr(kill_campaign, "Bundle", SimpleNamespace(open=lambda path: opened))
    (tmp_path / ".left").touch()
    kill_campaign._next_run(command, tmp_path, kills, engines=1)
    assert kills.next_succeeded == 0
    assert kills.faults[0] == "after the next run there are 0 engines, not 1"
    assert (kills.stray, len(kills.faults)) == (2, 2), "hidden, and beside the bundle"
    (tmp_path / ".left").unlink()
    kill_campaign._next_run(command, tmp_path, kills)
    assert (kills.next_succeeded, kills.stray, len(kills.faults)) == (1, 2, 2)


def test_kills_and_fuzzing_show_their_counts() -> None:
    campaign = {
        "kills": 3, "moments": [0.1, 9.5], "whole_seconds": 10.0, "stages": {"start": 1, "export, trace": 2},
        "left": {"absent": 2, "old": 1}, "next_succeeded": 3, "stray": 0, "faults": [],
    }  # fmt: skip
    line = survival_kills({"kills": {"export": campaign}}).splitlines()[-1]
    assert line == (
        "| export | 3 | 0.1 to 9.5 s of 10.0 s | start 1, export, trace 2 | 2 x no bundle yet, 1 x the old bundle "
        "| 3 of 3 succeeded, 0 stray files, locks or processes |"
    )
    run = {"inputs": 12345, "accepted": 7, "refusals": 20, "seconds": 60.2, "findings": [{"what": "x", "input": ""}]}
    assert survival_fuzz({"fuzz": {"images": run}}).splitlines()[-1] == "| images | 12,345 | 7 | 20 | 1 | 60 |"


# ---- the record that pytest writes

SAMPLE = """
import pytest

@pytest.mark.survival(row="disk full", how="a")
def test_prints(printed):
    printed("moe3d: .b.partial-0123456789abcdef is full", 1)

@pytest.mark.survival(row="disk full", how="b")
def test_skips():
    pytest.skip("no disk")

@pytest.mark.survival(row="disk full", how="c")
def test_fails():
    assert False

def test_of_something_else():
    pass
"""


@pytest.mark.filterwarnings("ignore")
def test_the_record_of_the_tests_holds_what_was_printed_and_how_they_ended(tmp_path: Path) -> None:
    (tmp_path / "test_sample.py").write_text(SAMPLE)
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text(encoding="utf-8"))
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        "survival",
        "--survival-out",
        "out.json",
        "-p",
        "no:cacheprovider",
    ]
    subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    first, second, third = json.loads((tmp_path / "out.json").read_text())
    assert first == {
        "row": "disk full", "how": "a", "test": "test_sample.py::test_prints", "outcome": "passed", "reason": None,
        "printed": [{"text": "moe3d: .b.partial-... is full", "exit_code": 1}],
    }  # fmt: skip
    assert (second["outcome"], second["reason"], second["printed"]) == ("skipped", "no disk", [])
    assert third["outcome"] == "failed"

"""What the coverage figures count: links once, child processes too; and how they are summed up."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from moe3d_deploy.benchmarks import coverage_report
from moe3d_deploy.errors import Moe3dError

ROOT = Path(__file__).resolve().parent.parent
COUNTS = ("num_statements", "missing_lines", "num_branches", "missing_branches")


def files(**modules: tuple[int, int, int, int]) -> dict[str, Any]:
    """Coverage's report of files; __ in a name stands for /."""
    return {
        f"{name.replace('__', '/')}.py": {"summary": dict(zip(COUNTS, counts, strict=True))}
        for name, counts in modules.items()
    }


def test_packages_are_sums_over_their_modules() -> None:
    """7 + 1 of 10 + 10 units in export and 30 of 30 in moe3d_deploy: 38 of 50 in all."""
    found = coverage_report.summary(
        files(export__a=(8, 3, 2, 0), export__b=(8, 7, 2, 2), moe3d_deploy__c=(20, 0, 10, 0))
    )
    assert found["packages"]["export"] == {
        "statements": 16, "missing_statements": 10, "branches": 4, "missing_branches": 2, "percent": 40.0,
    }  # fmt: skip
    assert found["packages"]["moe3d_deploy"]["percent"] == 100.0
    assert found["total"]["percent"] == 76.0


def test_the_lowest_modules_come_first_and_whole_ones_not_at_all() -> None:
    found = coverage_report.summary(
        files(export__a=(10, 5, 0, 0), export__b=(10, 9, 0, 0), export__c=(10, 0, 0, 0), export__d=(0, 0, 0, 0))
    )
    assert [(row["module"], row["percent"]) for row in found["lowest"]] == [
        ("export/b.py", 10.0),
        ("export/a.py", 50.0),
    ]


def test_the_time_is_no_part_of_what_pytest_said() -> None:
    assert coverage_report._last_line("..\n12 passed, 1 skipped in 75.20s (0:01:15)\n") == "12 passed, 1 skipped"


def test_lines_that_only_a_child_process_runs_count_and_linked_stages_count_once() -> None:
    """probe._main is for child processes alone; export/ is reached as moe3d_deploy/export too."""
    test = "tests/test_probe.py::test_a_library_that_loads_tells_its_version"
    found, said = coverage_report.measure([test, "-p", "no:cacheprovider"])
    assert said == "1 passed"
    source = (ROOT / "moe3d_deploy" / "probe.py").read_text(encoding="utf-8").splitlines()
    line = 1 + next(index for index, text in enumerate(source) if "signal.alarm(" in text)
    assert line in found["moe3d_deploy/probe.py"]["executed_lines"]
    stages = [path for path in found if path.endswith("/export/graph.py") or path == "export/graph.py"]
    assert stages == ["export/graph.py"]
    assert {path.split("/")[0] for path in found} == set(coverage_report.MEASURED)


def test_nothing_is_written_where_a_test_fails(tmp_path: Path) -> None:
    failing = tmp_path / "test_failing.py"
    failing.write_text("def test_it():\n    assert False\n")
    arguments = ["--out", str(tmp_path / "coverage.json"), str(failing), "-p", "no:cacheprovider"]
    result = CliRunner().invoke(coverage_report.main, arguments)
    assert isinstance(result.exception, Moe3dError)
    assert str(result.exception) == "the tests ended with code 1, see above; mend them, then measure again"
    assert not (tmp_path / "coverage.json").exists()


@pytest.mark.parametrize("package", coverage_report.MEASURED)
def test_what_is_measured_is_there(package: str) -> None:
    assert (ROOT / package / "__init__.py").is_file()

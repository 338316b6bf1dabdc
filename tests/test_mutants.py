"""What the record of mutation testing counts, and that the list of equivalent changes fits the code."""

import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from moe3d_deploy.benchmarks import mutants
from moe3d_deploy.errors import InputError, Moe3dError

ROOT = Path(__file__).resolve().parent.parent

# Exit codes by change, as mutmut keeps them: noticed, noticed by a crash of pytest, survived, no test, hung, killed.
CODES = {f"moe3d_deploy.geometry.x_{name}__mutmut_1": code for name, code in {
    "noticed": 1, "crashed": 3, "survived": 0, "untested": 33, "hung": 36, "killed": -9,
}.items()}  # fmt: skip
DIFF = """--- moe3d_deploy/geometry.py
+++ moe3d_deploy/geometry.py
@@ -1,4 +1,4 @@
 def f(a):
-    if a < 0:
-        a = 1
+    if a <= 0:
+        a = 1
     return a
"""


@pytest.fixture
def fake_mutmut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, int | None]:
    """mutmut that changes nothing; returns the exit codes it writes."""
    codes: dict[str, int | None] = dict(CODES)

    def run(copy: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
        if arguments[0] == "run":
            assert (copy / "tests" / "test_geometry.py").is_file()
            assert not (copy / "moe3d_deploy" / "export").is_symlink()
            assert "only_mutate=moe3d_deploy/geometry.py\n" in (copy / "setup.cfg").read_text()
            meta = copy / "mutants" / "moe3d_deploy" / "geometry.py.meta"
            meta.parent.mkdir(parents=True)
            meta.write_text(json.dumps({"exit_code_by_key": codes}))
        return subprocess.CompletedProcess(arguments, 0, DIFF if arguments[0] == "show" else "the end", "")

    monkeypatch.setattr(mutants, "_mutmut", run)
    known = {"function": "untested", "before": "if a < 0: a = 1", "after": ["if a <= 0: a = 1"], "reason": "never 0"}
    (tmp_path / "known.json").write_text(json.dumps({"geometry": [known]}))
    monkeypatch.setattr(mutants, "EQUIVALENTS", tmp_path / "known.json")
    return codes


@pytest.mark.usefixtures("fake_mutmut")
def test_changes_are_noticed_stopped_equivalent_or_survivors(tmp_path: Path) -> None:
    out = tmp_path / "mutation.json"
    result = CliRunner().invoke(mutants.main, ["--out", str(out), "--only", "geometry", "--jobs", "1"])
    assert isinstance(result.exception, Moe3dError)
    assert str(result.exception).startswith("changes that no test notices: geometry 1; see ")
    found = json.loads(out.read_text())["modules"]["geometry"]
    change = {"before": "if a < 0: a = 1", "after": "if a <= 0: a = 1"}
    assert {key: found[key] for key in ("changes", "killed", "stopped", "survived", "equivalent", "tests")} == {
        "changes": 6,
        "killed": 2,
        "stopped": 2,
        "survived": [{**change, "function": "survived"}],
        "equivalent": [{**change, "function": "untested", "reason": "never 0"}],
        "tests": ["test_geometry.py"],
    }
    report = {"modules": {"geometry": {**found, "seconds": 90}}}
    assert mutants.table(report).splitlines()[-1] == "| `geometry.py` | 6 | 2 | 2 | 1 | 1 | 2 min |"
    assert mutants.equivalents_table(report).splitlines()[-1] == "| `geometry.untested` | 1 | never 0 |"


def test_a_run_that_did_not_end_is_no_result(fake_mutmut: dict[str, int | None], tmp_path: Path) -> None:
    fake_mutmut["moe3d_deploy.geometry.x_late__mutmut_1"] = None
    out = tmp_path / "mutation.json"
    result = CliRunner().invoke(mutants.main, ["--out", str(out), "--only", "geometry"])
    assert isinstance(result.exception, Moe3dError)
    assert str(result.exception) == "geometry: mutmut did not get to the end: the end"
    assert not out.exists()


def test_a_module_that_is_not_mutated_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(mutants.main, ["--out", str(tmp_path / "x.json"), "--only", "images"])
    assert isinstance(result.exception, InputError)
    assert str(result.exception).startswith("--only images: no such module; choose from geometry, ")


@pytest.mark.parametrize("module", mutants.TARGETS)
def test_every_module_and_its_tests_are_there(module: str) -> None:
    assert (ROOT / "moe3d_deploy" / f"{module}.py").is_file()
    for pattern in mutants.TARGETS[module]:
        assert list((ROOT / "tests").glob(pattern)), pattern


def test_every_equivalent_change_is_of_a_line_that_is_still_there() -> None:
    """One that is not would hide nothing, but its reason would stay in the documents of nothing."""
    known = json.loads((ROOT / "benchmarks" / "mutants.json").read_text(encoding="utf-8"))
    assert set(known) <= set(mutants.TARGETS)
    for module, entries in known.items():
        source = (ROOT / "moe3d_deploy" / f"{module}.py").read_text(encoding="utf-8")
        lines = " ".join(line.strip() for line in source.splitlines())
        assert [entry["before"] for entry in entries if entry["before"] not in lines] == []
        assert all(entry["reason"] and entry["after"] for entry in entries)

"""What the tool has to survive: the rows of the matrix, and the tables that docs/reliability.md shows of a campaign.

ROWS is the one list of rows. A test says which row it is of (`@pytest.mark.survival`), `reliability` runs the tests and
the campaigns and writes the result that the tables are made of. Nothing is run here.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moe3d_deploy.benchmarks.environment import revision_text

_SHOWN_CHARACTERS = 230  # of a printed line in the table
_OUTCOMES = {
    "absent": "no bundle yet",
    "old": "the old bundle",
    "aside": "the old bundle moved aside, put back by the next export",
    "new": "the new bundle, whole",
    "without": "the bundle without the engine",
    "with": "the bundle with the engine",
    "damaged": "a bundle that is not whole",
}
_PACKAGES_SHOWN = ("torch", "onnx", "onnxruntime", "tensorrt_rtx")


@dataclass(frozen=True)
class Row:
    """An input or event, what has to happen, and, where that shows on a GPU alone, why and in which GPU check.

    missing   why there is nothing to test yet
    """

    name: str
    expected: str
    gpu: str | None = None
    check: str | None = None
    missing: str | None = None


ROWS: tuple[Row, ...] = (
    Row("manifest damaged", "refused: the file and the remedy; nothing else is read"),
    Row("hostile JSON", "refused in bounded time and memory"),
    Row("ONNX file damaged", "refused before ONNX Runtime or a builder sees a byte"),
    Row("external data out of place", "refused: weights lie in the files of the manifest or nowhere"),
    Row("symbolic links", "refused: a bundle has none"),
    Row("special files", "refused without waiting for them"),
    Row("engine damaged", "refused before TensorRT sees a byte; the ONNX file still runs; a new build replaces it"),
    Row("engine of another version or GPU", "one line with both versions and the command to rebuild it",
        gpu="what the library says of such an engine shows on a GPU; the line around it is tested",
        check="rtx_engine_runs"),
    Row("safetensors damaged", "refused before a tensor is used"),
    Row("weights that do not fit", "the first few problems, the closest known names"),
    Row("weights that are not finite", "refused: the tensor is named"),
    Row("pickle checkpoint", "refused unless asked for; then tensors only, never code"),
    Row("images that cannot be used", "refused: the file is named"),
    Row("unusual images", "taken: grey, palette, 16 bits, CMYK, EXIF turned, mixed sizes"),
    Row("arrays that do not fit", "refused: what was expected and what came"),
    Row("sizes that do not fit", "refused: the range, the step and the nearest size"),
    Row("black, white and saturated images", "finite outputs"),
    Row("many views", "48 views and more: finite outputs"),
    Row("the same input again", "the same bits, in one session and in another"),
    Row("disk full", "one line; nothing half-written; what was there stays"),
    Row("read-only folder", "one line before the work; nothing changes"),
    Row("killed during an export", "no bundle, the old one or the new one; the next export cleans up"),
    Row("killed during an engine build", "the bundle stays whole; the next build cleans up"),
    Row("two writers", "the second is refused at once; the first is undisturbed"),
    Row("interrupted", "Ctrl-C, SIGTERM, SIGHUP at any stage: one line, nothing left, the child ended"),
    Row("interrupted twice", "an impatient Ctrl-C: one line, no traceback; at worst the next export cleans up"),
    Row("out of memory", "one line, exit code 1, nothing left"),
    Row("out of GPU memory", "an estimate against what is available; the process stays usable",
        missing="nothing here estimates or catches a lack of device memory"),
    Row("dying child process", "one line: which stage and how it ended; nothing left"),
    Row("hung child process", "Ctrl-C ends it within the grace; nothing left"),
    Row("a clock that jumps", "same results: durations are monotonic, no decision rests on the time of day"),
    Row("no GPU and no driver", "export, inspect and run work; what needs a GPU says so"),
    Row("threads that share a session", "the same results as one after the other"),
    Row("interpreter shutdown", "a session that is still open ends silently with the process"),
    Row("fork after CUDA is in use", "documented limits (below)", gpu="no CUDA context exists without a GPU"),
    Row("CUDA graphs and changing shapes", "captured again per shape",
        missing="nothing here captures CUDA graphs"),
)  # fmt: skip
ROW_OF: Mapping[str, Row] = {row.name: row for row in ROWS}


def environment_of(report: Mapping[str, Any], part: str) -> Mapping[str, Any] | None:
    """Where a part (tests, kills, fuzz) was measured; a report with one `environment` has that for every other part."""
    found: Mapping[str, Any] | None = report.get("environments", {}).get(part, report.get("environment"))
    return found


def survival_matrix(report: Mapping[str, Any]) -> str:
    """Every row: how it is provoked, what is printed, the test and its outcome."""
    lines = ["| input or event | how it is provoked | what is printed (exit code) | test |", "|---|---|---|---|"]
    for row in ROWS:
        tests = _by_function([test for test in report["tests"] if test["row"] == row.name])
        lines += [_test_line(row, index, *item) for index, item in enumerate(tests.items())]
        if row.missing:
            lines.append(f"| {_name(row, bool(tests))} | | not built yet: {row.missing} | |")
        if row.gpu:
            check = f", GPU check `{row.check}`" if row.check else ""
            lines.append(f"| {_name(row, bool(tests))} | | needs a GPU: not run ({row.gpu}{check}) | |")
    outcomes = [test["outcome"] for test in report["tests"]]
    counts = ", ".join(f"{outcomes.count(name)} {name}" for name in sorted(set(outcomes)))
    return "\n".join([*lines, *_measured(report, "tests", counts)])


def survival_kills(report: Mapping[str, Any]) -> str:
    """What was left by processes that were killed at random moments."""
    lines = [
        "| killed (`kill -9`) | kills | moments | stages hit | what was left | next run |",
        "|---|---:|---|---|---|---|",
    ]
    for kind, campaign in sorted(report["kills"].items()):
        left = ", ".join(f"{count} x {_OUTCOMES[name]}" for name, count in sorted(campaign["left"].items()))
        stages = ", ".join(f"{name} {count}" for name, count in campaign["stages"].items())
        low, high = campaign["moments"]
        lines.append(
            f"| {kind} | {campaign['kills']} | {low:.1f} to {high:.1f} s of {campaign['whole_seconds']:.1f} s "
            f"| {stages} | {left} | {campaign['next_succeeded']} of {campaign['kills']} succeeded, "
            f"{campaign['stray']} stray files, locks or processes |"
        )
    return "\n".join([*lines, *_measured(report, "kills")])


def survival_fuzz(report: Mapping[str, Any]) -> str:
    """How many inputs each reader was given, and whether one ended in anything but its own error."""
    lines = [
        "| reader | inputs tried | accepted | distinct refusals | findings | seconds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, run in sorted(report["fuzz"].items()):
        lines.append(
            f"| {name} | {run['inputs']:,} | {run['accepted']:,} | {run['refusals']:,} | {len(run['findings'])} "
            f"| {run['seconds']:.0f} |"
        )
    return "\n".join([*lines, *_measured(report, "fuzz")])


def _by_function(tests: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    functions: dict[str, list[dict[str, Any]]] = {}
    for test in tests:
        functions.setdefault(test["test"].partition("[")[0], []).append(test)
    return functions


def _test_line(row: Row, index: int, function: str, cases: list[dict[str, Any]]) -> str:
    printed = next((shown for case in cases for shown in case["printed"]), None)
    skipped = [case for case in cases if case["outcome"] == "skipped"]
    count = f", {len(cases)} cases" if len(cases) > 1 else ""
    outcomes = sorted({case["outcome"] for case in cases})
    state = "" if outcomes == ["passed"] else f" ({', '.join(outcomes)})"
    said = f"`{_cell(printed['text'])}` ({printed['exit_code']})" if printed else ""
    if skipped and not printed:
        said = _cell(skipped[0]["reason"] or "skipped")
    how = _cell(cases[0]["how"])
    return f"| {_name(row, index > 0)} | {how} | {said} | {function.rpartition('::')[2]}{count}{state} |"


def _name(row: Row, named_above: bool) -> str:
    return "" if named_above else f"**{row.name}**: {row.expected}"


def _cell(text: str) -> str:
    """Text for one cell of a Markdown table."""
    text = re.sub(r"\s+", " ", text).replace("|", "\\|").replace("`", "'")
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def _measured(report: Mapping[str, Any], part: str, counts: str = "") -> list[str]:
    """The lines under a table: machine, versions, state of the code and command of its measurement."""
    facts = environment_of(report, part)
    if facts is None:
        return ["", counts] if counts else []
    packages = ", ".join(f"{name} {facts['packages'][name]}" for name in _PACKAGES_SHOWN if name in facts["packages"])
    return ["", (
        f"{counts}{'; ' if counts else ''}{facts['cpu']['usable_cores']} cores of {facts['cpu']['name']}, "
        f"{facts['memory_bytes'] / 2**30:.0f} GiB, Python {facts['python']}, {packages}; revision "
        f"{revision_text(facts['git'])}; `{facts['command']}`."
    )]  # fmt: skip

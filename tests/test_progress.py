"""Progress on stderr: what a terminal shows in the end, and what a log file gets."""

import io
import sys
import types
from collections.abc import Callable

import click
import pytest

from moe3d_deploy.cli import main as cli
from moe3d_deploy.cli import progress as progress_module
from moe3d_deploy.cli.progress import Progress
from moe3d_deploy.errors import ExportError

ERASE = "\r\x1b[2K"


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """The lines a person sees, the one with the cursor last."""
        return [line.rpartition(ERASE)[2] for line in self.getvalue().split("\n")]


@pytest.fixture
def attach(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Terminal]:
    """Called in the test itself, as pytest puts its own stderr in place between the fixtures and the test."""

    def attach_terminal() -> Terminal:
        stderr = Terminal()
        monkeypatch.setattr(sys, "stderr", stderr)
        monkeypatch.setenv("COLUMNS", "100")
        return stderr

    return attach_terminal


def test_a_bar_rewrites_its_line(attach: Callable[[], Terminal]) -> None:
    terminal = attach()
    progress = Progress()
    progress.report("export", 0, 4, "load")
    assert terminal.screen() == ["export       " + "░" * 24 + "   0 %     0 s  load"]
    progress.report("export", 1, 4, "trace")
    progress.report("export", 4, 4)
    assert terminal.screen() == ["export       " + "█" * 24 + " 100 %     0 s  "]
    assert terminal.getvalue().count("\n") == 0


@pytest.mark.parametrize(("step", "total", "full"), [(1, 4, 6), (1, 1000, 0), (999, 1000, 23), (3, 3, 24)])
def test_a_bar_is_full_only_at_the_end(step: int, total: int, full: int, attach: Callable[[], Terminal]) -> None:
    terminal = attach()
    Progress().report("round", step, total)
    assert terminal.screen()[0].count("█") == full
    assert terminal.screen()[0].count("░") == 24 - full


def test_a_stage_of_unknown_length_has_a_clock_and_no_bar(attach: Callable[[], Terminal]) -> None:
    terminal = attach()
    Progress().report("engine", 0, 0, "Building 3/7")
    assert terminal.screen() == ["engine          0 s  Building 3/7"]


def test_the_clock_starts_anew_with_each_stage(attach: Callable[[], Terminal], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = attach()
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    progress = Progress()
    progress.report("export", 0, 2)
    now[0] = 175.4
    progress.report("export", 1, 2)
    assert "   75 s" in terminal.screen()[0]
    progress.report("verify", 0, 2)
    assert "    0 s" in terminal.screen()[0]


def test_a_line_that_stays_takes_the_place_of_the_bar(attach: Callable[[], Terminal]) -> None:
    terminal = attach()
    progress = Progress()
    progress.report("export", 1, 2)
    progress.line("export", "12.0 s")
    progress.report("round", 1, 2)
    progress.line("verify", "6 shapes")
    assert terminal.screen() == ["export       12.0 s", "verify       6 shapes", ""]


@pytest.mark.parametrize("columns", [20, 40, 79])
def test_a_bar_never_wraps(columns: int, attach: Callable[[], Terminal], monkeypatch: pytest.MonkeyPatch) -> None:
    """A wrapped line cannot be erased: the bar would climb down the screen."""
    terminal = attach()
    monkeypatch.setenv("COLUMNS", str(columns))
    Progress().report("engine", 1, 2, "a phase of the builder with a very long name " * 3)
    assert len(terminal.screen()[0]) == columns - 1


def test_a_log_gets_the_lines_alone(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress()
    for step in range(100):
        progress.report("export", step, 100, "trace")
    progress.line("export", "12.0 s   peak 1.0 GB")
    assert capsys.readouterr() == ("", "export       12.0 s   peak 1.0 GB\n")


Run = Callable[[Callable[[], None]], int]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `moe3d-export` with a body of the test's own."""

    def run_with(body: Callable[[], None]) -> int:
        module = types.ModuleType("stand_in")
        module.__dict__["command"] = click.command()(body)
        monkeypatch.setitem(sys.modules, "stand_in", module)
        monkeypatch.setitem(cli.COMMANDS, "export", cli.Entry("stand_in:command", "Stand in"))
        return cli.export_main([])

    return run_with


def test_an_error_stands_on_a_line_of_its_own(run: Run, attach: Callable[[], Terminal]) -> None:
    terminal = attach()

    def body() -> None:
        Progress().report("export", 1, 2, "trace")
        raise ExportError("the model depends on a concrete shape")

    assert run(body) == 1
    assert terminal.screen() == ["moe3d-export: the model depends on a concrete shape", ""]


def test_an_interrupt_leaves_no_half_a_bar(run: Run, attach: Callable[[], Terminal]) -> None:
    terminal = attach()

    def body() -> None:
        Progress().report("export", 1, 2, "trace")
        raise KeyboardInterrupt

    assert run(body) == 130
    assert [line for line in terminal.screen() if line] == ["moe3d-export: interrupted"]

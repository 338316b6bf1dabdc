"""The command line's frame: what help loads, and how each kind of end becomes a line on stderr and an exit code."""

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import click
import pytest

import moe3d_deploy
from moe3d_deploy.cli import main as cli
from moe3d_deploy.errors import BundleError, EngineError, Moe3dError

HEAVY = ("torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "polygraphy", "cv2", "PIL")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """run(body, args): `moe3d export ARGS` with `body` in place of the export command, which takes no argument."""

    def run_with(body: Callable[[], object], *args: str, start: Callable[[list[str]], int] = cli.export_main) -> int:
        module = types.ModuleType("stand_in")
        module.__dict__["command"] = click.command(help="Stand in for a command.")(body)
        monkeypatch.setitem(sys.modules, "stand_in", module)
        monkeypatch.setitem(cli.COMMANDS, "export", cli.Entry("stand_in:command", "Stand in for a command"))
        return start(list(args))

    return run_with


def raising(error: BaseException) -> Callable[[], object]:
    def body() -> None:
        raise error

    return body


def python(code: str, *args: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "code",
    [
        "import moe3d_deploy",
        "from moe3d_deploy.cli.main import main; assert main(['--help']) == 0",
        "from moe3d_deploy.cli.main import main; assert main(['--version']) == 0",
    ],
)
def test_import_help_and_version_load_nothing_heavy_and_no_command(code: str) -> None:
    result = python(f"{code}\nimport json, sys; print(json.dumps(list(sys.modules)))")
    assert result.returncode == 0, result.stderr
    loaded = set(json.loads(result.stdout.splitlines()[-1]))
    assert "moe3d_deploy" in loaded
    assert not loaded.intersection(HEAVY)
    assert not loaded.intersection(entry.target.partition(":")[0] for entry in cli.COMMANDS.values())


def test_help_shows_each_command_with_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    shown = " ".join(capsys.readouterr().out.partition("Commands:")[2].split())
    assert shown == " ".join(f"{name} {entry.short_help}" for name, entry in cli.COMMANDS.items())


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_the_line_is_the_commands_own_short_help(name: str) -> None:
    module = cli.COMMANDS[name].target.partition(":")[0]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not written yet")
    own = cli.load_command(name).get_short_help_str(limit=1000)
    assert own.rstrip(".") == cli.COMMANDS[name].short_help


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"moe3d {moe3d_deploy.__version__}\n"


def test_export_main_has_a_name_and_a_version_of_its_own(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(lambda: None, "--version") == 0
    assert capsys.readouterr().out == f"moe3d-export {moe3d_deploy.__version__}\n"
    assert run(lambda: None, "--help") == 0
    assert capsys.readouterr().out.startswith("Usage: moe3d-export [OPTIONS]")


def test_python_dash_m_is_the_same_command() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "moe3d_deploy", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout == f"moe3d {moe3d_deploy.__version__}\n"


@pytest.mark.parametrize("error", [BundleError("b: damaged"), EngineError("e: failed"), Moe3dError("m")])
def test_a_project_error_is_one_line_and_its_exit_code(
    error: Moe3dError, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(raising(error)) == error.exit_code
    assert capsys.readouterr() == ("", f"moe3d-export: {error}\n")
    assert run(raising(error), "export", start=cli.main) == error.exit_code
    assert capsys.readouterr() == ("", f"moe3d: {error}\n")


@pytest.mark.parametrize(
    ("error", "line", "code"),
    [
        (
            OSError(errno.EACCES, "Permission denied", "out/x.ply"),
            "out/x.ply: Permission denied; check the rights or choose another place",
            2,
        ),
        (
            OSError(errno.EROFS, "Read-only file system"),
            "Read-only file system; check the rights or choose another place",
            2,
        ),
        (OSError(errno.ENOSPC, "No space"), "No space; make room or choose another place", 1),
        (OSError(errno.EDQUOT, "Quota"), "Quota; make room or choose another place", 1),
        (OSError(errno.EFBIG, "Too large", "a"), "a: Too large; make room or choose another place", 1),
        (OSError(errno.EIO, "I/O error"), "I/O error; check the disk (see `dmesg`) or choose another place", 1),
        (OSError(errno.EXDEV, "Cross-device link", "a", None, "b"), "a -> b: Cross-device link", 1),
        (OSError("cannot identify image file 'a.png'"), "cannot identify image file 'a.png'", 1),
        (MemoryError(), "out of memory; use fewer views, smaller images or a machine with more memory", 1),
        (
            MemoryError("Unable to allocate 9 GiB"),
            "out of memory (Unable to allocate 9 GiB); use fewer views, smaller images or a machine with more memory",
            1,
        ),
        (KeyboardInterrupt(), "interrupted", 130),
        (click.Abort(), "aborted", 1),
        (
            ValueError("two\nlines"),
            "internal error: ValueError: two lines (run with --debug for the traceback)",
            1,
        ),
        # click turns an EOFError into the same Abort as Ctrl-C; a truncated file is neither
        (
            EOFError("No data left in file"),
            "internal error: EOFError: No data left in file (run with --debug for the traceback)",
            1,
        ),
        (KeyError(), "internal error: KeyError (run with --debug for the traceback)", 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_any_other_error_is_one_line_too(
    error: BaseException, line: str, code: int, run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(raising(error)) == code
    out, err = capsys.readouterr()
    # on an interrupt click ends the line that shows ^C or a progress bar
    assert (out, err.lstrip("\n")) == ("", f"moe3d-export: {line}\n")


def test_a_message_of_pages_is_cut_in_the_line_and_whole_with_debug(
    run: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    pages = RuntimeError("x" * 9000)
    assert run(raising(pages)) == 1
    assert len(capsys.readouterr().err) < 600
    assert run(raising(pages), "--debug") == 1
    assert "x" * 9000 in capsys.readouterr().err


@pytest.mark.parametrize(
    ("start", "args"),
    [
        (cli.export_main, ["--debug"]),
        (cli.main, ["--debug", "export"]),
        (cli.main, ["export", "--debug"]),
    ],
)
def test_debug_adds_the_traceback_before_the_line(
    start: Callable[[list[str]], int],
    args: list[str],
    run: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(raising(BundleError("b: damaged")), *args, start=start) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-2:] == [
        "moe3d_deploy.errors.BundleError: b: damaged",
        f"{'moe3d-export' if start is cli.export_main else 'moe3d'}: b: damaged",
    ]


def test_debug_covers_a_command_that_cannot_be_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli.COMMANDS, "export", cli.Entry("no_such_module:command", ""))
    assert cli.export_main([]) == 1
    assert (
        capsys.readouterr().err == "moe3d-export: internal error: ModuleNotFoundError: "
        "No module named 'no_such_module' (run with --debug for the traceback)\n"
    )
    assert cli.export_main(["--debug"]) == 1
    assert capsys.readouterr().err.startswith("Traceback")


def test_no_arguments_show_the_help_and_end_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("Usage: moe3d [OPTIONS] COMMAND [ARGS]...")


@pytest.mark.parametrize("args", [["no-such-command"], ["--no-such-option"]])
def test_usage_errors_are_one_line_and_end_with_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("moe3d: ")
    assert err.endswith("(see moe3d --help)\n")
    assert err.count("\n") == 1


def test_a_command_may_end_with_a_code_of_its_own(run: Callable[..., int]) -> None:
    assert run(lambda: click.get_current_context().exit(3)) == 3


def test_success_is_0(run: Callable[..., int]) -> None:
    assert run(lambda: None) == 0
    assert run(lambda: {"a": "result"}) == 0


# A command whose output stays in Python's buffer, as print does into a pipe, so that it fails only when flushed.
BUFFERED = """
import sys, types, click
from moe3d_deploy.cli import main as cli
module = types.ModuleType("stand_in")
module.command = click.command()(lambda: print("result"))
sys.modules["stand_in"] = module
cli.COMMANDS["export"] = cli.Entry("stand_in:command", "")
sys.stdin.read()
sys.exit(cli.export_main([]))
"""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_behind_stdout_is_one_line() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-c", BUFFERED]
        result = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert (result.returncode, result.stderr) == (
        1,
        "moe3d-export: No space left on device; make room or choose another place\n",
    )


@pytest.mark.parametrize("code", [BUFFERED, BUFFERED.replace("print(", "click.echo(")], ids=["print", "echo"])
def test_a_reader_that_left_ends_the_command_silently(code: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = subprocess.run(
            [sys.executable, "-c", code],
            stdin=subprocess.DEVNULL,
            stdout=writer,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")


def test_a_closed_stdout_is_no_error() -> None:
    closing = "import os; os.close(1); os.execv(os.sys.executable, [os.sys.executable, *os.sys.argv[1:]])"
    result = python(closing, "-m", "moe3d_deploy", "--version")
    assert (result.returncode, result.stderr) == (0, "")


# A command that works until it is told to stop, and cleans up behind itself.
PATIENT = """
import pathlib, sys, time, types, click
from moe3d_deploy.cli import main as cli

def work():
    try:
        print("at work", flush=True)
        time.sleep(60)
    finally:
        pathlib.Path(sys.argv[1]).touch()

sys.modules["patient"] = types.SimpleNamespace(command=click.Command("export", callback=work))
cli.COMMANDS["export"] = cli.Entry("patient:command", "")
sys.exit(cli.export_main([]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_terminated_command_cleans_up(number: signal.Signals, tmp_path: Path) -> None:
    """`kill`, `timeout` and a closed terminal must not leave gigabytes of staged files."""
    cleaned = tmp_path / "cleaned"
    with subprocess.Popen(
        [sys.executable, "-c", PATIENT, str(cleaned)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "at work\n"
        process.send_signal(number)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 128 + number
    assert err == "moe3d-export: terminated\n"
    assert cleaned.exists()

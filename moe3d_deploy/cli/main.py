"""The commands `moe3d` and `moe3d-export`: which sub-commands there are, and how a run ends.

This is the one place where errors become a line on stderr and an exit code. A sub-command's module is imported
when that sub-command runs, so help and version are quick and need none of the heavy libraries.
"""

import copy
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from moe3d_deploy import __version__
from moe3d_deploy.child import is_out_of_memory
from moe3d_deploy.cli.notices import warnings_as_lines
from moe3d_deploy.disk_errors import is_not_allowed, remedy
from moe3d_deploy.errors import EXTRA_OF, InputError, MissingExtraError, Moe3dError
from moe3d_deploy.stop_signals import TerminatedError, stop_signals_raise

_Decorated = TypeVar("_Decorated", bound=Callable[..., Any])
_INTERNAL_MESSAGE_CHARACTERS = 500  # ONNX and TensorRT can write pages


@dataclass(frozen=True)
class Entry:
    """A sub-command: where it is ("module:attribute") and its line in `moe3d --help`.

    The line repeats the command's own short help, so that listing it needs no import.
    """

    target: str
    short_help: str


COMMANDS: dict[str, Entry] = {
    "export": Entry(
        "moe3d_deploy.cli.export:export_command",
        "Export a preset, checkpoint or bundle to a verified bundle",
    ),
    "run": Entry("moe3d_deploy.cli.run:run_command", "Run a bundle on images, folders of them or a video"),
    "inspect": Entry(
        "moe3d_deploy.cli.inspect:inspect_command",
        "Show what is in BUNDLE, after checking that it is whole",
    ),
    "convert": Entry(
        "moe3d_deploy.cli.convert:convert_command",
        "Convert a checkpoint to a folder of config.json and model.safetensors",
    ),
    "eval": Entry(
        "moe3d_deploy.cli.evaluate:evaluate_command",
        "Measure the quality of SOURCE, a bundle, checkpoint or preset, on scenes with truth",
    ),
    "train": Entry(
        "moe3d_deploy.cli.train:train_command",
        "Train the expert head of a checkpoint, or a whole model",
    ),
    "bench": Entry(
        "moe3d_deploy.cli.bench:bench_command",
        "Measure latency and memory of bundles, checkpoints and presets on this machine",
    ),
    "plan": Entry(
        "moe3d_deploy.cli.plan:plan_command",
        "Say what SOURCE, a preset, checkpoint folder or bundle, will cost",
    ),
    "doctor": Entry(
        "moe3d_deploy.cli.doctor:doctor_command",
        "Say what this machine can run, and what to do about the rest",
    ),
}


def main(args: Sequence[str] | None = None) -> int:
    """Run `moe3d` with `args` (default: those of the process) and return its exit code."""
    return finish("moe3d", lambda: _moe3d, args)


def export_main(args: Sequence[str] | None = None) -> int:
    """Run `moe3d-export`, which is `moe3d export` under a name of its own, and return its exit code."""
    return finish("moe3d-export", lambda: _version_option("moe3d-export")(load_command("export")), args)


def load_command(name: str) -> click.Command:
    """Import sub-command `name`, a key of COMMANDS, and return a copy of it that also takes --debug."""
    module, _, attribute = COMMANDS[name].target.partition(":")
    command: click.Command = copy.copy(getattr(importlib.import_module(module), attribute))
    command.name = name
    command.params = list(command.params)
    return _debug_option(command)


class _LazyGroup(click.Group):
    """A group over COMMANDS that imports a sub-command only to run it or to show that command's help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return load_command(cmd_name) if cmd_name in COMMANDS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry.short_help) for name, entry in COMMANDS.items()])


# `finish` looks for --debug itself, as it has to know even if no command could be loaded to parse it.
_debug_option = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")


def _version_option(name: str) -> Callable[[_Decorated], _Decorated]:
    return click.version_option(__version__, prog_name=name, message="%(prog)s %(version)s")


@click.group(cls=_LazyGroup)
@_debug_option
@_version_option("moe3d")
def _moe3d() -> None:
    """From a VGGT or MoE3D checkpoint to the machine that needs depth.

    \b
    moe3d export moe3d-tiny -o bundle
    moe3d run bundle left.png right.png -o out
    """


def finish(name: str, load: Callable[[], click.Command], args: Sequence[str] | None = None) -> int:
    """Run the command that `load` returns as `name`; what it raises becomes stderr's last line and the exit code."""
    arguments = sys.argv[1:] if args is None else list(args)
    # ONNX Runtime's releases from 1.31 on report to their makers, and leave a file in TMPDIR, unless told not to.
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        with stop_signals_raise(last=args is None), warnings_as_lines():
            result = load().main(arguments, prog_name=name, standalone_mode=False)
        if sys.stdout is not None:  # None where the caller closed it
            sys.stdout.flush()
        return result if isinstance(result, int) else 0  # an int is the code of ctx.exit()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except click.ClickException as error:
        click.echo(f"{name}: {' '.join(error.format_message().split())} (see {name} --help)", err=True)
        return error.exit_code
    except (Exception, KeyboardInterrupt, TerminatedError) as error:  # noqa: BLE001  the program ends here, and says why
        _abandon_stdout()
        # click hides an interrupt, and an EOFError of whatever origin, behind Abort
        cause = error.__cause__ if isinstance(error, click.Abort) and error.__cause__ else error
        if isinstance(cause, BrokenPipeError):  # `moe3d inspect bundle | head`: nobody reads on
            return 1
        if "--debug" in arguments:
            traceback.print_exception(cause)
        message, code = _describe(cause)
        click.echo(f"{name}: {' '.join(message.splitlines())}", err=True)
        return code


def _describe(error: BaseException) -> tuple[str, int]:
    """The message for `error` and the exit code that goes with it."""
    if isinstance(error, Moe3dError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130  # 128 + SIGINT, as shells have it
    if isinstance(error, TerminatedError):
        return "terminated", 128 + error.args[0]
    if isinstance(error, click.Abort):
        return "aborted", 1
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRA_OF:
        return str(MissingExtraError(error.name, EXTRA_OF[error.name])), MissingExtraError.exit_code
    if is_out_of_memory(type(error).__name__, str(error), getattr(error, "errno", None)):
        detail = f" ({error})" if isinstance(error, MemoryError) and str(error) else ""
        return f"out of memory{detail}; use fewer views, smaller images or a machine with more memory", 1
    if isinstance(error, OSError) and error.strerror:
        names = [os.fsdecode(n) for n in (error.filename, error.filename2) if isinstance(n, (str, bytes))]
        said = ": ".join([" -> ".join(names), error.strerror] if names else [error.strerror])
        if is_not_allowed(error):
            return f"{said}; check the rights or choose another place", InputError.exit_code
        return "; ".join(filter(None, (said, remedy(error)))), 1
    if isinstance(error, OSError) and str(error):
        return str(error), 1
    text = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    if len(text) > _INTERNAL_MESSAGE_CHARACTERS:
        text = text[:_INTERNAL_MESSAGE_CHARACTERS] + "..."
    return f"internal error: {text} (run with --debug for the traceback)", 1


def _abandon_stdout() -> None:
    """Where stdout takes no more (full disk, closed pipe), keep the flush at exit from failing a second time."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

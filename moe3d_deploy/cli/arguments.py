"""Texts of the command line that several commands read alike."""

import click
from click.core import ParameterSource


def comma_list(text: str) -> tuple[str, ...]:
    """The names in `text`, separated by commas, without the spaces around them; empty ones do not count."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def given_flags(*names: str) -> list[str]:
    """The flags of these parameters of the running command that stand on the command line."""
    context = click.get_current_context()
    flags = {option.name: option.opts[0] for option in context.command.params}
    return [flags[name] for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]

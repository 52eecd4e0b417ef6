"""How the commands read their options."""

from __future__ import annotations

from collections.abc import Sequence

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from fedbe.cli.main import COMMANDS
from fedbe.errors import ConfigError, Problem


def command_parser(command: str) -> ArgumentParser:
    """Return a parser without options for a command, for example ``export``."""
    return ArgumentParser(
        prog=f"fedbe {command}", description=COMMANDS[command], exit_on_error=False, allow_abbrev=False
    )


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """Parse a command's options.

    Raises:
        ConfigError: They do not fit.
    """
    try:
        return parser.parse_args(list(arguments))
    except ArgumentError as error:
        message = " ".join(str(error).split())
        raise ConfigError(Problem(parser.prog, " ".join(arguments), message)) from error

"""The command line: a module for each command, imported when it is called."""

from fedbe.cli.main import main

__all__ = ["main"]

"""The command line: ``fedbe fit | compare | partition | dial | export | pretrain | bench``."""

from fedbe.cli.main import main

__all__ = ["main"]

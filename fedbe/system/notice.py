"""What is said to whoever started a run, beside its display."""

import sys


def say(line: str) -> None:
    """Say one line on the standard error stream."""
    print(f"fedbe: {line}", file=sys.stderr)

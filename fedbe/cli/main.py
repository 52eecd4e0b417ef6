"""The command ``fedbe``: finds the module of a command, and turns errors into words and an exit code."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from fedbe.errors import ConfigError, FedBEError, Terminated
from fedbe.system.notice import say

COMMANDS = {
    "fit": "Fine-tune a model with simulated clients, as a configuration says.",
    "compare": "Compare algorithms under one budget, as a configuration says, or runs that exist.",
    "partition": "Print and plot which client gets which data, without training.",
    "dial": "Measure what a finished run learned and kept along its dial, and choose a place on it.",
    "export": "Write a run's model with what it learned scaled by a dial: 1 as trained, 0 the base model.",
    "pretrain": "Train the small base model that comes with fedbe.",
    "bench": "Measure on this machine: overhead, memory, fedit (LoRA), cost-model, prefix, cohort, scaling.",
}
"""Command → what it does. Each is ``run`` in the module of its name in `fedbe.cli`, imported when it is called."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    0: done; 1: failed; 2: the input cannot be used; 130: ended by Ctrl-C; 143: ended by SIGTERM.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    if words[0] not in COMMANDS:
        print(f"fedbe: there is no command {words[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    prepare_process()
    try:
        importlib.import_module(f"fedbe.cli.{words[0]}").run(words[1:])
    except ConfigError as error:
        print(explain(error), file=sys.stderr)
        return 2
    except FedBEError as error:
        say(str(error))
        return 1
    except Terminated:
        say("terminated")
        return 143
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    return 0


def usage() -> str:
    """Return the list of commands."""
    lines = [f"  {name:<10} {text}" for name, text in COMMANDS.items()]
    return "\n".join(["usage: fedbe COMMAND [options]   (fedbe COMMAND --help)", "", *lines])


def explain(error: ConfigError) -> str:
    """Return every problem of a configuration, a line each."""
    count = len(error.problems)
    head = f"fedbe: {count} mistake{'s' if count > 1 else ''} in the input"
    return "\n".join([head, *(f"  - {problem}" for problem in error.problems)])


def prepare_process() -> None:
    """Set up what a command needs of the process, before torch is imported.

    Threads of torch wait for each other by spinning; where another process is busy, one that waits takes the core from
    the one it waits for. Measured on two cores beside one busy process: a quickstart's round in 26 s in place of
    minutes; 6.7 s both with and without this on an idle machine. Nothing is changed that is set already.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    here = os.getcwd()  # where a user's own classes stand that are named by `class_path`
    if here not in sys.path:
        sys.path.append(here)  # last: no file that happens to lie here takes an installed module's place
    from fedbe.system.libraries import settle_libraries

    settle_libraries()

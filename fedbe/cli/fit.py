"""``fedbe fit``: one run."""

from collections.abc import Sequence

from fedbe.cli.main import COMMANDS
from fedbe.config.build import fit
from fedbe.config.parser import read_run, run_parser


def run(arguments: Sequence[str]) -> None:
    """Fine-tune a model with simulated clients, as a configuration says."""
    fit(*read_run(run_parser("fit", COMMANDS["fit"]), arguments))

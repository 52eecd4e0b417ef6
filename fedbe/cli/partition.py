"""``fedbe partition``: who gets which data."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fedbe.cli.main import COMMANDS
from fedbe.config.build import connect_data
from fedbe.config.parser import read_run, run_parser
from fedbe.datamodules.report import describe_partition
from fedbe.errors import ConfigError, Problem
from fedbe.figures.partition import plot_partition, print_partition
from fedbe.figures.samples import print_left_out, print_samples


def run(arguments: Sequence[str]) -> None:
    """Print and plot which client gets which data and what is left out, and show samples, without training."""
    described, config = read_run(run_parser("partition", COMMANDS["partition"]), arguments)
    picture = Path(config["plot"])
    problems = [problem for problem in described.check() if problem.key != "output"]
    if not picture.absolute().parent.is_dir():
        problems.append(Problem("plot", str(picture), "there is no such folder to put the picture into"))
    if problems:
        raise ConfigError(*problems)
    connect_data(described)
    shares = describe_partition(described.data)
    print_partition(shares, Console())
    print_left_out(described.data.left_out, Console())
    print_samples(described.data, int(config["samples"]), Console())
    plot_partition(shares, picture)
    print(f"picture: {picture}")

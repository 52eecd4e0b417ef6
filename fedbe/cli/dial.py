"""``fedbe dial``: what a finished run learned and kept along its dial."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fedbe.cli.options import command_parser, parse
from fedbe.dial.run_dial import FACTORS, measure_run
from fedbe.figures.dial import dial_table


def run(arguments: Sequence[str]) -> None:
    """Measure what a finished run learned and kept along its dial, and choose a place on it."""
    parser = command_parser("dial")
    parser.add_argument("run", type=Path, help="A finished run's folder.")
    parser.add_argument(
        "--factors", type=float, nargs="+", default=list(FACTORS), help="Places to measure; 0 is the base model."
    )
    parser.add_argument(
        "--retention", type=float, help="Keep at least this much; without, the best trade-off is chosen."
    )
    options = parse(parser, arguments)
    dial = measure_run(options.run, options.factors, options.retention)
    console = Console()
    console.print(dial_table(dial))
    console.print(f"{dial.reason}; validation data and general tasks decide", highlight=False, soft_wrap=True)
    console.print(f"write it  fedbe export {options.run} --to FOLDER --dial auto", highlight=False, soft_wrap=True)

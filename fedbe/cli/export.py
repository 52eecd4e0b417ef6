"""``fedbe export``: a run's model with what it learned scaled."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fedbe.cli.options import command_parser, parse
from fedbe.dial.run_dial import chosen_factor, export_run
from fedbe.errors import ConfigError, Problem
from fedbe.expansion import rescale
from fedbe.modeling.checkpoint import DESCRIPTION_FILE
from fedbe.storage.run_folder import RunFolder


def run(arguments: Sequence[str]) -> None:
    """Write a run's model with what it learned scaled by a dial: 1 as trained, 0 the base model."""
    parser = command_parser("export")
    parser.add_argument("run", type=Path, help="A run's folder, or a model folder with expanded blocks.")
    parser.add_argument("--to", type=Path, required=True, help="The folder to write; it must not exist.")
    parser.add_argument(
        "--dial",
        type=float | Literal["auto"],
        default=1.0,
        help="Factor on what was learned; auto: as fedbe dial chose.",
    )
    parser.add_argument("--retention", type=float, help="With --dial auto: keep at least this much.")
    options = parse(parser, arguments)
    if problem := RunFolder.problem(options.to):
        raise ConfigError(Problem("--to", str(options.to), problem.remedy))
    if options.retention is not None and options.dial != "auto":
        raise ConfigError(Problem("--retention", options.retention, "goes with --dial auto"))
    factor = chosen_factor(options.run, options.retention) if options.dial == "auto" else options.dial
    model = options.run / "model" if (options.run / "model").is_dir() else options.run
    whole_run = RunFolder(options.run).config.is_file() and not (model / DESCRIPTION_FILE).is_file()
    report = export_run(options.run, options.to, factor) if whole_run else rescale(model, options.to, factor)
    print(f"{report.directory}: dial {factor:g}; {report.reason}")

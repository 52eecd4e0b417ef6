"""``fedbe compare``: several runs under one budget, or runs that exist, side by side."""

from collections.abc import Sequence
from pathlib import Path

from fedbe.cli.options import command_parser, parse
from fedbe.comparison import compare, compare_runs, read_comparison
from fedbe.errors import ConfigError, FedBEError, Problem


def run(arguments: Sequence[str]) -> None:
    """Compare algorithms under one budget, as a configuration says, or runs that exist."""
    parser = command_parser("compare")
    parser.add_argument("runs", type=Path, nargs="*", help="Folders of finished runs to compare; without --config.")
    parser.add_argument("--config", type=Path, help="What to run and compare.")
    parser.add_argument("--set", type=str, nargs="+", default=[], help="name=value for each ${name} in the file.")
    parser.add_argument("--output", type=Path, help="Where the results go; replaces the file's.")
    parser.add_argument("--parallel", type=int, help="Runs at a time; replaces the file's.")
    parser.add_argument("--seeds", type=list[int], help="Seeds such as [0,1,2]; replaces the file's.")
    parser.add_argument("--target", type=float, help="Downstream accuracy to time convergence to.")
    parser.add_argument("--matched_level", type=float, help="Downstream accuracy to compare retention at.")
    options = parse(parser, arguments)
    if (options.config is None) == (not options.runs):
        raise ConfigError(Problem("fedbe compare", " ".join(arguments), "give either --config FILE or folders of runs"))
    if options.config is None:
        print(compare_runs(options.runs, options.output, options.matched_level, options.target) / "comparison.md")
        return
    names = ("output", "parallel", "seeds", "target", "matched_level")
    given = {name: options[name] for name in names if options[name] is not None}
    config = read_comparison(options.config, variables(options.set), given)
    _, failures = compare(config)
    print(config.output / "comparison.md")
    if failures:
        raise FedBEError(f"{len(failures)} runs failed: " + ", ".join(str(failure.job.log) for failure in failures))


def variables(words: Sequence[str]) -> dict[str, str]:
    """Return ``{"name": "value"}`` for words such as ``name=value``.

    Raises:
        ConfigError: One is not of that form.
    """
    for word in words:
        if "=" not in word.strip("="):
            raise ConfigError(Problem("--set", word, "give name=value"))
    return dict(word.split("=", 1) for word in words)

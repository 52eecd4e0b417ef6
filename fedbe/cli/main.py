"""The command line: ``fedbe fit | compare | partition | dial | export | pretrain | bench``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from fedbe.config.parser import read_run, run_parser, shipped_config
from fedbe.errors import ConfigError, FedBEError, Problem

if TYPE_CHECKING:
    from fedbe.federation.loop import FederatedLoop

T = TypeVar("T")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 1 failed, 2 the input cannot be used, 130 interrupted."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if os.getcwd() not in sys.path:
        sys.path.insert(
            0, os.getcwd()
        )  # a user's own classes, named by `class_path`, stand where the command is called
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0
    command = COMMANDS.get(words[0])
    if command is None:
        print(f"fedbe: there is no command {words[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        command(words[1:])
    except ConfigError as error:
        print(explain(error), file=sys.stderr)
        return 2
    except FedBEError as error:
        print(f"fedbe: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fedbe: interrupted", file=sys.stderr)
        return 130
    return 0


def usage() -> str:
    """Return the list of commands."""
    lines = [f"  {name:<10} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(["usage: fedbe COMMAND [options]   (fedbe COMMAND --help)", "", *lines])


def explain(error: ConfigError) -> str:
    """Return every problem of a configuration, a line each."""
    count = len(error.problems)
    head = f"fedbe: {count} mistake{'s' if count > 1 else ''} in the input"
    return "\n".join([head, *(f"  - {problem}" for problem in error.problems)])


def fit_command(arguments: Sequence[str]) -> None:
    """Fine-tune a model with simulated clients, as a configuration says."""
    from fedbe.config.build import fit

    parser = run_parser("fit", fit_command.__doc__)
    run, config = read_run(parser, arguments)
    fit(run, config)


def compare_command(arguments: Sequence[str]) -> None:
    """Compare algorithms under one budget, as a configuration says, or runs that exist."""
    from fedbe.comparison import compare, compare_runs, read_comparison

    parser = ArgumentParser(prog="fedbe compare", description=compare_command.__doc__, exit_on_error=False)
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


def partition_command(arguments: Sequence[str]) -> None:
    """Print and plot which client gets which data, without training."""
    from rich.console import Console

    from fedbe.config.build import connect_data
    from fedbe.datamodules.report import describe_partition
    from fedbe.figures.partition import plot_partition, print_partition

    run, config = read_run(run_parser("partition", partition_command.__doc__), arguments)
    picture = Path(config["plot"])
    problems = [problem for problem in run.check() if problem.key != "output"]
    if not picture.absolute().parent.is_dir():
        problems.append(Problem("plot", str(picture), "there is no such folder to put the picture into"))
    if problems:
        raise ConfigError(*problems)
    connect_data(run)
    shares = describe_partition(run.data)
    print_partition(shares, Console())
    plot_partition(shares, picture)
    print(f"picture: {picture}")


def dial_command(arguments: Sequence[str]) -> None:
    """Measure what a finished run learned and kept along its dial, and choose a place on it."""
    from rich.console import Console

    from fedbe.dial.run_dial import FACTORS, dial_table, measure_run

    parser = ArgumentParser(prog="fedbe dial", description=dial_command.__doc__, exit_on_error=False)
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


def export_command(arguments: Sequence[str]) -> None:
    """Write a run's model with what it learned scaled by a dial: 1 as trained, 0 the base model."""
    from fedbe.dial.run_dial import chosen_factor, export_run
    from fedbe.expansion import rescale
    from fedbe.expansion.export import DESCRIPTION_FILE
    from fedbe.storage.run_folder import RunFolder

    parser = ArgumentParser(prog="fedbe export", description=export_command.__doc__, exit_on_error=False)
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


def pretrain_command(arguments: Sequence[str]) -> None:
    """Train the small base model that comes with fedbe."""
    from fedbe.pretraining.pretrain import PretrainConfig, pretrain

    parser = ArgumentParser(prog="fedbe pretrain", description=pretrain_command.__doc__, exit_on_error=False)
    parser.add_argument("--config", action="config", help="A YAML file with the options below.")
    parser.add_class_arguments(PretrainConfig)
    values = parser.instantiate(parse(parser, arguments)).as_dict()
    values.pop("config")
    print(pretrain(PretrainConfig(**values)))


def bench_command(arguments: Sequence[str]) -> None:
    """Measure on this machine: `overhead`, `memory`, `fedit` (LoRA), `cost-model`, `prefix`, `cohort`, `scaling`."""
    kinds = {
        "overhead": bench_overhead,
        "memory": bench_memory,
        "fedit": bench_fedit,
        "cost-model": bench_cost_model,
        "prefix": bench_prefix,
        "cohort": bench_cohort,
        "scaling": bench_scaling,
    }
    if not arguments or arguments[0] not in kinds:
        given = arguments[0] if arguments else None
        raise ConfigError(Problem("bench", given, f"say what to measure: {' or '.join(kinds)}"))
    kinds[arguments[0]](arguments[1:])


def bench_overhead(arguments: Sequence[str]) -> None:
    """Measure a run's wall time over a bare PyTorch loop that takes the same local steps, evaluation aside."""
    from tempfile import TemporaryDirectory

    from fedbe.bench.overhead import UNEVALUATED, measure_overhead
    from fedbe.config.build import build

    parser = bench_parser("overhead", bench_overhead.__doc__, rounds=10)
    options = parse(parser, arguments)
    with TemporaryDirectory() as folder:
        settings = [f"--federation.rounds={options.rounds + 2}", f"--output={folder}/run", *UNEVALUATED]
        run, config = read_run(run_parser("fit"), [f"--config={options.config}", *settings])
        print(measure_overhead(build(run, config), options.rounds))


def bench_memory(arguments: Sequence[str]) -> None:
    """Measure the peak memory of runs with few and with many clients, and its growth over the rounds."""
    from fedbe.bench.memory import measure_memory

    parser = bench_parser("memory", bench_memory.__doc__, rounds=50)
    parser.add_argument("--clients", type=list[int], default=[5, 50], help="Numbers of clients; the first is the base.")
    options = parse(parser, arguments)
    if options.rounds < 5:
        raise ConfigError(Problem("rounds", options.rounds, "give 5 or more: growth counts from a fifth of the run"))
    # What a step or a general task costs is the same for any number of clients, and would hide what clients cost.
    settings = [f"--federation.rounds={options.rounds}", "--federation.cohort=5", "--trainer.max_steps=2"]
    settings += ["--general_tasks=[]", "--logger=none"]
    results = [measure_memory([f"--config={options.config}", *settings], clients) for clients in options.clients]
    for result in results:
        print(result)
    for result in results[1:]:
        ratio = result.peak_bytes / results[0].peak_bytes
        print(f"peak with {result.clients} clients over {results[0].clients}: {ratio:.3f}")


def bench_fedit(arguments: Sequence[str]) -> None:
    """Measure a FedIT run's wall time and peak memory over the same run written by hand with `peft`."""
    from fedbe.bench.fedit import compare_memory, compare_time

    parser = bench_parser("fedit", bench_fedit.__doc__, rounds=10)
    parser.add_argument("--pairs", type=int, default=3, help="Pairs of processes to measure the memory of.")
    options = parse(parser, arguments)
    counts = {"rounds": options.rounds, "pairs": options.pairs}
    problems = [Problem(name, count, "give 1 or more") for name, count in counts.items() if count < 1]
    if problems:
        raise ConfigError(*problems)
    config = [f"--config={options.config}"]
    print(compare_time(config, options.rounds))
    for gives_back in (False, True):
        print()
        print(compare_memory(config, options.pairs, gives_back))


def bench_cost_model(arguments: Sequence[str]) -> None:
    """Measure time and memory of local steps that train different blocks, beside what the cost model predicts."""
    from fedbe.bench.cost_model import measure_cost_model

    repeats = "Steps to take the median of, per set of blocks."
    print(measured_steps("cost-model", bench_cost_model.__doc__, repeats, arguments, measure_cost_model))


def bench_prefix(arguments: Sequence[str]) -> None:
    """Measure local steps with shared-prefix reuse over steps without, by the position of the block that trains."""
    from fedbe.bench.prefix import HEADER, measure_prefix

    repeats = "Pairs of steps to take the median of."
    gains = measured_steps("prefix", bench_prefix.__doc__, repeats, arguments, measure_prefix)
    print(HEADER, *gains, sep="\n")


def bench_cohort(arguments: Sequence[str]) -> None:
    """Measure rounds of several clients in one pass over rounds one client after another, by the size of batches."""
    from fedbe.bench.cohort import HEADER, measure_cohort

    def show(loop: FederatedLoop, repeats: int) -> None:
        print(HEADER)
        for gain in measure_cohort(loop, repeats):
            print(gain, flush=True)

    measured_steps("cohort", bench_cohort.__doc__, "Pairs of rounds to take the median of.", arguments, show)


def bench_scaling(arguments: Sequence[str]) -> None:
    """Measure how a run's cost grows, with fitted exponents; each run is in a process of its own, on made-up texts."""
    from fedbe.bench.scaling import AXES, Size, measure_growth

    parser = ArgumentParser(prog="fedbe bench scaling", description=bench_scaling.__doc__, exit_on_error=False)
    for axis, (values, text) in AXES.items():
        parser.add_argument(f"--{axis}", type=list[int], default=values, help=f"{text}; [] to leave it out.")
    options = parse(parser, arguments)
    given = {axis: getattr(options, axis) for axis in AXES}
    if wrong := [
        Problem(axis, values, "give whole numbers from 1")
        for axis, values in given.items()
        if min(values, default=1) < 1
    ]:
        raise ConfigError(*wrong)
    for axis, values in given.items():
        if values:
            print(measure_growth(axis, values, Size()), flush=True)


def measured_steps(
    kind: str,
    description: str | None,
    repeats: str,
    arguments: Sequence[str],
    measure: Callable[[FederatedLoop, int], T],
) -> T:
    """Return what a benchmark of single steps measures on the loop of a configuration, which is not run.

    Args:
        kind: Name of the benchmark.
        description: Shown by ``--help``.
        repeats: What ``--repeats`` counts, shown by ``--help``.
        arguments: The command line.
        measure: Takes the loop and the number of repeats.

    Raises:
        ConfigError: The options or the configuration cannot be used.
    """
    from tempfile import TemporaryDirectory

    from fedbe.config.build import build

    parser = ArgumentParser(prog=f"fedbe bench {kind}", description=description, exit_on_error=False)
    parser.add_argument("--config", type=Path, default=shipped_config("quickstart"), help="A run's configuration.")
    parser.add_argument("--repeats", type=int, default=15, help=repeats)
    options = parse(parser, arguments)
    if options.repeats < 1:
        raise ConfigError(Problem("repeats", options.repeats, "give 1 or more"))
    with TemporaryDirectory() as folder:
        settings = [f"--config={options.config}", f"--output={folder}/run", "--logger=none", "--general_tasks=[]"]
        return measure(build(*read_run(run_parser("fit"), settings)), options.repeats)


def bench_parser(kind: str, description: str | None, rounds: int) -> ArgumentParser:
    """Return the parser of a benchmark over a run's configuration."""
    parser = ArgumentParser(prog=f"fedbe bench {kind}", description=description, exit_on_error=False)
    parser.add_argument("--config", type=Path, default=shipped_config("quickstart"), help="A run's configuration.")
    parser.add_argument("--rounds", type=int, default=rounds, help="Rounds to measure.")
    return parser


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


COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "fit": fit_command,
    "compare": compare_command,
    "partition": partition_command,
    "dial": dial_command,
    "export": export_command,
    "pretrain": pretrain_command,
    "bench": bench_command,
}

"""``fedbe bench``: what federation costs on this machine. Each measurement is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TypeVar

from jsonargparse import ArgumentParser

from fedbe.cli.options import parse
from fedbe.config.build import build
from fedbe.config.parser import read_run, run_parser, shipped_config
from fedbe.errors import ConfigError, Problem

if TYPE_CHECKING:
    from fedbe.federation.loop import FederatedLoop

T = TypeVar("T")


def run(arguments: Sequence[str]) -> None:
    """Measure on this machine, as the first word says."""
    if not arguments or arguments[0] not in KINDS:
        given = arguments[0] if arguments else None
        raise ConfigError(Problem("bench", given, f"say what to measure: {' or '.join(KINDS)}"))
    KINDS[arguments[0]](arguments[1:])


def overhead(arguments: Sequence[str]) -> None:
    """Measure a run's wall time over a bare PyTorch loop that takes the same local steps, evaluation aside."""
    from fedbe.bench.overhead import UNEVALUATED, measure_overhead

    options = parse(rounds_parser("overhead", overhead.__doc__, rounds=10), arguments)
    with TemporaryDirectory() as folder:
        settings = [f"--federation.rounds={options.rounds + 2}", f"--output={folder}/run", *UNEVALUATED]
        described, config = read_run(run_parser("fit"), [f"--config={options.config}", *settings])
        print(measure_overhead(build(described, config), options.rounds))


def memory(arguments: Sequence[str]) -> None:
    """Measure the peak memory of runs with few and with many clients, and its growth over the rounds."""
    from fedbe.bench.memory import measure_memory

    parser = rounds_parser("memory", memory.__doc__, rounds=50)
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


def fedit(arguments: Sequence[str]) -> None:
    """Measure a FedIT run's wall time and peak memory over the same run written by hand with `peft`."""
    from fedbe.bench.fedit import compare_memory, compare_time

    parser = rounds_parser("fedit", fedit.__doc__, rounds=10)
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


def cost_model(arguments: Sequence[str]) -> None:
    """Measure time and memory of local steps that train different blocks, beside what the cost model predicts."""
    from fedbe.bench.cost_model import measure_cost_model

    repeats = "Steps to take the median of, per set of blocks."
    print(measured_steps("cost-model", cost_model.__doc__, repeats, arguments, measure_cost_model))


def prefix(arguments: Sequence[str]) -> None:
    """Measure local steps with shared-prefix reuse over steps without, by the position of the block that trains."""
    from fedbe.bench.prefix import HEADER, measure_prefix

    repeats = "Pairs of steps to take the median of."
    gains = measured_steps("prefix", prefix.__doc__, repeats, arguments, measure_prefix)
    print(HEADER, *gains, sep="\n")


def cohort(arguments: Sequence[str]) -> None:
    """Measure rounds of several clients in one pass over rounds one client after another, by the size of batches."""
    from fedbe.bench.cohort import HEADER, measure_cohort

    def show(loop: FederatedLoop, repeats: int) -> None:
        print(HEADER)
        for gain in measure_cohort(loop, repeats):
            print(gain, flush=True)

    measured_steps("cohort", cohort.__doc__, "Pairs of rounds to take the median of.", arguments, show)


def scaling(arguments: Sequence[str]) -> None:
    """Measure how a run's cost grows, with fitted exponents; each run is in a process of its own, on made-up texts."""
    from fedbe.bench.scaling import AXES, Size, measure_growth

    parser = ArgumentParser(
        prog="fedbe bench scaling", description=scaling.__doc__, exit_on_error=False, allow_abbrev=False
    )
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


KINDS: dict[str, Callable[[Sequence[str]], None]] = {
    "overhead": overhead,
    "memory": memory,
    "fedit": fedit,
    "cost-model": cost_model,
    "prefix": prefix,
    "cohort": cohort,
    "scaling": scaling,
}
"""What can be measured."""


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
    parser = config_parser(kind, description)
    parser.add_argument("--repeats", type=int, default=15, help=repeats)
    options = parse(parser, arguments)
    if options.repeats < 1:
        raise ConfigError(Problem("repeats", options.repeats, "give 1 or more"))
    with TemporaryDirectory() as folder:
        settings = [f"--config={options.config}", f"--output={folder}/run", "--logger=none", "--general_tasks=[]"]
        return measure(build(*read_run(run_parser("fit"), settings)), options.repeats)


def rounds_parser(kind: str, description: str | None, rounds: int) -> ArgumentParser:
    """Return the parser of a benchmark over rounds of a run's configuration."""
    parser = config_parser(kind, description)
    parser.add_argument("--rounds", type=int, default=rounds, help="Rounds to measure.")
    return parser


def config_parser(kind: str, description: str | None) -> ArgumentParser:
    """Return the parser of a benchmark of a run's configuration."""
    parser = ArgumentParser(
        prog=f"fedbe bench {kind}", description=description, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--config", type=Path, default=shipped_config("quickstart"), help="A run's configuration.")
    return parser

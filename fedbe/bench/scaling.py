"""How a run's cost grows: with clients, the cohort, rounds, the model's depth and the number of expanded blocks."""

import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from fedbe.assets import micro_path
from fedbe.bench.display import quiet
from fedbe.bench.memory import MIB, bytes_in_use, give_back_freed_memory, in_fresh_process
from fedbe.config.build import build
from fedbe.config.parser import read_run, run_parser
from fedbe.federation.callback import FederatedCallback
from fedbe.federation.view import RunView
from fedbe.seeding import generator, isolated_rng

ROWS_PER_CLIENT = 4
WORDS = 24
VOCABULARY = ("return", "list", "value", "module", "function", "raise", "class", "import", "number", "string")

_WIDTHS = {"startup_seconds": 12, "round_seconds": 10, "client_milliseconds": 14, "run_seconds": 10, "in_use_bytes": 14}
"""The columns of the table: what is measured, and how wide it is shown."""


AXES = {
    "clients": ([100, 1000, 10000], "Numbers of clients, with a cohort of 10"),
    "cohort": ([10, 30, 100], "Numbers of clients in a round"),
    "rounds": ([4, 16, 64], "Numbers of rounds"),
    "depth": ([4, 8, 16, 32], "Numbers of blocks of the base model"),
    "blocks": ([1, 2, 4, 8], "Numbers of expanded blocks"),
}
"""What is varied: default values and what they are."""


@dataclass(frozen=True)
class Size:
    """How large a run is.

    Attributes:
        clients: Number of clients, with four short texts each.
        cohort: Clients in a round.
        rounds: Number of rounds.
        depth: Blocks of the base model, of the width of the small model that comes along, with random weights.
        blocks: Expanded blocks that every client trains.
    """

    clients: int = 100
    cohort: int = 10
    rounds: int = 6
    depth: int = 8
    blocks: int = 2


@dataclass(frozen=True)
class Cost:
    """What one run took, in a process of its own.

    Attributes:
        size: How large the run was.
        startup_seconds: From reading the configuration to the start of the first round.
        round_seconds: Median of a round, validation aside.
        run_seconds: All rounds together.
        in_use_bytes: Memory in use at the end, after garbage collection.
    """

    size: Size
    startup_seconds: float
    round_seconds: float
    run_seconds: float
    in_use_bytes: int

    @property
    def client_milliseconds(self) -> float:
        """Time of a client's run in a round, its one local step included."""
        return 1000 * self.round_seconds / self.size.cohort

    def __str__(self) -> str:
        return (
            f"{self.startup_seconds:>12.2f}{self.round_seconds:>10.3f}{self.client_milliseconds:>14.1f}"
            f"{self.run_seconds:>10.1f}{self.in_use_bytes / MIB:>14.1f}"
        )


@dataclass
class Growth:
    """Runs that differ in one thing.

    Attributes:
        axis: What differs: the name of a field of `Size`.
        costs: The runs, in the order of that.
    """

    axis: str
    costs: list[Cost] = field(default_factory=list)

    def exponents(self) -> dict[str, float]:
        """Return the exponent of each cost: what doubles with the axis has 1, what stays has 0."""
        sizes = [getattr(cost.size, self.axis) for cost in self.costs]
        return {name: exponent(sizes, [getattr(cost, name) for cost in self.costs]) for name in _WIDTHS}

    def __str__(self) -> str:
        header = f"{self.axis:>8}{'start-up s':>12}{'round s':>10}{'ms a client':>14}{'run s':>10}{'in use MiB':>14}"
        rows = [f"{getattr(cost.size, self.axis):>8}{cost}" for cost in self.costs]
        if len(self.costs) > 1:
            fitted = "".join(f"{value:>{_WIDTHS[name]}.2f}" for name, value in self.exponents().items())
            rows.append(f"{'exponent':>8}{fitted}")
        return "\n".join([header, *rows])


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return the exponent b of the power law cost = a · size^b, fitted by least squares of the logarithms."""
    xs, ys = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    return statistics.linear_regression(xs, ys).slope


def measure_growth(axis: str, values: Sequence[int], size: Size) -> Growth:
    """Run once for each value of one field of a size, each in a fresh process."""
    return Growth(axis, [in_fresh_process(measure_cost, replace(size, **{axis: value})) for value in values])


def measure_cost(size: Size) -> Cost:
    """Run a federation of this size in this process, on texts of random words."""
    give_back_freed_memory()
    disable_progress_bar()  # type: ignore[no-untyped-call]
    with TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", size.depth)
        write_texts(folder / "train.jsonl", size.clients * ROWS_PER_CLIENT)
        write_texts(folder / "held_out.jsonl", 8)
        started = time.perf_counter()
        run, config = read_run(run_parser("fit"), [*arguments(folder, size)])
        clock = _Clock(started)
        quiet(build(run, config), clock).run()
    seconds = clock.seconds
    return Cost(size, clock.startup, statistics.median(seconds), sum(seconds), clock.in_use)


def write_model(folder: Path, depth: int) -> None:
    """Write the shipped small model with this number of blocks and random weights, and its tokenizer."""
    shipped = micro_path()
    config = AutoConfig.from_pretrained(shipped, num_hidden_layers=depth, trust_remote_code=False)
    with isolated_rng(0):
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)  # type: ignore[no-untyped-call]
    AutoTokenizer.from_pretrained(shipped, trust_remote_code=False).save_pretrained(folder)


def write_texts(file: Path, count: int) -> None:
    """Write short texts of words drawn at random, one row each."""
    words = torch.randint(len(VOCABULARY), (count, WORDS), generator=generator(0, "words", file.name))
    rows = (json.dumps({"text": " ".join(VOCABULARY[word] for word in row)}) for row in words.tolist())
    file.write_text("\n".join(rows))


def arguments(folder: Path, size: Size) -> Iterator[str]:
    """Yield the command line of the run."""
    held_out = str(folder / "held_out.jsonl")
    corpus = {"train": str(folder / "train.jsonl"), "validation": held_out, "test": held_out}
    data = {
        "corpus": {"class_path": "fedbe.corpora.FilesCorpus", "init_args": corpus},
        "partitioner": {"class_path": "fedbe.datamodules.IIDPartitioner", "init_args": {"clients": size.clients}},
        "sequence_length": 32,
        "batch_size": 4,
        "max_validation_sequences": 8,
        "pack": False,
    }
    sections = {
        "model": {"name": str(folder / "model")},
        "algorithm": {"class_path": "fedbe.algorithms.BlockExpansion", "init_args": {"positions": size.blocks}},
        "data": {"class_path": "fedbe.datamodules.CausalLMDataModule", "init_args": data},
        "federation": {"rounds": size.rounds, "cohort": size.cohort},
        "trainer": {"accelerator": "cpu", "max_steps": 1},
    }
    yield from (f"--{name}={json.dumps(section)}" for name, section in sections.items())
    yield from (f"--output={folder / 'run'}", "--logger=none")


class _Clock(FederatedCallback):
    """Notes when rounds start and end, and what is in use at the end."""

    def __init__(self, started: float) -> None:
        self.started = started
        self.startup = 0.0
        self.seconds: list[float] = []
        self.in_use = 0

    def on_round_start(self, run: RunView) -> None:
        self.startup = self.startup or time.perf_counter() - self.started
        self.begun, self.evaluated = time.perf_counter(), run.evaluation_seconds

    def on_round_written(self, run: RunView) -> None:
        if run.completed:
            scoring = run.evaluation_seconds - self.evaluated
            self.seconds.append(time.perf_counter() - self.begun - scoring)

    def on_last_round(self, run: RunView) -> None:
        self.in_use = bytes_in_use()

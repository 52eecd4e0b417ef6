"""What federation costs with LoRA: a FedIT run's time and memory over the same run written by hand with `peft`."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory

import lightning as L
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from fedbe.adaptation.adapters import Adapters
from fedbe.adaptation.lora_layers import target_names
from fedbe.aggregation import Mean
from fedbe.bench.display import quiet
from fedbe.bench.memory import MIB, bytes_in_use, give_back_freed_memory, in_fresh_process
from fedbe.bench.overhead import (
    UNEVALUATED,
    Overhead,
    check_comparable,
    difference,
    first_batches,
    local_steps,
    paired_rounds,
)
from fedbe.client.trainer import QUIET, trainer_options
from fedbe.config.build import build, connect_data
from fedbe.config.parser import read_run, run_parser
from fedbe.config.run import RunConfig
from fedbe.engines import InProcess
from fedbe.errors import ConfigError, Problem
from fedbe.federation.cohort import CohortSampler
from fedbe.federation.loop import FederatedLoop
from fedbe.objectives import Plain
from fedbe.seeding import derive_seed, generator, isolated_rng
from fedbe.system.machine import peak_rss_bytes

FEDIT = ("--algorithm=fedbe.algorithms.FedIT", *UNEVALUATED)
MEMORY_ROUNDS = 3


class ByHand:
    """FedIT as one writes it for a single run, with `peft` and PyTorch and no framework around them.

    The base model is its own. Data, random numbers, optimizer and schedule are those of the configuration, so that
    what comes out can be compared with the run's.

    Args:
        run: The configuration, with a `FedIT` for its algorithm and its data connected.
        device: Where to train.

    Attributes:
        state: The global adapters, by the names that they have in the run's model.
    """

    def __init__(self, run: RunConfig, device: torch.device) -> None:
        self.run, self.options = run, trainer_options(run.trainer)
        self.sampler = CohortSampler(run.federation.cohort, run.seed)
        base, adapters = run.model.load(), _adapters(run)
        config = LoraConfig(
            r=adapters.rank,
            lora_alpha=adapters.alpha,  # type: ignore[arg-type]  # peft says `int`, and only divides
            lora_dropout=adapters.dropout,
            target_modules=target_names(base, adapters.target_modules),
        )
        self.model = get_peft_model(base, config).to(device).train()
        trainable = [(name, parameter) for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        self.adapters = {name.removeprefix("base_model.model."): parameter for name, parameter in trainable}
        self.state = {name: parameter.detach().clone() for name, parameter in self.adapters.items()}

    @torch.no_grad()
    def round(self, index: int) -> dict[str, Tensor]:
        """Run the round of this 0-based index and return the next global adapters."""
        mean = {name: torch.zeros_like(tensor) for name, tensor in self.state.items()}
        total = 0
        for client_id in self.sampler.sample(self.run.data.client_ids, 0, index):
            samples = self.train(client_id, index)
            total += samples
            for name, parameter in self.adapters.items():
                mean[name].lerp_(parameter, samples / total)
        self.state = mean
        return mean

    def train(self, client_id: str, index: int) -> int:
        """Train a client's adapters, from the global ones and with a fresh optimizer, and return its samples."""
        run, steps = self.run, self.options["max_steps"]
        purpose = ("client", 0, index, client_id)
        for name, parameter in self.adapters.items():
            parameter.copy_(self.state[name])
        optimizer = run.client.optimizer(list(self.adapters.values()))
        schedule = run.client.schedule.build(optimizer, index, run.federation.rounds, steps)
        batches = run.data.client_dataloader(client_id, generator(run.seed, "batches", *purpose))
        clip = self.options.get("gradient_clip_val")
        with torch.enable_grad(), isolated_rng(derive_seed(run.seed, "modules", *purpose)):
            return local_steps(self.model, optimizer, schedule, first_batches(batches, steps), clip)


def compare_time(arguments: Sequence[str], rounds: int) -> Overhead:
    """Time rounds of FedIT, each followed by the same round by hand, and compare the global adapters after each.

    Args:
        arguments: As given to ``fedbe fit``; the algorithm becomes `FedIT`, and nothing is evaluated.
        rounds: Rounds to measure; one more is run first.

    Raises:
        ConfigError: The configuration cannot run, or asks for what is not done by hand.
    """
    with TemporaryDirectory() as folder:
        run, loop = _build([*arguments, *FEDIT], rounds, folder)
        by_hand = ByHand(run, loop.model.device)
        loop.setup()
        loop.on_run_start()
        by_hand.state = dict(loop.server.state)
        result = paired_rounds(
            loop,
            rounds,
            lambda: by_hand.round(loop.round.index),
            lambda state: difference(state, loop.server.state),
        )
    return replace(result, reference="by hand")


@dataclass(frozen=True)
class Peak:
    """Memory of a process that ran a few rounds.

    Attributes:
        before_bytes: In use before the first round: libraries, data and model.
        peak_bytes: Largest resident memory.
    """

    before_bytes: int
    peak_bytes: int

    @property
    def rise_bytes(self) -> int:
        """What the rounds took beyond what was there before them, at their peak."""
        return self.peak_bytes - self.before_bytes


@dataclass(frozen=True)
class MemoryOverhead:
    """Result of `compare_memory`.

    Attributes:
        federated: Of each process with a FedIT run.
        by_hand: Of the process after each that did the same by hand.
        gives_back: Whether freed memory went back to the system at once.
    """

    federated: tuple[Peak, ...]
    by_hand: tuple[Peak, ...]
    gives_back: bool

    @property
    def ratios(self) -> tuple[float, ...]:
        """Peak federated over peak by hand, pair by pair."""
        return tuple(a.peak_bytes / b.peak_bytes for a, b in zip(self.federated, self.by_hand, strict=True))

    @property
    def rise_ratios(self) -> tuple[float, ...]:
        """The same without what was in use before, which is mostly libraries and alike in both."""
        return tuple(a.rise_bytes / b.rise_bytes for a, b in zip(self.federated, self.by_hand, strict=True))

    def __str__(self) -> str:
        lines = {
            "federated, peak in MiB": _spread([peak.peak_bytes / MIB for peak in self.federated], ".1f"),
            "by hand, peak in MiB": _spread([peak.peak_bytes / MIB for peak in self.by_hand], ".1f"),
            "ratio of peaks": _spread(self.ratios, ".3f"),
            "ratio of rises in rounds": _spread(self.rise_ratios, ".3f"),
        }
        kept = "given back at once" if self.gives_back else "kept or given back as it comes"
        head = f"pairs of processes         {len(self.ratios)} ({MEMORY_ROUNDS} rounds each), freed memory {kept}"
        return "\n".join([head, *(f"{name:<27}{text}" for name, text in lines.items())])


def compare_memory(arguments: Sequence[str], pairs: int, gives_back: bool) -> MemoryOverhead:
    """Measure the peak memory of a few rounds of FedIT and of the same by hand, each in a fresh process.

    Args:
        arguments: As given to ``fedbe fit``.
        pairs: How often to measure both.
        gives_back: Whether the processes give freed memory back at once (`give_back_freed_memory`): what the steps need
            and no more, where it is otherwise also what the allocator happens to keep.
    """
    given, kinds = [*arguments, *FEDIT], (_federated_peak, _peak_by_hand)
    measured = [[in_fresh_process(kind, given, gives_back) for kind in kinds] for _ in range(pairs)]
    federated, by_hand = zip(*measured, strict=True)
    return MemoryOverhead(federated, by_hand, gives_back)


def _federated_peak(arguments: Sequence[str], gives_back: bool) -> Peak:
    if gives_back:
        give_back_freed_memory()
    with TemporaryDirectory() as folder:
        run, loop = _build(arguments, MEMORY_ROUNDS, folder)
        run.data.eval_batch_size = 1  # what is scored before round 1 shall not make the peak
        loop.setup()
        loop.on_run_start()
        before = bytes_in_use()
        for _ in range(MEMORY_ROUNDS):
            loop.advance()
        return Peak(before, peak_rss_bytes())


def _peak_by_hand(arguments: Sequence[str], gives_back: bool) -> Peak:
    if gives_back:
        give_back_freed_memory()
    run, _ = read_run(run_parser("fit"), [*arguments, f"--federation.rounds={MEMORY_ROUNDS + 2}"])
    if problems := run.check():
        raise ConfigError(*problems)
    connect_data(run)
    by_hand = ByHand(run, L.Trainer(**QUIET, **trainer_options(run.trainer)).strategy.root_device)
    before = bytes_in_use()
    for index in range(MEMORY_ROUNDS):
        by_hand.round(index)
    return Peak(before, peak_rss_bytes())


def _build(arguments: Sequence[str], rounds: int, folder: str) -> tuple[RunConfig, FederatedLoop]:
    given = [*arguments, f"--federation.rounds={rounds + 2}", f"--output={folder}/run"]
    run, config = read_run(run_parser("fit"), given)
    loop = quiet(build(run, config))
    check_comparable(loop.plan.trainer)
    _adapters(run)
    return run, replace(loop, engine=InProcess())


def _adapters(run: RunConfig) -> Adapters:
    """Return what the run adds to its model, if all that the run does is done by hand too."""
    chosen = {"client.objective": run.client.objective, "federation.server_optimizer": run.federation.server_optimizer}
    plain = {"client.objective": Plain, "federation.server_optimizer": Mean}
    problems = [
        Problem(key, type(value).__name__, f"by hand there is only {plain[key].__name__}")
        for key, value in chosen.items()
        if type(value) is not plain[key]
    ]
    if run.data.num_labels is not None:
        problems.append(Problem("data", type(run.data).__name__, "by hand there are only language models"))
    adaptation = run.algorithm.adaptation
    if problems or not isinstance(adaptation, Adapters):
        raise ConfigError(*problems)
    return adaptation


def _spread(values: Sequence[float], form: str) -> str:
    middle, low, high = (format(value, form) for value in (statistics.median(values), min(values), max(values)))
    return f"{middle}   (min {low}, max {high})"

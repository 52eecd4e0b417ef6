"""What federation costs: a run's wall time over a bare PyTorch loop that takes the same local steps."""

import inspect
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, repeat
from typing import Any, TypeVar

import lightning as L
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from fedbe.bench.display import quiet
from fedbe.client.plan import LocalPlan
from fedbe.data import Batch
from fedbe.engines import Engine, InProcess
from fedbe.errors import ConfigError, Problem
from fedbe.federation.callback import FederatedCallback
from fedbe.federation.loop import FederatedLoop
from fedbe.federation.view import RunView
from fedbe.messages import FitTask, Update
from fedbe.modeling.base_model import forward_options
from fedbe.modeling.freezing import freeze, set_training_modes
from fedbe.modeling.tensors import copy_tensors
from fedbe.seeding import derive_seed, generator, isolated_rng

T = TypeVar("T")

UNEVALUATED = ("--federation.evaluate_every_n_rounds=1000000", "--general_tasks=[]", "--logger=none")
"""Arguments of a run that scores nothing between its first round and its last."""


@dataclass(frozen=True)
class Overhead:
    """What rounds of a run took, and what a reference took for the same.

    Attributes:
        federated_seconds: Wall time of each round, evaluation aside.
        bare_seconds: Wall time of the reference for the same round.
        client_runs: Clients trained in all rounds together.
        largest_difference: Largest absolute difference between the run's tensors and the reference's.
        reference: What the reference is, in at most 15 characters.
    """

    federated_seconds: tuple[float, ...]
    bare_seconds: tuple[float, ...]
    client_runs: int
    largest_difference: float
    reference: str = "bare PyTorch"

    @property
    def ratios(self) -> tuple[float, ...]:
        """Federated over reference, round by round."""
        return tuple(a / b for a, b in zip(self.federated_seconds, self.bare_seconds, strict=True))

    def __str__(self) -> str:
        ratio, federated, bare = map(statistics.median, (self.ratios, self.federated_seconds, self.bare_seconds))
        per_client = 1e3 * (sum(self.federated_seconds) - sum(self.bare_seconds)) / self.client_runs
        return (
            f"rounds measured            {len(self.ratios)} ({self.client_runs} client runs), after one to warm up\n"
            f"federated, a round         {federated:.3f} s   (min {min(self.federated_seconds):.3f}, "
            f"max {max(self.federated_seconds):.3f})\n"
            f"{f'{self.reference}, a round':<27}{bare:.3f} s   (min {min(self.bare_seconds):.3f}, "
            f"max {max(self.bare_seconds):.3f})\n"
            f"ratio, median              {ratio:.3f}   (min {min(self.ratios):.3f}, max {max(self.ratios):.3f})\n"
            f"overhead per client run    {per_client:.1f} ms\n"
            f"largest tensor difference  {self.largest_difference:g}"
        )


class _Recorder(FederatedCallback):
    """Keeps what a round's clients were given and what they sent."""

    def __init__(self) -> None:
        self.tasks: list[FitTask] = []
        self.updates: list[Update] = []

    def on_round_start(self, run: RunView) -> None:
        self.tasks, self.updates = [], []

    def on_client_end(self, run: RunView, task: FitTask, update: Update) -> None:
        self.tasks.append(task)
        self.updates.append(update)


def measure_overhead(loop: FederatedLoop, rounds: int) -> Overhead:
    """Run rounds of a loop and, after each, its clients' local steps again in a bare PyTorch loop.

    The run's callbacks work as always, but for the display. Clients train one after another in this process, wherever
    the configuration lets them train.

    Args:
        loop: Built and not set up, with more rounds than `rounds` + 1 and no evaluation among them.
        rounds: Rounds to measure; one more is run first.

    Raises:
        ConfigError: The clients' trainer does what the bare loop does not.
    """
    recorder = _Recorder()
    check_comparable(loop.plan.trainer)
    loop = replace(quiet(loop, recorder), engine=InProcess())
    loop.setup()
    loop.on_run_start()

    def again() -> list[dict[str, Tensor]]:
        return [bare_client(loop.plan, task, kept_before(loop.engine, loop.plan, task)) for task in recorder.tasks]

    def compare(sent: Sequence[Mapping[str, Tensor]]) -> float:
        loop.server.restore(loop.server.state)  # the bare loop trains the run's own model
        return max(difference(a, b.tensors) for a, b in zip(sent, recorder.updates, strict=True))

    return paired_rounds(loop, rounds, again, compare)


def paired_rounds(loop: FederatedLoop, rounds: int, again: Callable[[], T], compare: Callable[[T], float]) -> Overhead:
    """Time rounds of a run that has started, each followed by a reference that does the same.

    Args:
        loop: Has more rounds than `rounds` + 1 left and no evaluation among them.
        rounds: Rounds to measure; one more is run first.
        again: The reference for the round just run.
        compare: Returns the largest absolute difference between what `again` returned and the run's tensors.
    """
    federated, bare, differences, runs = [], [], [], 0
    for index in range(rounds + 1):
        federated_seconds, _ = timed(loop.advance)
        bare_seconds, result = timed(again)
        differences.append(compare(result))
        if index:
            federated.append(federated_seconds)
            bare.append(bare_seconds)
            runs += len(loop.record.cohort)
    return Overhead(tuple(federated), tuple(bare), runs, max(differences))


def check_comparable(trainer: Mapping[str, Any]) -> None:
    """Refuse arguments of a client's `L.Trainer` with which the bare loop could not take the same steps.

    Raises:
        ConfigError: There are such.
    """
    known = {"accelerator", "devices", "max_steps", "gradient_clip_val", "precision"}
    neutral = {"fast_dev_run": False, "enable_autolog_hparams": True, "strategy": "auto", "num_nodes": 1}
    neutral |= {"accumulate_grad_batches": 1, "precision": "32-true", "max_epochs": -1}
    defaults = {name: item.default for name, item in inspect.signature(L.Trainer).parameters.items()} | neutral
    odd = {
        name: value
        for name, value in trainer.items()
        if value != defaults.get(name, value) and (name not in known or name == "precision")
    }
    if trainer.get("max_steps", -1) < 1:
        odd["max_steps"] = trainer.get("max_steps")
    problems = [Problem(f"trainer.{name}", value, "the bare loop does not do this") for name, value in odd.items()]
    if problems:
        raise ConfigError(*problems)


def kept_before(engine: Engine, plan: LocalPlan, task: FitTask) -> dict[str, Tensor]:
    """Return the tensors that a client had kept to itself when a task began, which is done by now."""
    if task.resumes is None:
        return {}
    return engine.peek(replace(task, round_index=task.resumes), plan.adaptation.trainable_names)


def bare_client(plan: LocalPlan, task: FitTask, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Take a client's local steps with nothing but PyTorch and return the tensors it trained.

    Args:
        plan: What it needs to train.
        task: What it was given.
        kept: What it had kept to itself by then.
    """
    model, clip = plan.model, plan.trainer.get("gradient_clip_val")
    steps = plan.trainer["max_steps"] if task.max_steps is None else task.max_steps
    plan.topology.begin(model, plan.adaptation, task, kept)
    freeze(model, task.trainable_names)
    set_training_modes(model, task.trainable_names)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = plan.optimizer(parameters)
    schedule = plan.schedule.build(optimizer, task.round_index, plan.rounds, steps)
    batches = plan.data.client_dataloader(task.client_id, generator(plan.seed, "batches", *task.purpose))
    with isolated_rng(derive_seed(plan.seed, "modules", *task.purpose)):
        added = plan.adaptation.added_loss(model, task)
        local_steps(model, optimizer, schedule, first_batches(batches, steps), clip, added)
    return copy_tensors(model, task.trainable_names)


def first_batches(batches: Iterable[Batch], count: int) -> Iterable[Batch]:
    """Return `count` batches, going through `batches` as often as it takes."""
    return islice(chain.from_iterable(repeat(batches)), count)


def local_steps(
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler,
    batches: Iterable[Batch],
    clip: float | None,
    added_loss: Callable[[], Tensor] | None = None,
) -> int:
    """Take an optimizer step on each batch with nothing but PyTorch and return the number of samples seen.

    Args:
        model: A model of `transformers`, or a `peft` model around one.
        optimizer: Over one group of parameters.
        schedule: Stepped after each optimizer step.
        batches: The batches.
        clip: Largest norm of the gradient; ``None`` for any.
        added_loss: What is added to the model's own loss after each forward pass; ``None`` for nothing.
    """
    options = forward_options(model)  # type: ignore[arg-type]  # a `peft` model has its base's configuration
    samples, device = 0, next(model.parameters()).device
    parameters = optimizer.param_groups[0]["params"]
    for batch in batches:
        loss = model(**{name: x.to(device) for name, x in batch.items()}, **options).loss
        if added_loss is not None:
            loss = loss + added_loss()
        optimizer.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        schedule.step()
        samples += len(next(iter(batch.values())))
    return samples


def difference(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """Return the largest absolute difference between tensors of the same names."""
    return max((first[name] - second[name]).abs().max().item() for name in second)


def timed(function: Callable[[], T]) -> tuple[float, T]:
    """Return how many seconds a call took, and what it returned."""
    started = time.perf_counter()
    result = function()
    return time.perf_counter() - started, result

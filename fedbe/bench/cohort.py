"""What one pass of several clients saves: rounds with it over rounds one client after another, by the batches' size."""

import copy
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from torch import Tensor
from torch.utils.data import Dataset

from fedbe.algorithms import BlockExpansion
from fedbe.bench.overhead import difference, timed
from fedbe.client.plan import LocalPlan
from fedbe.data import Batch, DataWrapper, FederatedDataModule
from fedbe.engines import InProcess, OnePass
from fedbe.federation.loop import FederatedLoop
from fedbe.messages import FitTask, Outcome, Update
from fedbe.modeling.tensors import copy_tensors
from fedbe.objectives import Plain

BLOCKS = 2
STEPS = 5
SETTINGS = tuple((clients, size, length) for clients in (2, 8) for size in (1, 8) for length in (16, 128))
"""Clients in one pass, samples in a batch, tokens in a sequence at most."""


@dataclass(frozen=True)
class CohortGain:
    """Rounds in which a few clients take a few steps each.

    Attributes:
        clients: How many, all in one pass.
        batch_size: Samples in each of their batches.
        length: Tokens in a sequence; 0 for images.
        seconds: Time of a round one by one, round by round.
        ratios: Time of a round in one pass over that, pair by pair.
        largest_difference: Between the tensors that come out, absolute.
    """

    clients: int
    batch_size: int
    length: int
    seconds: tuple[float, ...]
    ratios: tuple[float, ...]
    largest_difference: float

    def __str__(self) -> str:
        ratio, spread = statistics.median(self.ratios), f"{min(self.ratios):.3f} – {max(self.ratios):.3f}"
        size = f"{self.clients:>8}{self.batch_size:>8}{self.length:>8}{statistics.median(self.seconds):>12.3f} s"
        return f"{size}{ratio:>10.3f}   {spread:<16}{self.largest_difference:>12.1e}"


HEADER = f"{'clients':>8}{'batch':>8}{'tokens':>8}{'one by one':>14}{'one pass':>10}   {'(min – max)':<16}{'apart':>12}"


class CutData(DataWrapper):
    """Another module's training data in batches of another size, its sequences cut.

    Args:
        data: The other module, set up.
        batch_size: Samples in a batch.
        length: Tokens in a sequence at most.
    """

    def __init__(self, data: FederatedDataModule, batch_size: int, length: int) -> None:
        super().__init__(data)
        self.batch_size, self.length = batch_size, length

    def client_dataset(self, client_id: str) -> Dataset[Any]:
        """Return a client's samples, cut."""
        return _Cut(self.data.client_dataset(client_id), self.length)


class _Cut(Dataset[Any]):
    def __init__(self, samples: Dataset[Any], length: int) -> None:
        self._samples, self._length = cast(Sequence[Mapping[str, Tensor]], samples), length

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        # Of a sequence its tokens; images have more dimensions.
        return {name: x[: self._length] if x.ndim == 1 else x for name, x in self._samples[index].items()}


def measure_cohort(loop: FederatedLoop, repeats: int) -> Iterator[CohortGain]:
    """Measure rounds of the run's clients, each training two expanded blocks for five steps, in this process.

    Args:
        loop: Built and not set up; its model, data, optimizer and schedule are taken.
        repeats: Pairs of rounds that count, after one that does not.

    Raises:
        ConfigError: Clients cannot be trained in one pass.
    """
    model, data = copy.deepcopy(loop.model), loop.plan.data
    inputs = {name: x[:2].to(model.device) for name, x in next(iter(data.val_dataloader())).items()}
    algorithm = BlockExpansion(BLOCKS)
    algorithm.adaptation.prepare(model, inputs)
    plan = replace(
        loop.plan,
        model=model,
        adaptation=algorithm.adaptation,
        topology=algorithm.topology,
        objective=Plain(),
        trainer={**loop.plan.trainer, "max_steps": STEPS},
        clock=None,
        prefix=None,
    )
    for clients, batch_size, length in SETTINGS:
        cut = CutData(data, batch_size, length)
        yield _gain(replace(plan, data=cut, cohort=clients), cut, inputs, repeats)


def _gain(plan: LocalPlan, data: CutData, inputs: Batch, repeats: int) -> CohortGain:
    clients, names = plan.cohort or 1, plan.adaptation.trainable_names
    state, structure = copy_tensors(plan.model, names), plan.adaptation.structure()
    chosen = [data.client_ids[index % len(data.client_ids)] for index in range(clients)]
    tasks = [FitTask(client, 0, index, state, names, structure=structure) for index, client in enumerate(chosen)]
    one_by_one, one_pass = InProcess(), OnePass(clients)
    for engine in (one_by_one, one_pass):
        engine.start(plan)
        engine.prepared(inputs, structure)
    apart, ratios, differences = [], [], []
    for _ in range(repeats + 1):
        alone_seconds, alone = timed(lambda: list(one_by_one.fit(tasks)))
        seconds, together = timed(lambda: one_pass.train_clients(tasks))
        apart.append(alone_seconds)
        ratios.append(seconds / alone_seconds)
        differences += [difference(_sent(a), b.tensors) for (_, a), b in zip(alone, together, strict=True)]
    length = data.length if "input_ids" in inputs else 0
    return CohortGain(clients, data.batch_size, length, tuple(apart[1:]), tuple(ratios[1:]), max(differences))


def _sent(outcome: Outcome) -> Mapping[str, Tensor]:
    if not isinstance(outcome, Update):
        raise RuntimeError(f"client {outcome.client_id!r} failed: {outcome.reason}")
    return outcome.tensors

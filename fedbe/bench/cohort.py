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
from fedbe.data import Batch, DataWrapper, FederatedDataModule
from fedbe.engines import CohortEngine, InProcessEngine
from fedbe.errors import ConfigError, Problem
from fedbe.federation.loop import FederatedLoop
from fedbe.messages import ClientTask, Update
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
    """Measure rounds of the run's clients, each training two expanded blocks for five steps.

    Args:
        loop: Built and not set up; its model, data, optimizer and schedule are taken.
        repeats: Pairs of rounds that count, after one that does not.

    Raises:
        ConfigError: Clients cannot be trained in one pass.
    """
    given = loop.engine.clients if isinstance(loop.engine, CohortEngine) else loop.engine
    if not isinstance(given, InProcessEngine):
        raise ConfigError(Problem("engine", type(given).__name__, "only clients in this process are measured"))
    model = copy.deepcopy(loop.model)
    inputs = {name: x[:2].to(model.device) for name, x in next(iter(loop.data.val_dataloader())).items()}
    algorithm = BlockExpansion(BLOCKS)
    algorithm.prepare(model, inputs)
    trainer = {**given.trainer, "max_steps": STEPS}
    engine = replace(given, model=model, algorithm=algorithm, trainer=trainer, objective=Plain())
    for clients, batch_size, length in SETTINGS:
        yield _gain(replace(engine, data=CutData(loop.data, batch_size, length)), inputs, clients, repeats)


def _gain(engine: InProcessEngine, inputs: Batch, clients: int, repeats: int) -> CohortGain:
    data = cast(CutData, engine.data)
    names = engine.algorithm.trainable_names
    state = copy_tensors(engine.model, names)
    chosen = [data.client_ids[index % len(data.client_ids)] for index in range(clients)]
    tasks = [ClientTask(client, 0, index, state, names) for index, client in enumerate(chosen)]
    together = CohortEngine(engine, clients, clients)
    together.setup(inputs)
    apart, ratios, differences = [], [], []
    for _ in range(repeats + 1):
        alone_seconds, alone = timed(lambda: list(engine.train(tasks)))
        seconds, all_at_once = timed(lambda: together.train_clients(tasks))
        apart.append(alone_seconds)
        ratios.append(seconds / alone_seconds)
        sent = [update for _, update in alone if isinstance(update, Update)]
        differences += [difference(a.tensors, b.tensors) for a, b in zip(sent, all_at_once, strict=True)]
    length = data.length if "input_ids" in inputs else 0
    return CohortGain(clients, data.batch_size, length, tuple(apart[1:]), tuple(ratios[1:]), max(differences))

"""Partitioners of `flwr_datasets`, accepted as they are and without importing that package."""

from copy import deepcopy
from typing import Any, Protocol

from datasets import Dataset

from fedbe.datamodules.partition import Partitioner, numbered, partition_problems, raise_problems
from fedbe.errors import ConfigError, Facts, Problem

_ROW = "__row__"


class FlowerPartitioner(Protocol):
    """What is used of a `flwr_datasets.partitioner.Partitioner`.

    Its `dataset` (to be assigned) and `num_partitions` are used too. They are left out here, because reading either
    before a data set is assigned raises.
    """

    def load_partition(self, partition_id: int) -> Any:
        """Return the rows of one partition as a `datasets.Dataset`."""
        ...


class FlowerAdapter(Partitioner):
    """Asks a `flwr_datasets` partitioner which rows each client gets.

    Clients are numbered, or named by the natural id where the partitioner knows one. Such a partitioner has its own
    ``seed``; the run's has no effect.

    Args:
        partitioner: The partitioner, no data set assigned yet.
    """

    def __init__(self, partitioner: FlowerPartitioner) -> None:
        self.partitioner = partitioner

    def partition(self, dataset: Dataset, seed: int) -> dict[str, list[int]]:
        """Return the rows of each client.

        Raises:
            ConfigError: When the partitioner refuses the data, or its parts are empty, overlap, or are not rows.
        """
        partitioner: Any = deepcopy(self.partitioner)  # a data set can be assigned to it only once
        name = type(partitioner).__name__
        try:
            partitioner.dataset = dataset.add_column(_ROW, list(range(len(dataset))))
            parts = [self._rows(partitioner.load_partition(part)) for part in range(partitioner.num_partitions)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(Problem("partitioner", name, f"cannot divide the data: {error}")) from error
        raise_problems(partition_problems("partitioner", numbered(parts), len(dataset)))
        names: dict[int, Any] = getattr(partitioner, "partition_id_to_natural_id", {})
        return {str(names.get(int(client), client)): rows for client, rows in numbered(parts).items()}

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes found by dividing the data, which such a partitioner can do only as a whole."""
        try:
            self.partition(facts.dataset, seed=0)
        except ConfigError as error:
            at = key.removesuffix(".init_args")
            return [Problem(at, problem.value, problem.remedy) for problem in error.problems]
        return []

    @staticmethod
    def _rows(part: Any) -> list[int]:
        if _ROW not in part.column_names:
            raise ValueError("it divides columns, not rows; use a partitioner that gives each client rows of its own.")
        return list(part[_ROW])


def as_partitioner(partitioner: Partitioner | FlowerPartitioner) -> Partitioner:
    """Return a `Partitioner` for one of ours or of `flwr_datasets`.

    Raises:
        ConfigError: When it is neither.
    """
    if isinstance(partitioner, Partitioner):
        return partitioner
    if hasattr(type(partitioner), "load_partition"):
        return FlowerAdapter(partitioner)
    remedy = "is no partitioner; use one of fedbe.datamodules or of flwr_datasets.partitioner."
    raise ConfigError(Problem("partitioner", type(partitioner).__name__, remedy))

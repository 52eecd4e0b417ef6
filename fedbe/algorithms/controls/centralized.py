"""Baseline: the data of all clients in one place, against the very separation that federation is for."""

from collections.abc import Sequence
from typing import Any

from torch.utils.data import ConcatDataset, Dataset

from fedbe.algorithms.base import Algorithm
from fedbe.algorithms.controls.wrapper import Wrapper
from fedbe.data import DataWrapper, FederatedDataModule

POOLED = "pooled"


class Centralized(Wrapper):
    """One client holds all data and takes, in each round, as many local steps as a cohort takes together.

    What is trained follows another algorithm. The optimizer starts anew in each round, as it does for every client of
    a federated run. A run with ``client.schedule.span`` "run" has one schedule over all of it.

    Args:
        algorithm: Says which parameters are trained.

    Source: ours, the usual upper control of federated learning.
    """

    def __init__(self, algorithm: Algorithm) -> None:
        super().__init__(algorithm)
        self.pooled = True


class PooledData(DataWrapper):
    """The data of all clients of another module as that of one client, named ``pooled``.

    Args:
        data: The other module, after its `setup`.
    """

    def __init__(self, data: FederatedDataModule) -> None:
        super().__init__(data)
        self.connect(data.tokenizer, data.model_config, data.seed)

    @property
    def client_ids(self) -> Sequence[str]:
        """The one client."""
        return [POOLED]

    def client_dataset(self, client_id: str) -> Dataset[Any]:
        """Return the training sets of all clients, one after another."""
        return ConcatDataset([self.data.client_dataset(client) for client in self.data.client_ids])

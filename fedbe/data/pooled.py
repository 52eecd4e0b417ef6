"""All clients' data as that of one, for training in one place."""

from collections.abc import Sequence
from typing import Any

from torch.utils.data import ConcatDataset, DataLoader, Dataset

from fedbe.data.module import DataWrapper, FederatedDataModule
from fedbe.errors import ConfigError, Problem

POOLED = "pooled"


class PooledData(DataWrapper):
    """The data of all clients of another module as that of one client, named ``pooled``.

    The pool's batches are drawn from all samples alike and joined by the other module's `collate`. The one client's own
    model is compared and scored on the data of the downstream task.

    Args:
        data: The other module, after its `setup`.

    Raises:
        ConfigError: The other module makes each client's batches in its own way, which says nothing about the pool's.
    """

    def __init__(self, data: FederatedDataModule) -> None:
        super().__init__(data)
        if data.own_batches:
            remedy = "makes each client's batches in its own way: there is none for the data of all in one place"
            raise ConfigError(Problem("data", type(data).__name__, remedy))
        self.key, self.seed = data.key, data.seed
        self.tokenizer, self.model_config = data.tokenizer, data.model_config

    @property
    def client_ids(self) -> Sequence[str]:
        """The one client."""
        return [POOLED]

    def client_dataset(self, client_id: str) -> Dataset[Any]:
        """Return the training sets of all clients, one after another."""
        return ConcatDataset([self.data.client_dataset(client) for client in self.data.client_ids])

    def client_val_dataloader(self, client_id: str) -> DataLoader[Any]:
        """Return the validation batches of the downstream task."""
        return self.val_dataloader()

    def client_test_dataloader(self, client_id: str) -> DataLoader[Any]:
        """Return the test batches of the downstream task."""
        return self.test_dataloader()

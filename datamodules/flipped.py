"""Clients whose labels are wrong, to rehearse it."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fedbe.data import IGNORED, Batch, DataWrapper, FederatedDataModule
from fedbe.errors import ConfigError, Problem


class FlippedLabels(DataWrapper):
    """Another module's data, in which chosen clients train on flipped labels: class c of n becomes n − 1 − c.

    Tokens to be predicted are flipped like classes, among the model's vocabulary.

    Args:
        data: The other module.
        clients: Names of the clients; ``None`` for all.

    Source: label flipping as an attack on federated learning after Fung, Yoon and Beschastnikh (arXiv 1808.04866) and
    Tolpegin et al. (arXiv 2007.08432); the order among all classes is ours.
    """

    def __init__(self, data: FederatedDataModule, clients: list[str] | None = None) -> None:
        super().__init__(data)
        self.clients = clients

    def setup(self, stage: str | None = None) -> None:
        """Load the other module's data.

        Raises:
            ConfigError: It has no client of that name.
        """
        super().setup(stage)
        if unknown := sorted(set(self.clients or ()) - set(self.client_ids)):
            known = ", ".join(list(self.client_ids)[:10])
            raise ConfigError(Problem(f"{self.key}.clients", unknown[0], f"is no client; there are {known}"))

    def client_dataset(self, client_id: str) -> Dataset[Any]:
        """Return the training set of one client, flipped if it is one of those."""
        dataset = super().client_dataset(client_id)
        return Flipped(dataset, self.classes) if self._flips(client_id) else dataset

    def client_dataloader(self, client_id: str, generator: torch.Generator) -> DataLoader[Any]:
        """Return one client's batches as the other module makes them, flipped if it is one of those."""
        loader = copy.copy(self.data.client_dataloader(client_id, generator))
        if self._flips(client_id):
            loader.collate_fn = FlippedBatches(loader.collate_fn, self.classes)
        return loader

    @property
    def classes(self) -> int:
        """Number of classes, or of tokens."""
        if self.num_labels is not None:
            return self.num_labels
        if self.model_config is None:
            raise RuntimeError("the number of tokens is known after `connect` has been called")
        return int(self.model_config.get_text_config().vocab_size)

    def _flips(self, client_id: str) -> bool:
        return self.clients is None or client_id in self.clients


class Flipped(Dataset[dict[str, Tensor]]):
    """Samples whose ``labels`` c are n − 1 − c; what is not to be predicted stays so.

    Args:
        samples: The true samples.
        classes: n.
    """

    def __init__(self, samples: Dataset[Any], classes: int) -> None:
        self.samples, self.classes = samples, classes

    def __len__(self) -> int:
        return len(cast(Sequence[Any], self.samples))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = self.samples[index]
        return {**sample, "labels": flipped(torch.as_tensor(sample["labels"]), self.classes)}


@dataclass(frozen=True)
class FlippedBatches:
    """Joins samples as another function does, and flips the labels of the batch.

    Attributes:
        collate: The other function.
        classes: n.
    """

    collate: Callable[[Any], Batch]
    classes: int

    def __call__(self, samples: Any) -> Batch:
        """Return the batch."""
        batch = self.collate(samples)
        return {**batch, "labels": flipped(batch["labels"], self.classes)}


def flipped(labels: Tensor, classes: int) -> Tensor:
    """Return labels c of n classes as n − 1 − c; what is not to be predicted stays so."""
    return torch.where(labels == IGNORED, labels, classes - 1 - labels)

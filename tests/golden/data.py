"""A federated task that needs nothing but arithmetic, and a callback that saves time."""

from collections.abc import Sequence

import torch
from torch.utils.data import Dataset

from fedbe.callbacks import PlotCallback
from fedbe.data import FederatedDataModule

FIRST, NUMBERS, LENGTH = 100, 24, 12


class Rows(Dataset):
    def __init__(self, tokens: torch.Tensor, labels: torch.Tensor):
        self.tokens, self.labels = tokens, labels

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.labels[index]}


class CountingData(FederatedDataModule):
    """Client k counts upwards in steps of k + 1; with `classes` it is to be told by where a sequence begins."""

    def __init__(
        self,
        clients: int = 4,
        samples: Sequence[int] = (6, 10, 14, 18),
        classes: int | None = None,
        batch_size: int = 4,
    ):
        super().__init__(batch_size)
        self.clients, self.samples, self.classes = clients, samples, classes

    @property
    def client_ids(self) -> list[str]:
        return [f"client-{k}" for k in range(self.clients)]

    @property
    def num_labels(self) -> int | None:
        return self.classes

    def rows(self, step: int, count: int, first: int) -> Rows:
        start = (first + 7 * torch.arange(count)) % NUMBERS
        tokens = FIRST + (start[:, None] + step * torch.arange(LENGTH)) % NUMBERS
        return Rows(tokens, tokens if self.classes is None else start % self.classes)

    def client_dataset(self, client_id: str) -> Rows:
        k = int(client_id.split("-")[1])
        return self.rows(k + 1, self.samples[k % len(self.samples)], k)

    def validation_dataset(self) -> Rows:
        return self.rows(1, 8, 5)

    def test_dataset(self) -> Rows:
        return self.rows(1, 8, 11)


class NoPlots(PlotCallback):
    """Takes the place of the pictures, which are no part of the result."""

    def on_run_written(self, *arguments) -> None:
        pass

"""Federated data of your own: each client learns to add a number of its own."""

import torch
from torch.utils.data import Dataset

from fedbe.data import FederatedDataModule
from fedbe.seeding import generator


class Texts(Dataset):
    def __init__(self, texts, tokenizer):
        self.rows = [tokenizer(text, return_tensors="pt").input_ids[0] for text in texts]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class SumsData(FederatedDataModule):
    def __init__(self, clients: int = 4, batch_size: int = 8):
        super().__init__(batch_size)
        self.clients = clients

    @property
    def client_ids(self):
        return [str(number) for number in range(self.clients)]

    def client_dataset(self, client_id, purpose="train"):
        others = torch.randint(10, 100, (64,), generator=generator(self.seed, purpose, client_id)).tolist()
        return Texts([f"{other} and {client_id} make {other + int(client_id):03d}" for other in others], self.tokenizer)

    def validation_dataset(self):
        return self.client_dataset("0", "validation")

    def test_dataset(self):
        return self.client_dataset("0", "test")

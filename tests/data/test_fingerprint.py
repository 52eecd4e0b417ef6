"""The fingerprint of data: the same for the same samples, another for any that differ, whatever holds them."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL.Image import fromarray
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset
from toy import Sequences, ToyData

from fedbe.data import PooledData, module
from fedbe.data.fingerprint import fingerprint
from fedbe.datamodules import FlippedLabels
from fedbe.datamodules.tokens import LabelledTokens, TokenSamples
from fedbe.text.ragged import Ragged


@dataclass
class Samples(Dataset):
    values: list

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return self.values[index]


class Stream(IterableDataset):
    def __init__(self, values):
        self.values = values

    def __iter__(self):
        return iter(self.values)


def ragged(*sequences):
    return Ragged.of(sequences)


def scored(*values):
    return torch.tensor(values)


DIFFERENT = {
    "tokens": [
        TokenSamples(ragged([1, 2], [3]), scored(False, True, True)),
        TokenSamples(ragged([1, 2], [4]), scored(False, True, True)),
        TokenSamples(ragged([1], [2, 3]), scored(False, True, True)),
        TokenSamples(ragged([1, 2], [3]), scored(False, True, False)),
    ],
    "labelled tokens": [
        LabelledTokens(ragged([1, 2], [3]), torch.tensor([0, 1])),
        LabelledTokens(ragged([1, 2], [3]), torch.tensor([1, 0])),
        LabelledTokens(ragged([1, 2], [5]), torch.tensor([0, 1])),
    ],
    "tensors": [TensorDataset(torch.zeros(3, 2)), TensorDataset(torch.zeros(3, 2).long()), TensorDataset(torch.eye(3))],
    "rows": [Sequences(torch.zeros(4, 3)), Sequences(torch.zeros(3, 4)), Sequences(torch.zeros(5, 3))],
    "joined": [
        ConcatDataset([TensorDataset(torch.zeros(3)), Samples([1])]),
        ConcatDataset([TensorDataset(torch.zeros(3)), Samples([2])]),
        ConcatDataset([TensorDataset(torch.ones(3)), Samples([1])]),
    ],
    "some of them": [Subset(Samples([1, 2, 3]), [0, 1]), Subset(Samples([1, 2, 3]), [1, 0])],
    "plain values": [
        Samples([value])
        for value in ({"a": 1, "b": 2}, {"a": 2, "b": 1}, {"a": 12}, ["a", 1], ["a1"], "a1", b"a1", 1, 1.0, True, None)
    ],
    "arrays": [Samples([np.zeros(4)]), Samples([np.zeros(4, np.float32)]), Samples([np.zeros((2, 2))]), Samples([1])],
    "pictures": [Samples([fromarray(np.full((4, 4), level, np.uint8))]) for level in (0, 1)],
    "a stream": [Stream([1, 2]), Stream([1, 3]), Stream([1])],
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_equal_data_has_one_fingerprint_and_any_other_another(kind):
    found = [fingerprint(dataset) for dataset in DIFFERENT[kind]]
    assert found == [fingerprint(dataset) for dataset in DIFFERENT[kind]]
    assert len(set(found)) == len(found)


def test_the_order_of_a_sample_s_entries_does_not_count():
    assert fingerprint(Samples([{"a": 1, "b": 2}])) == fingerprint(Samples([{"b": 2, "a": 1}]))


def test_each_part_of_the_data_has_its_own():
    found = ToyData().fingerprint()
    assert list(found) == ["validation", "test", *(f"client client-{k}" for k in range(4))]
    assert [text.split(":")[0] for text in found.values()] == ["8", "8", "6", "10", "14", "18"]
    assert list(ToyData().fingerprint(with_clients=False)) == ["validation", "test"]


class Changed(ToyData):
    """The toy's data, one value of one client's last sample changed."""

    def client_dataset(self, client_id):
        dataset = super().client_dataset(client_id)
        if client_id == "client-2":
            dataset.rows[-1, -1] += 1
        return dataset


@pytest.mark.parametrize("around", [lambda data: data, PooledData, lambda data: FlippedLabels(data, clients=1)])
def test_a_change_in_a_client_s_data_is_seen_through_modules_around_it(around):
    before, after = around(ToyData()).fingerprint(), around(Changed()).fingerprint()
    assert [part for part in before if before[part] != after[part]] == ["client client-2"]


class Random(ToyData):
    """Samples that are drawn at random from the global generators, as augmented pictures are."""

    def client_dataset(self, client_id):
        return Drawn()


class Drawn(Samples):
    def __init__(self):
        super().__init__([0, 1])

    def __getitem__(self, index):
        return torch.rand(2), np.random.rand(2), random.random()


def test_samples_drawn_at_random_have_one_fingerprint_and_the_generators_stay_where_they_are():
    first = Random().fingerprint()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert Random().fingerprint() == first
    torch.testing.assert_close(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == before[1:]


def test_of_very_many_samples_only_some_are_drawn_and_those_held_in_tensors_are_read_as_a_whole(monkeypatch):
    drawn = []

    class Counted(Samples):
        def __getitem__(self, index):
            drawn.append(index)
            return super().__getitem__(index)

    class Large(ToyData):
        def client_dataset(self, client_id):
            return Counted(list(range(100)))

        def validation_dataset(self):
            return TensorDataset(torch.arange(1000))

    monkeypatch.setattr(module, "MOST_SAMPLES", 100)
    found = Large(clients=2).fingerprint()
    assert drawn == [*range(0, 100, 3)] * 2 and found["client client-0"].startswith("100:")

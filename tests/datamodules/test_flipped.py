import pytest
import torch
from toy import VOCABULARY, ToyData, tiny_llama

from fedbe.data import IGNORED
from fedbe.datamodules import FlippedLabels
from fedbe.datamodules.flipped import Flipped
from fedbe.errors import ConfigError


def flipped(clients):
    data = FlippedLabels(ToyData(), clients)
    data.connect(None, tiny_llama().config, 0)
    data.setup("fit")
    return data


def test_chosen_clients_labels_are_flipped_and_nothing_else():
    data = flipped(["client-1"])
    for client in data.client_ids:
        true, given = data.data.client_dataset(client)[3], data.client_dataset(client)[3]
        expected = VOCABULARY - 1 - true["labels"] if client == "client-1" else true["labels"]
        assert torch.equal(given["labels"], expected) and torch.equal(given["input_ids"], true["input_ids"])
        assert len(data.client_dataset(client)) == len(data.data.client_dataset(client))
    assert torch.equal(data.validation_dataset()[0]["labels"], data.data.validation_dataset()[0]["labels"])
    assert isinstance(flipped(None).client_dataset("client-2"), Flipped)


def test_what_is_not_to_be_predicted_stays_so_and_flipping_twice_is_the_truth():
    rows = [{"labels": torch.tensor([IGNORED, 0, 4])}, {"labels": torch.tensor(1)}]
    once = Flipped(rows, 5)
    assert [sample["labels"].tolist() for sample in once] == [[IGNORED, 4, 0], 3]
    twice = Flipped(once, 5)
    assert all(torch.equal(twice[i]["labels"], rows[i]["labels"]) for i in range(2))


def test_a_client_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match=r"clients = 'nobody': is no client; there are client-0"):
        flipped(["nobody"])

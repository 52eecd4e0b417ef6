"""Modules around other modules: what they do not change is passed on, and nothing that they change is lost."""

import inspect

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader
from toy import VOCABULARY, Sequences, ToyData, tiny_llama

from fedbe.bench.cohort import CutData
from fedbe.data import DataWrapper, FederatedDataModule, PooledData
from fedbe.datamodules import FlippedLabels
from fedbe.errors import ConfigError, Facts

OWN = {"own_batches"}
"""What a wrapper works out for itself."""

NAMED = {name for name, member in vars(FederatedDataModule).items() if callable(member) or isinstance(member, property)}
PUBLIC = sorted({name for name in NAMED if not name.startswith("_")} - OWN | {"prepare_data", "setup"})


def recorder():
    """A module that notes every call, with a result of its own for each."""
    calls = []

    def noting(name):
        def method(self, *arguments, **options):
            calls.append((name, arguments, options))
            return f"the other module's {name}"

        return method

    members = {
        name: property(noting(name)) if isinstance(vars(FederatedDataModule).get(name), property) else noting(name)
        for name in PUBLIC
    }
    return type("Recorder", (FederatedDataModule,), members)(3, 5), calls


class Around(DataWrapper):
    """Changes nothing."""


def call(data, name):
    """Call a method of a module with made-up arguments, or read a property."""
    member = inspect.getattr_static(type(data), name)
    if isinstance(member, property):
        return getattr(data, name), ()
    names = [p for p in inspect.signature(getattr(FederatedDataModule, name)).parameters if p != "self"]
    arguments = tuple(Facts() if p == "facts" else f"some {p}" for p in names)
    return getattr(data, name)(*arguments), arguments


def returns_nothing(name):
    member = getattr(FederatedDataModule, name)
    return not isinstance(member, property) and inspect.signature(member).return_annotation in (None, "None")


@pytest.mark.parametrize("name", PUBLIC)
def test_a_wrapper_passes_on_every_method_that_it_does_not_change(name):
    inner, calls = recorder()
    result, given = call(Around(inner), name)
    (called, arguments, _) = calls[-1]
    assert called == name
    if name == "check":
        assert result == [*"the other module's check"] and arguments == ("some key.data.init_args", *given[1:])
        return
    assert arguments == given
    assert result in (None, f"the other module's {name}")
    assert (result is None) == returns_nothing(name)


def test_a_wrapper_has_the_sizes_of_batches_and_the_key_of_what_is_in_it():
    inner, _ = recorder()
    around = Around(inner)
    around.key = "data.init_args.data.init_args"
    around.connect(None, None, 7)
    assert (around.batch_size, around.eval_batch_size, around.seed) == (3, 5, 7)
    assert inner.key == "data.init_args.data.init_args.data.init_args"


class Twice(ToyData):
    """Makes batches in its own way: each holds the first sample twice, and no other."""

    def client_dataloader(self, client_id, generator):
        rows = self.client_dataset(client_id)
        return DataLoader(rows, 2, sampler=[0, 0], generator=generator, collate_fn=self.collate)


class Own(ToyData):
    """Every client has validation and test data of its own."""

    def client_val_dataloader(self, client_id):
        return self._eval_dataloader(self.rows(int(client_id[-1]), 8, "own validation"))

    def client_test_dataloader(self, client_id):
        return self._eval_dataloader(self.rows(int(client_id[-1]), 8, "own test"))


def batches(loader):
    return [{name: tensor.clone() for name, tensor in batch.items()} for batch in loader]


def assert_same(first, second):
    assert len(first) == len(second) > 0
    assert all(torch.equal(a[name], b[name]) for a, b in zip(first, second, strict=True) for name in a)


def chance():
    return torch.Generator().manual_seed(3)


def flipped(data, clients=("client-1",)):
    around = FlippedLabels(data, list(clients))
    around.connect(None, tiny_llama().config, 0)
    around.setup("fit")
    return around


@pytest.mark.parametrize("inner", [ToyData, Twice, Own])
@pytest.mark.parametrize("depth", [1, 2])
def test_flipped_labels_are_in_the_batches_that_the_other_module_makes_and_nothing_else_is(inner, depth):
    plain, around = inner(), flipped(inner())
    if depth == 2:
        around = Around(around)
    for client in plain.client_ids:
        expected, found = (batches(data.client_dataloader(client, chance())) for data in (plain, around))
        for batch in expected:
            batch["labels"] = VOCABULARY - 1 - batch["labels"] if client == "client-1" else batch["labels"]
        assert_same(expected, found)
        for name in ("client_val_dataloader", "client_test_dataloader"):
            assert_same(batches(getattr(plain, name)(client)), batches(getattr(around, name)(client)))


def test_a_loader_that_a_module_keeps_is_flipped_once():
    class Kept(ToyData):
        def client_dataloader(self, client_id, generator):
            self.kept = getattr(self, "kept", None) or super().client_dataloader(client_id, generator)
            return self.kept

    around = flipped(Kept())
    first, second = (batches(around.client_dataloader("client-1", chance())) for _ in range(2))
    rows = torch.cat([batch["input_ids"] for batch in first + second])
    labels = torch.cat([batch["labels"] for batch in first + second])
    assert torch.equal(labels, VOCABULARY - 1 - rows)


def test_other_samples_come_in_batches_of_the_wrapper_s_size():
    data = CutData(ToyData(batch_size=4), 3, 5)
    sizes = [tuple(batch["input_ids"].shape) for batch in data.client_dataloader("client-1", chance())]
    assert sizes == [(3, 5), (3, 5), (3, 5), (1, 5)]


@pytest.mark.parametrize("inner", [Twice, lambda: Around(Twice()), lambda: flipped(Twice())])
def test_samples_that_the_other_module_s_own_batches_would_not_have_are_refused(inner):
    data = CutData(inner(), 3, 5)
    kind = type(data.data).__name__
    (problem,) = data.check("data.init_args", Facts())
    assert (problem.key, problem.value) == ("data.init_args.data", kind) and "CutData" in problem.remedy
    with pytest.raises(ConfigError, match=f"data.init_args.data = '{kind}'"):
        data.client_dataloader("client-1", chance())
    assert CutData(ToyData(), 3, 5).check("data.init_args", Facts()) == []


def test_the_pool_holds_every_client_s_samples_once():
    data = ToyData()
    pooled = PooledData(data)
    rows = torch.cat([data.client_dataset(client).rows for client in data.client_ids])
    dataset = pooled.client_dataset(pooled.client_ids[0])
    assert len(pooled.client_ids) == 1
    assert torch.equal(torch.stack([dataset[i]["input_ids"] for i in range(len(dataset))]), rows)
    batches = list(pooled.client_dataloader("pooled", torch.Generator().manual_seed(0)))
    assert sum(len(batch["input_ids"]) for batch in batches) == len(rows)


def test_the_pool_of_flipped_clients_is_flipped():
    around = flipped(ToyData())
    pooled = PooledData(around)
    labels = torch.cat([batch["labels"] for batch in pooled.client_dataloader("pooled", chance())])
    inputs = torch.cat([batch["input_ids"] for batch in pooled.client_dataloader("pooled", chance())])
    wrong = (labels != inputs).any(1)
    assert int(wrong.sum()) == len(around.client_dataset("client-1"))
    assert torch.equal(labels[wrong], VOCABULARY - 1 - inputs[wrong])


@pytest.mark.parametrize("inner", [Twice, lambda: Around(Twice()), lambda: flipped(Twice())])
def test_the_pool_of_clients_whose_batches_are_made_in_another_way_is_refused(inner):
    with pytest.raises(ConfigError, match="makes each client's batches in its own way"):
        PooledData(inner())


def test_the_pool_joins_samples_as_the_other_module_does_and_is_scored_on_the_downstream_task():
    class Marked(Own):
        def collate(self, samples):
            return {**super().collate(samples), "mark": torch.ones(len(samples))}

    data = Marked()
    pooled = PooledData(data)
    assert isinstance(pooled.client_dataset("pooled"), ConcatDataset)
    assert all("mark" in batch for batch in pooled.client_dataloader("pooled", chance()))
    assert_same(batches(pooled.client_val_dataloader("pooled")), batches(data.val_dataloader()))
    assert_same(batches(pooled.client_test_dataloader("pooled")), batches(data.test_dataloader()))


def test_a_pool_is_connected_as_what_is_in_it_is_and_leaves_that_alone():
    data = ToyData()
    data.key = "data.init_args"
    data.connect("tokenizer", "config", 5)
    pooled = PooledData(data)
    assert (pooled.tokenizer, pooled.model_config, pooled.seed) == ("tokenizer", "config", 5)
    assert data.key == pooled.key == "data.init_args"


def test_a_module_makes_its_own_batches_where_it_says_how():
    class Changed(DataWrapper):
        def client_dataloader(self, client_id, generator):
            return self.data.client_dataloader(client_id, generator)

    assert not ToyData().own_batches and Twice().own_batches and Changed(ToyData()).own_batches
    assert not Around(ToyData()).own_batches and Around(Twice()).own_batches
    assert not FlippedLabels(ToyData()).own_batches and FlippedLabels(Twice()).own_batches
    assert isinstance(ToyData().client_dataset("client-0"), Sequences)

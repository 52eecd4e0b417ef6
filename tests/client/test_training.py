"""Local training: from the tensors that a client receives to those that it sends."""

import gc
import weakref

import pytest
import torch
from test_trainer import started
from toy import ToyData, tiny_llama

from fedbe.algorithms import BlockExpansion, FedIT, Unfreeze
from fedbe.client.run import LocalRun
from fedbe.client.training import objects_of
from fedbe.expansion import freeze, set_training_modes
from fedbe.messages import Failure, Update
from fedbe.objectives import LocalObjective, Objective


@pytest.mark.parametrize("algorithm", [BlockExpansion([0, 2]), Unfreeze([1]), FedIT(rank=2)])
def test_exactly_what_a_client_trains_changes_and_modes_are_those_of_a_walk_over_the_model(algorithm):
    engine, tasks = started(algorithm=algorithm, model=tiny_llama(dropout=0.5))
    model, names = engine.plan.model, tasks[0].trainable_names
    before = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    update = engine.training.train(tasks[0])
    after = dict(model.named_parameters())
    assert {n for n in before if not torch.equal(before[n], after[n])} <= set(names) == set(update.tensors)
    modes = [(module, module.training) for module in model.modules()]
    trained = {name: parameter.requires_grad for name, parameter in after.items()}
    freeze(model, names)
    set_training_modes(model, names)
    assert modes == [(module, module.training) for module in model.modules()]
    assert trained == {name: parameter.requires_grad for name, parameter in after.items()}


def test_the_model_is_walked_once_for_all_clients(monkeypatch):
    engine, tasks = started()
    engine.training.train(tasks[0])
    index = engine.training.index
    counts = []
    named = type(engine.plan.model).named_parameters
    monkeypatch.setattr(
        type(engine.plan.model), "named_parameters", lambda *a, **o: counts.append(1) or named(*a, **o), raising=False
    )
    for task in tasks[1:]:
        engine.training.train(task)
    assert engine.training.index is index and not counts


def test_a_model_of_other_parts_is_seen_whoever_has_changed_it():
    engine, tasks = started()
    engine.training.train(tasks[0])
    index, model = engine.training.index, engine.plan.model
    norm = model.model.norm
    name = next(name for name, _ in model.named_parameters() if name == "model.norm.weight")
    model.model.norm.weight = torch.nn.Parameter(norm.weight.detach().clone(), requires_grad=True)
    update = engine.training.train(tasks[1])
    assert engine.training.index is not index
    assert not dict(model.named_parameters())[name].requires_grad
    assert isinstance(update, Update)


def test_all_parts_of_a_model_are_looked_at():
    model = tiny_llama()
    found = {id(part) for part in objects_of(model) if part is not None}
    assert found == {id(part) for part in (*model.modules(), *model.parameters())}


def test_a_client_that_fails_leaves_no_gradient_and_what_it_kept_before():
    class Broken(ToyData):
        def client_dataset(self, client_id):
            rows = super().client_dataset(client_id)
            rows.__class__ = type("Broken", (type(rows),), {"__getitem__": lambda rows, i: 1 / 0})
            return rows

    engine, tasks = started(data=Broken())
    outcome = engine.attempt(tasks[0])
    assert isinstance(outcome, Failure) and outcome.kind == "error" and "ZeroDivisionError" in outcome.reason
    assert outcome.structure == engine.training.structure
    assert all(parameter.grad is None for parameter in engine.plan.model.parameters())
    assert engine.kept(tasks[0]) == {}


def test_what_a_client_held_is_free_when_it_has_trained(monkeypatch):
    """And not when cycles around its Trainer are collected: a cohort's optimizer states would be there together."""
    held = []
    begun = LocalRun.__init__

    def noting(run, *arguments):
        begun(run, *arguments)
        held.append(weakref.ref(run))

    monkeypatch.setattr(LocalRun, "__init__", noting)
    optimizers = []

    def optimizer(parameters):
        optimizers.append(torch.optim.AdamW(parameters, lr=1e-2))
        return optimizers[-1]

    engine, tasks = started(optimizer=optimizer)
    gc.collect()
    gc.disable()
    try:
        for task in tasks:
            engine.training.train(task)
        assert len(held) == 4 and all(run() is None for run in held)
        assert all(not made.state for made in optimizers)
    finally:
        gc.enable()


class Counts(Objective):
    """Keeps how often a client has trained, and sends it."""

    def local(self, model, task, kept):
        return _Counted(kept)


class _Counted(LocalObjective):
    def __init__(self, kept):
        self.kept = kept

    def finish(self):
        count = {"count": self.kept.get("count", torch.zeros(())) + 1}
        return count, count


def test_what_an_objective_keeps_comes_back_to_it_from_the_round_that_the_client_goes_on_from():
    from dataclasses import replace

    engine, tasks = started(objective=Counts())
    first = engine.training.train(tasks[0])
    refused = engine.training.train(replace(tasks[0], round_index=1, resumes=0))
    again = engine.training.train(replace(tasks[0], round_index=2, resumes=0))
    fresh = engine.training.train(replace(tasks[1], round_index=2))
    counts = [update.extra["count"].item() for update in (first, refused, again, fresh)]
    assert counts == [1, 2, 2, 1]


def test_a_client_has_randomness_of_its_own_and_leaves_the_others_alone():
    engine, tasks = started(model=tiny_llama(dropout=0.5))
    torch.manual_seed(7)
    state = torch.get_rng_state()
    first = engine.training.train(tasks[1])
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    engine.training.train(tasks[0])
    second = engine.training.train(tasks[1])
    assert all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())

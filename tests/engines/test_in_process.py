"""What the engines of this process know and keep, besides how their clients train."""

from dataclasses import replace

import pytest
import torch
from toy import ToyData, toy_loop, toy_plan

from fedbe.algorithms import BlockExpansion, FedIT, FedSALoRA, LocalOnly
from fedbe.allocation import GivenFleet, Profile, SimulatedClock
from fedbe.client.plan import prepare_model
from fedbe.engines import Forked, InProcess, OnePass
from fedbe.engines.base import failure
from fedbe.engines.forked import check_workers
from fedbe.errors import ClientTimeoutError
from fedbe.evaluation.downstream import evaluate_downstream
from fedbe.messages import Evaluate, FitTask, structure_version
from fedbe.modeling.tensors import copy_tensors
from fedbe.traits import Trait

ENGINES = [InProcess, OnePass, *([] if check_workers(2, "") else [lambda: Forked(2)])]


def started(engine=None, **changes):
    plan = toy_plan(**changes)
    engine = engine or InProcess()
    engine.start(plan)
    inputs = next(iter(plan.data.val_dataloader()))
    prepare_model(plan, inputs)
    engine.prepared(inputs, plan.adaptation.structure())
    return engine


def task_of(engine, client, **changes):
    adaptation = engine.plan.adaptation
    state = copy_tensors(engine.plan.model, adaptation.state_names)
    received = engine.plan.topology.send(state)
    return FitTask(client, 0, 0, received, adaptation.trainable_names, structure=adaptation.structure(), **changes)


@pytest.mark.parametrize("make", ENGINES)
def test_clients_are_those_of_the_data_and_their_samples_are_counted(make):
    engine = started(make(), data=ToyData(clients=3, samples=(6, 10, 14)))
    assert list(engine.client_ids) == ["client-0", "client-1", "client-2"]
    assert engine.samples == {"client-0": 6, "client-1": 10, "client-2": 14}
    assert engine.available(0) is None and engine.capabilities is None
    assert Trait.SHARED_MEMORY in engine.offers


def test_samples_are_not_counted_before_somebody_asks():
    class OwnRowsOnly(ToyData):
        def client_dataset(self, client_id):
            assert client_id == "client-1"
            return super().client_dataset(client_id)

    engine = started(data=OwnRowsOnly())
    assert engine.attempt(task_of(engine, "client-1")).samples == 10


@pytest.mark.parametrize("make", ENGINES)
def test_what_clients_keep_is_seen_kept_and_continued(make):
    engine = started(make(), algorithm=FedSALoRA(rank=2))
    tasks = [task_of(engine, client) for client in engine.client_ids]
    outcomes = dict((task.client_id, outcome) for task, outcome in engine.fit(tasks))
    own = {name for name in tasks[0].trainable_names if ".lora_B." in name}
    for task in tasks:
        assert set(engine.peek(task, own)) == own and own.isdisjoint(outcomes[task.client_id].tensors)
        assert engine.peek(replace(task, round_index=1), own) == {} == engine.peek(task, ())
    accepted = dict.fromkeys(engine.client_ids, 0)
    other = started(make(), algorithm=FedSALoRA(rank=2))
    other.load_tensors(engine.tensors(accepted))
    third = started(make(), algorithm=FedSALoRA(rank=2))
    for task in tasks:
        third.restore_kept(task, engine.kept(task))
    following = [replace(task, round_index=1, resumes=0) for task in tasks]
    results = [[outcome for _, outcome in each.fit(following)] for each in (engine, other, third)]
    for first, second, last in zip(*results, strict=True):
        for name, tensor in first.tensors.items():
            assert torch.equal(tensor, second.tensors[name]) and torch.equal(tensor, last.tensors[name])


def test_a_run_without_anything_kept_needs_nothing_to_continue():
    engine = started()
    task = task_of(engine, "client-0")
    engine.attempt(task)
    assert engine.kept(task) == engine.tensors({"client-0": 0}) == engine.state_dict() == {}


@pytest.mark.parametrize("make", ENGINES)
def test_clients_score_models_of_their_own_and_the_resident_model_is_as_before(make):
    class OwnTest(ToyData):
        def client_test_dataloader(self, client_id):
            return self._eval_dataloader(self.client_dataset(client_id))

    engine = started(make(), algorithm=LocalOnly(BlockExpansion([1])), data=OwnTest())
    tasks = [task_of(engine, client) for client in engine.client_ids]
    list(engine.fit(tasks))
    model, names = engine.plan.model, engine.plan.adaptation.trainable_names
    before = copy_tensors(model, names)
    following = [replace(task, round_index=1, resumes=0) for task in tasks]
    found = list(engine.evaluate(Evaluate(task, "test") for task in following))
    assert all(torch.equal(tensor, before[name]) for name, tensor in copy_tensors(model, names).items())
    assert [score.client_id for score in found] == list(engine.client_ids)
    for task, score in zip(following, found, strict=True):
        engine.plan.topology.begin(
            model, engine.plan.adaptation, task, engine.peek(tasks[int(score.client_id[-1])], names)
        )
        expected = evaluate_downstream(model, engine.plan.data.client_test_dataloader(task.client_id))
        assert (score.accuracy, score.loss, score.items) == (expected.accuracy, expected.loss, expected.items)
        assert score.structure == structure_version(engine.plan.adaptation.structure())
    validation = list(engine.evaluate(Evaluate(task, "validation") for task in following))
    assert [score.loss for score in validation] != [score.loss for score in found]


def test_whoever_stops_asking_for_scores_leaves_the_model_as_before():
    engine = started(algorithm=LocalOnly(BlockExpansion([1])))
    task = task_of(engine, "client-0")
    engine.attempt(task)
    names = engine.plan.adaptation.trainable_names
    before = copy_tensors(engine.plan.model, names)
    scores = engine.evaluate([Evaluate(replace(task, received=before, resumes=0), "test")] * 2)
    next(scores)
    scores.close()
    assert all(torch.equal(t, before[n]) for n, t in copy_tensors(engine.plan.model, names).items())


def test_simulated_devices_are_counted_on_the_model_as_it_is():
    fleet = GivenFleet({}, Profile(1e9, 1e9, 1e6, 1e6))
    options = {
        "clock": SimulatedClock(fleet),
        "trainer": {"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": 2},
    }
    engine = started(algorithm=BlockExpansion([0]), **options)
    capabilities = engine.capabilities
    assert capabilities.steps == {"client-0": 2, "client-1": 4, "client-2": 4, "client-3": 6}
    assert list(capabilities.samples_per_step.values()) == [8, 4 * 3 / 2, 8, 4 * 5 / 3]  # the last step may be short
    assert engine.available(0) == list(engine.client_ids)
    larger = started(algorithm=BlockExpansion([0, 1, 2]), **options)
    first, second = (e.capabilities.cost(task_of(e, "client-0")) for e in (engine, larger))
    assert second.memory_bytes > first.memory_bytes and second.forward_flops > first.forward_flops


def test_the_model_s_seed_and_tokenizer_are_known_before_clients_probe():
    plan = toy_plan(seed=5, tokenizer="a tokenizer")
    InProcess().start(plan)
    assert plan.adaptation.seed == 5 and plan.adaptation.tokenizer == "a tokenizer"


def test_adapters_are_scored_and_trained_through_the_loop(tmp_path):
    loop = toy_loop(tmp_path / "run", algorithm=FedIT(rank=2), rounds=1)
    loop.run()
    assert set(loop.record.client_seconds) == set(loop.engine.client_ids)


def test_a_failure_says_in_one_line_of_limited_length_what_happened():
    assert failure("a", ClientTimeoutError("not\ndone")).record == {
        "client": "a", "kind": "timeout", "reason": "ClientTimeoutError: not done",
    }  # fmt: skip
    assert failure("a", MemoryError("no")).kind == "memory" and failure("a", OSError("gone"), "v").structure == "v"
    assert len(failure("a", ValueError("long " * 10_000)).reason) < 3000

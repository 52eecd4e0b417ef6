"""One table of properties that every algorithm without adapters has, with every objective and server optimizer."""

from itertools import chain, islice, repeat

import pytest
import torch
from toy import ToyData, adamw, resumed, tiny_llama, toy_loop
from transformers import AutoModelForCausalLM

from fedbe.aggregation import FedAdam, FedAvgM, FedYogi, Mean
from fedbe.algorithms import BlockExpansion, FedAvg, Unfreeze
from fedbe.callbacks import CheckpointCallback, CommunicationCallback
from fedbe.engines import InProcess
from fedbe.expansion import freeze, set_training_modes
from fedbe.federation import run_state
from fedbe.messages import Update, payload_bytes
from fedbe.modeling.tensors import copy_tensors
from fedbe.objectives import FedProx, Plain, Scaffold
from fedbe.seeding import derive_seed, generator, isolated_rng

ALGORITHMS = {
    "full": FedAvg,
    "unfreeze": lambda: Unfreeze([0, 2]),
    "expansion": lambda: BlockExpansion([0, 2]),
}
VARIANTS = {
    "plain": (Plain, Mean),
    "prox": (FedProx, Mean),
    "scaffold": (Scaffold, Mean),
    "momentum": (Plain, FedAvgM),
    "scaffold-adam": (Scaffold, FedAdam),
    "prox-yogi": (FedProx, FedYogi),
}
every_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS)
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def make(folder, algorithm, variant="plain", **changes):
    objective, server = (kind() for kind in VARIANTS[variant])
    options = {"rounds": 2, "optimizer": sgd if isinstance(objective, Scaffold) else adamw, **changes}
    return toy_loop(folder, algorithm=ALGORITHMS[algorithm](), objective=objective, server_optimizer=server, **options)


def started(loop):
    loop.setup()
    loop.folder.create({})
    return loop


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def snapshot(model):
    return {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def train_alone(loop, rounds, steps):
    """Plain PyTorch: the steps of the only client, nothing of a federation but its random numbers."""
    model, names = loop.model, loop.algorithm.adaptation.trainable_names
    freeze(model, names)
    set_training_modes(model, names)
    parameters = [model.get_parameter(name) for name in names]
    for round_index in range(rounds):
        who = ("client", 0, round_index, "client-0")
        optimizer = adamw(parameters)
        loader = loop.plan.data.client_dataloader("client-0", generator(0, "batches", *who))
        with isolated_rng(derive_seed(0, "modules", *who)):
            for batch in islice(chain.from_iterable(repeat(loader)), steps):
                optimizer.zero_grad()
                model(**batch, use_cache=False).loss.backward()
                optimizer.step()
    return copy_tensors(model, names)


@every_algorithm
def test_one_client_is_training_alone_to_the_bit(tmp_path, algorithm):
    options = {"model": tiny_llama(dropout=0.3), "data": ToyData(clients=1)}
    loop = make(tmp_path / "run", algorithm, **options)
    loop.run()
    alone = started(make(tmp_path / "alone", algorithm, **{**options, "model": tiny_llama(dropout=0.3)}))
    start = alone.server.state
    expected = train_alone(alone, rounds=2, steps=3)
    assert_same(expected, loop.server.state)
    assert any(not torch.equal(start[name], expected[name]) for name in start)


class Shuffled(InProcess):
    """Runs the clients in another order, and returns their updates in the order of the cohort."""

    def fit(self, tasks):
        tasks = list(tasks)
        updates = {i: self.training.train(tasks[i]) for i in (2, 0, 3, 1)}
        yield from ((task, updates[i]) for i, task in enumerate(tasks))


@every_algorithm
@every_variant
def test_the_order_of_clients_is_irrelevant_and_what_is_frozen_stays(tmp_path, algorithm, variant):
    engines = zip("ab", (InProcess(), Shuffled()), strict=True)
    loop, other = (started(make(tmp_path / name, algorithm, variant, engine=engine)) for name, engine in engines)
    before = snapshot(loop.model)
    for _ in range(2):
        loop.advance()
        other.advance()
    assert_same(run_state.tensors(loop), run_state.tensors(other))
    after, trained = snapshot(loop.model), set(loop.algorithm.adaptation.trainable_names)
    assert_same(
        {n: t for n, t in before.items() if n not in trained}, {n: after[n] for n in before if n not in trained}
    )
    assert any(not torch.equal(before[name], after[name]) for name in trained)


class Fixed(InProcess):
    """Sends the same tensors for every client, each moved by as much, and no control variates."""

    def __init__(self, change=0.0):
        self.change = change

    def fit(self, tasks):
        for samples, task in enumerate(tasks, start=3):
            tensors = {name: tensor + self.change for name, tensor in task.received.items()}
            yield task, Update(task.client_id, tensors, samples, {"seconds": 0.0})


@every_algorithm
@every_variant
def test_clients_that_take_no_step_change_nothing(tmp_path, algorithm, variant):
    loop = started(make(tmp_path / "run", algorithm, variant, engine=Fixed()))
    before, model = dict(loop.server.state), snapshot(loop.model)
    loop.advance()
    assert not loop.record.failures
    assert_same(before, loop.server.state)
    assert_same(model, snapshot(loop.model))


@every_algorithm
def test_the_aggregate_of_equal_updates_is_that_update(tmp_path, algorithm):
    loop = started(make(tmp_path / "run", algorithm, engine=Fixed(0.1)))
    update = {name: tensor + 0.1 for name, tensor in loop.server.state.items()}
    loop.advance()
    assert not loop.record.failures
    assert_same(update, loop.server.state)


@every_algorithm
@every_variant
def test_bytes_are_those_of_the_tensors_sent(tmp_path, algorithm, variant):
    loop = make(tmp_path / "run", algorithm, variant, rounds=1, callbacks=[CommunicationCallback()])
    summary = loop.run()
    sent = 4 * payload_bytes(loop.server.state.values())
    expected = 2 * sent if variant.startswith("scaffold") else sent
    assert summary["bytes_up"] == summary["bytes_down"] == expected > 0


@every_algorithm
def test_the_export_is_a_plain_model_equal_to_the_one_evaluated(tmp_path, algorithm):
    loop = make(tmp_path / "run", algorithm, rounds=1)
    assert loop.run()["model"]["plain"]
    exported = AutoModelForCausalLM.from_pretrained(loop.folder.model).eval()
    ids = loop.plan.data.test_dataset().rows
    with torch.inference_mode():
        assert torch.equal(exported(ids).logits, loop.model.eval()(ids).logits)


@every_algorithm
@pytest.mark.parametrize("variant", ["plain", "scaffold-adam", "prox-yogi"])
def test_a_run_continues_from_its_checkpoint_to_the_same_tensors(tmp_path, algorithm, variant):
    def loop_in(name):
        return make(tmp_path / name, algorithm, variant, cohort=2, callbacks=[CheckpointCallback()])

    whole, half = started(loop_in("whole")), started(loop_in("half"))
    whole.advance()
    whole.advance()
    half.advance()
    rest = resumed(loop_in("half"))
    rest.advance()
    assert_same(run_state.tensors(whole), run_state.tensors(rest))

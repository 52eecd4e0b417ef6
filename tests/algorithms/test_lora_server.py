"""What servers of LoRA methods accept, keep from round to round, and share with clients that are elsewhere."""

from dataclasses import replace

import pytest
import torch
from lora_tools import (
    MERGING,
    METHODS,
    MIXED_RANKS,
    Place,
    acted,
    build,
    distance,
    effective,
    identical,
    nudge,
    per_client,
    ready,
)

from fedbe.adaptation.adapters import Adapters
from fedbe.algorithms import (
    FedExLoRA,
    FedIT,
    FedSALoRA,
    FFALoRA,
    FlexLoRA,
    FLoRA,
    Gated,
    HetLoRA,
    LocalOnly,
    LoRA,
    SLoRA,
)
from fedbe.errors import Facts, UpdateError
from fedbe.messages import Failure, FitTask, payload_bytes
from fedbe.seeding import generator
from fedbe.storage.checkpoint import load_tensors, save_tensors
from fedbe.traits import Trait

JOINT = (*MIXED_RANKS, FedExLoRA)
SMALL = {"rank": 1}  # several rounds before the change is larger than a weight


def named(methods):
    return pytest.mark.parametrize("method", methods, ids=lambda method: method.__name__)


def another(task):
    return 50 + per_client(task)


def saved(place, path):
    """What a checkpoint holds of a server, as it comes back from disk."""
    save_tensors(path, place.server.tensors(), place.server.state_dict())
    return load_tensors(path)


def continued(method, path, place):
    tensors, state = saved(place, path)
    again = Place(build(method, **SMALL))
    again.server.load_state_dict(state, tensors)
    return again


# --- the history of the base's change ---------------------------------------------------------------------------------


@named(MERGING)
def test_a_continued_server_sends_and_computes_what_an_undisturbed_one_does(tmp_path, method):
    whole = Place(build(method, **SMALL))
    for index in range(5):
        again = continued(method, tmp_path / f"{index}.safetensors", whole)
        sent, sent_again = (place.strategy.send(place.server.state, "client-0") for place in (whole, again))
        assert identical(sent, sent_again)
        assert payload_bytes(sent.values()) == payload_bytes(sent_again.values())
        terms = index * (2 if method is FLoRA else 1)  # as long as they are smaller than a weight of 16 x 16
        assert any(name.endswith(".left") for name in sent) == (0 < 32 * terms < 256)
        again.advance(index, nudge(per_client), clients=2)
        whole.advance(index, nudge(per_client), clients=2)
        assert identical(whole.server.state, again.server.state)


@named(MERGING)
def test_a_round_that_is_taken_back_finds_the_history_of_its_beginning(tmp_path, method):
    straight, place = Place(build(method, **SMALL)), Place(build(method, **SMALL))
    for index in range(2):
        straight.advance(index, nudge(per_client))
        place.advance(index, nudge(per_client))
    before = dict(place.server.state)
    place.advance(2, nudge(another))
    place.server.restore(before)
    expected = straight.strategy.send(straight.server.state, "client-0")
    assert any(name.endswith(".left") for name in expected)
    assert identical(place.strategy.send(place.server.state, "client-0"), expected)
    again = continued(method, tmp_path / "back.safetensors", place)
    assert identical(again.strategy.send(again.server.state, "client-0"), expected)
    for other in (place, straight, again):
        other.advance(3, nudge(per_client))
    assert identical(place.server.state, straight.server.state)
    assert identical(again.server.state, straight.server.state)


@named(MERGING)
def test_a_round_whose_result_never_becomes_the_state_leaves_the_history_alone(method):
    straight, place = Place(build(method, **SMALL)), Place(build(method, **SMALL))
    for other in (straight, place):
        other.advance(0, nudge(per_client))
    place.round(1, nudge(another))  # as where the mean is not finite
    expected = straight.strategy.send(straight.server.state, "client-0")
    assert identical(place.strategy.send(place.server.state, "client-0"), expected)
    for other in (straight, place):
        other.advance(2, nudge(per_client))
    assert identical(place.server.state, straight.server.state)


@named(MERGING)
def test_the_history_belongs_to_values_and_any_other_state_is_sent_whole(method):
    place, client = Place(build(method, **SMALL)), Place(build(method, **SMALL))
    states = [dict(place.server.state)]
    for index in range(3):
        place.advance(index, nudge(per_client), clients=2)
        states.append(dict(place.server.state))
    place.server.restore({name: tensor.clone() for name, tensor in place.server.state.items()})
    assert any(name.endswith(".left") for name in place.strategy.send(place.server.state, "client-0"))
    place.server.restore(states[1])  # two rounds back
    weights = set(place.adaptation.weight_names)
    (task, *_) = place.tasks(3)
    assert weights <= task.received.keys()
    acted(client, task, {})
    assert all(torch.equal(client.model.get_parameter(name), states[1][name]) for name in weights)
    place.server.restore(states[0])
    assert not weights & place.strategy.send(place.server.state, "client-0").keys()


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(place, update, *words):
    """The aggregator refuses an update with these words, and takes nothing in."""
    before = place.strategy.aggregator(place.server.state)
    with pytest.raises(UpdateError) as raised:
        before.check(update)
    assert all(word in str(raised.value) for word in words), str(raised.value)
    assert identical(before.result(), place.server.state)


def unpruned(method):
    """Options with which a client has one rank."""
    return {"decay": 1.0} if method is HetLoRA else {}


def with_tensor(update, name, tensor):
    return replace(update, tensors={**update.tensors, name: tensor})


@named(JOINT)
def test_an_incomplete_set_of_factors_is_refused_and_the_round_goes_on(method):
    place, other = Place(build(method)), Place(build(method))
    tasks = place.tasks(0)
    updates = [acted(place, task, {}, nudge(per_client))[0] for task in tasks]
    for missing in place.adaptation.factor_names:
        part = {name: tensor for name, tensor in updates[0].tensors.items() if name != missing}
        refused(place, replace(updates[0], tensors=part), "'client-0'", repr(missing))
        with pytest.raises(UpdateError):
            place.server.receive(tasks[0], replace(updates[0], tensors=part))
    other.tasks(0)
    for task, update in list(zip(tasks, updates, strict=True))[1:]:
        place.server.receive(task, update)
        other.server.receive(task, update)
    assert identical(place.server.step(), other.server.step())


@named(JOINT)
def test_a_factor_of_another_shape_type_or_value_is_refused_with_client_and_tensor(method):
    place = Place(build(method, **unpruned(method)))
    (task, *_) = place.tasks(0)
    update, _ = acted(place, task, {}, nudge(per_client))
    for adapter in (place.adaptation.adapters[0], place.adaptation.adapters[-1]):
        for name, dim in ((adapter.a, 0), (adapter.b, 1)):
            tensor = update.tensors[name]
            wrong = {
                "a rank less": tensor.narrow(dim, 0, tensor.shape[dim] - 1),
                "a rank more": torch.cat([tensor, tensor.narrow(dim, 0, 1)], dim=dim),
                "a side less": tensor.narrow(1 - dim, 0, 15),
                "no sides": torch.tensor(1.0),
                "not finite": tensor / 0,
                "too large": tensor.sign() * 1e9 + 1e9,
                "another type": tensor.double(),
            }
            for values in wrong.values():
                refused(place, with_tensor(update, name, values), "'client-0'", repr(name))
    refused(place, with_tensor(update, "more", torch.zeros(1)), "'client-0'", "'more'")
    weight = place.adaptation.weight_names[0]
    refused(place, with_tensor(update, weight, torch.zeros(16, 16)), "'client-0'", repr(weight))
    refused(place, replace(update, samples=0), "'client-0'", "0 samples")


@named([method for method in METHODS if method not in JOINT])
def test_methods_that_average_refuse_other_shapes_types_and_values(method):
    place = Place(build(method))
    (task, *_) = place.tasks(0)
    update, _ = acted(place, task, {}, nudge(per_client))
    for name, tensor in update.tensors.items():
        for values in (tensor[:-1], tensor / 0, tensor.double(), torch.tensor(1.0)):
            refused(place, with_tensor(update, name, values), "'client-0'", repr(name))


@named(MIXED_RANKS)
def test_a_client_must_send_the_rank_that_it_was_announced_with(method):
    place = Place(build(method, ranks={"client-0": 1, "client-1": 2}, **unpruned(method)))
    tasks = place.tasks(0)
    first = place.adaptation.adapters[0].a
    for task, rank in zip(tasks, (1, 2, 4), strict=True):
        update, _ = acted(place, task, {}, nudge(per_client))
        assert update.tensors[first].shape[0] == rank
        place.strategy.aggregator(place.server.state).check(update)
        for other in {1, 2, 3, 4} - {rank}:
            tensors = place.adaptation.cut(place.adaptation.pad(update.tensors), other)
            refused(place, replace(update, tensors=tensors), repr(task.client_id), repr(first), f"rank {other}")


def test_a_hetlora_client_may_send_its_rank_or_what_is_left_of_it_when_it_prunes():
    place = Place(build(HetLoRA, decay=0.5))
    (task, *_) = place.tasks(0)
    update, _ = acted(place, task, {}, nudge(per_client))
    cut = {rank: replace(update, tensors=place.adaptation.cut(update.tensors, rank)) for rank in (1, 2, 3, 4)}
    for rank in (2, 4):
        place.strategy.aggregator(place.server.state).check(cut[rank])
    for rank in (1, 3):
        refused(place, cut[rank], "'client-0'", "expected 4 or 2")
    place.server.receive(task, cut[2])
    assert place.strategy.rank_of("client-0") == 2
    refused(place, cut[4], "'client-0'", "expected 2 or 1")


@named(METHODS)
def test_clients_apart_send_nothing_and_nothing_changes(method):
    if method in (FLoRA, FedSALoRA):
        assert LocalOnly(build(method)).check("algorithm.init_args", Facts(depth=2))
        return
    place = Place(LocalOnly(build(method)))
    _, updates, new = place.round(0, nudge(per_client))
    assert not any(update.tensors for update in updates)
    assert identical(new, place.server.state)


# --- server and clients in different places ---------------------------------------------------------------------------


@named(METHODS)
def test_a_client_elsewhere_needs_nothing_but_its_task_and_what_it_kept(method):
    options = {"sparse_rounds": 2} if method is SLoRA else {"decay": 0.5} if method is HetLoRA else {}
    options |= {"ranks": {"client-0": 1, "client-1": 2}} if method in MIXED_RANKS else {}
    server = Place(build(method, **options))
    clients = {f"client-{k}": Place(build(method, **options)) for k in range(3)}
    kept = {client: {} for client in clients}

    @torch.no_grad()
    def change(model, task):
        nudge(per_client)(model, task)
        if method is HetLoRA and task.round_index == 1:  # the tail shrinks: all prune
            for name in server.adaptation.factor_names:
                model.get_parameter(name).mul_(0.1)

    for index in range(4):
        for task in server.tasks(index):
            own = kept[task.client_id]
            here, kept_here = acted(server, task, own, change)
            there, kept[task.client_id] = acted(clients[task.client_id], task, own, change)
            assert identical(here.tensors, there.tensors)
            assert identical(kept_here, kept[task.client_id])
            server.server.receive(task, there)
        server.server.restore(server.server.step())
    assert method is not HetLoRA or server.strategy.rank_of("client-1") == 1


def test_fedsa_averages_the_b_that_a_simulation_sees_and_elsewhere_leaves_it_at_zero():
    seen, unseen = Place(build(FedSALoRA)), Place(build(FedSALoRA))
    assert seen.strategy.peeked_names == {adapter.b for adapter in seen.adaptation.adapters}
    expected = dict.fromkeys(seen.strategy.peeked_names, 0.0)
    for place in (seen, unseen):
        for task in place.tasks(0):
            update, kept = acted(place, task, {}, nudge(per_client))
            place.server.receive(task, update, kept if place is seen else None)
            if place is seen:
                expected = {n: total + update.samples / 32 * kept[n].double() for n, total in expected.items()}
        place.server.restore(place.server.step())
    for name, mean in expected.items():
        torch.testing.assert_close(seen.server.state[name].double(), mean, rtol=1e-5, atol=1e-6)
        assert not unseen.server.state[name].any()
    a = [adapter.a for adapter in seen.adaptation.adapters]
    assert all(torch.equal(seen.server.state[name], unseen.server.state[name]) for name in a)


def test_a_fedsa_client_that_sends_its_b_is_refused():
    place = Place(build(FedSALoRA))
    (task, *_) = place.tasks(0)
    update, kept = acted(place, task, {}, nudge(per_client))
    for name in kept:
        with pytest.raises(UpdateError, match=f"'client-0' sent '{name}'"):
            place.server.receive(task, with_tensor(update, name, kept[name]))
    assert identical(place.server.step(), place.server.state)


# --- adapters among other parts ---------------------------------------------------------------------------------------


def gated(method, **options):
    return Gated(build(method, first_block=1, **options), sequences=4, sequence_length=8)


@named([FedIT, FFALoRA, FlexLoRA, HetLoRA, SLoRA])
def test_what_is_not_the_adapters_is_sent_and_averaged_by_samples(method):
    alone, place = Place(build(method, first_block=1)), Place(gated(method))
    gate = place.adaptation.parts[1].trainable_names
    assert gate and not set(gate) & set(alone.server.state)
    # The gate is nudged last, so that the adapters get the same noise as without it.
    for index in range(2):
        alone.advance(index, nudge(per_client))
        tasks, updates = place.advance(index, nudge(per_client))
        assert all(set(gate) <= task.received.keys() for task in tasks)
        for name in gate:
            mean = sum(u.samples / 32 * u.tensors[name].double() for u in updates)
            torch.testing.assert_close(place.server.state[name].double(), mean, rtol=1e-5, atol=1e-6)
        assert identical({n: t for n, t in place.server.state.items() if n not in gate}, alone.server.state)


# --- the client's side ------------------------------------------------------------------------------------------------


def task_of(place, client="client-0", index=0):
    (task,) = [task for task in place.tasks(index) if task.client_id == client]
    return task


def test_hetlora_s_penalty_is_that_of_the_rank_received():
    place = Place(build(HetLoRA, decay=0.5, penalty=3.0, ranks={"client-0": 1, "client-1": 2}))
    place.advance(0, nudge(per_client))
    for client, start, end in (("client-1", 1, 2), ("client-2", 2, 4)):
        task = task_of(place, client)
        place.adaptation.begin(place.model, task, {})
        pairs = [(task.received[x.b], task.received[x.a]) for x in place.adaptation.adapters]
        tail = sum(b[:, start:end].norm() * a[start:end].norm() for b, a in pairs)
        assert place.adaptation.added_loss(place.model, task)().item() == pytest.approx(3 * tail.item())
    # One rank is the least, and a client apart has received none: nothing is added.
    for task in (task_of(place), FitTask("client-2", 0, 0, {}, place.adaptation.trainable_names)):
        assert place.adaptation.added_loss(place.model, task) is None


def test_a_hetlora_client_trains_on_its_penalty(tmp_path):
    loop = ready(tmp_path / "run", HetLoRA, options={"decay": 0.5, "penalty": 10.0})
    loop.engine.act(nudge(per_client))
    loop.advance()
    task = loop.server.task("client-1", 0, 1, tuple(loop.algorithm.adaptation.units()))
    update = loop.engine.training.train(task)
    loop.algorithm.adaptation.begin(loop.model, task, {})
    batch = next(iter(loop.plan.data.client_dataloader("client-1", generator(0, "batches", *task.purpose))))
    pairs = [(task.received[x.b], task.received[x.a]) for x in loop.algorithm.adaptation.adapters]
    tail = sum(b[:, 2:].norm() * a[2:].norm() for b, a in pairs).item()
    assert tail > 0.1
    with torch.no_grad():
        assert update.metrics["first_loss"] == pytest.approx(loop.model(**batch).loss.item() + 10 * tail, rel=1e-6)


@named(MIXED_RANKS)
def test_a_client_that_fails_leaves_the_global_model_as_it_was(tmp_path, method, monkeypatch):
    loop = ready(tmp_path / "run", method, options={"ranks": {"client-0": 1}})
    loop.advance()
    before = effective(loop.model)

    def unreadable(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(loop.plan.data, "client_dataloader", unreadable)
    task = loop.server.task("client-0", 0, 1, tuple(loop.algorithm.adaptation.units()))
    assert isinstance(loop.engine.attempt(task), Failure)
    loop.server.restore(loop.server.state)
    assert distance(effective(loop.model), before) == 0


def test_an_slora_client_that_fails_lets_all_gradients_through_again():
    place = Place(build(SLoRA))
    place.adaptation.begin(place.model, task_of(place), {})
    place.adaptation.leave(place.model)
    weight = place.model.get_parameter(place.adaptation.weight_names[0])
    weight.sum().backward()
    assert weight.grad.all()


def test_traits_say_what_goes_with_each_method():
    needs = {
        FedIT: {Trait.EQUAL_SHAPES}, FFALoRA: {Trait.EQUAL_SHAPES}, LoRA: {Trait.EQUAL_SHAPES},
        FLoRA: {Trait.PLAIN_MEAN}, FlexLoRA: {Trait.PLAIN_MEAN}, HetLoRA: {Trait.PLAIN_MEAN},
        FedExLoRA: {Trait.PLAIN_MEAN, Trait.EQUAL_SHAPES}, FedSALoRA: {Trait.PLAIN_MEAN, Trait.EQUAL_SHAPES},
        SLoRA: {Trait.PLAIN_MEAN, Trait.EQUAL_SHAPES},
    }  # fmt: skip
    lacks = {
        FedIT: set(), FFALoRA: set(), LoRA: set(), FlexLoRA: set(),
        HetLoRA: {Trait.COPIED_IN_AND_OUT}, SLoRA: {Trait.COPIED_IN_AND_OUT},
        FedSALoRA: {Trait.COPIED_IN_AND_OUT, Trait.GLOBAL_MODEL},
        FedExLoRA: {Trait.COPIED_IN_AND_OUT, Trait.UNCHANGED_BASE},
        FLoRA: {Trait.COPIED_IN_AND_OUT, Trait.UNCHANGED_BASE, Trait.LASTING_TENSORS},
    }  # fmt: skip
    for method in needs:
        algorithm = method()
        assert algorithm.needs == needs[method], method
        assert frozenset(Trait) - algorithm.offers == lacks[method], method
        mixed = method(ranks=[1, 2])
        assert frozenset(Trait) - mixed.offers == lacks[method] | {Trait.EQUAL_SHAPES, Trait.COPIED_IN_AND_OUT}
        assert method(export="adapter").needs == needs[method] | {Trait.UNCHANGED_BASE}


def test_adapters_that_override_a_client_s_begin_or_end_are_not_copied():
    class Own(Adapters):
        def begin(self, model, task, kept):
            super().begin(model, task, kept)

    assert Trait.COPIED_IN_AND_OUT in Adapters().offers
    assert Trait.COPIED_IN_AND_OUT not in Own().offers

"""A federation over bytes: clients with models and rows of their own come to what clients in this process come to."""

import threading
import time
from dataclasses import replace
from itertools import chain

import pytest
import torch
from toy import ToyData, adamw, tiny_llama, toy_plan

from fedbe.algorithms import BlockExpansion, FedIT, FedSALoRA, Gated, LocalOnly, Unfreeze
from fedbe.client.plan import prepare_model
from fedbe.client.schedule import Schedule
from fedbe.engines import InProcess
from fedbe.engines.loopback import LoopbackChannel
from fedbe.engines.remote import RemoteClient, RemoteEngine, framed, number_of, unframed
from fedbe.errors import ConfigError
from fedbe.messages import (
    Evaluate,
    Evaluation,
    Failure,
    Farewell,
    FitTask,
    Greeting,
    Prepare,
    Prepared,
    Probe,
    ProbeReport,
    Update,
    structure_version,
)
from fedbe.modeling.tensors import copy_tensors, load_tensors
from fedbe.objectives import Anchor, FedProx, Plain, Scaffold
from fedbe.prefix import PrefixReuse
from fedbe.storage.checkpoint import fingerprint
from fedbe.traits import Trait

CLIENTS = ("client-0", "client-1", "client-2", "client-3")


class OwnRows(ToyData):
    """Has the training rows of one client and no others, and what its model is scored on."""

    def __init__(self, client_id):
        super().__init__()
        self.client_id, self._rows = client_id, None

    def setup_client(self, client_id):
        assert client_id == self.client_id
        self._rows = super().client_dataset(client_id)

    @property
    def client_ids(self):
        return [self.client_id]

    def client_dataset(self, client_id):
        assert client_id == self.client_id and self._rows is not None
        return self._rows


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


CASES = {
    "blocks": lambda: {"algorithm": BlockExpansion([0, 2]), "trainer": {"gradient_clip_val": 0.1}},
    "existing blocks": lambda: {"algorithm": Unfreeze([1]), "schedule": Schedule("cosine", 2, "run")},
    "dropout": lambda: {"model": tiny_llama(dropout=0.5)},
    "adapters": lambda: {"algorithm": FedIT(rank=2)},
    "adapters of one's own": lambda: {"algorithm": FedSALoRA(rank=2)},
    "a gate": lambda: {"algorithm": Gated(BlockExpansion([1]), sequences=4, sequence_length=8)},
    "alone": lambda: {"algorithm": LocalOnly(BlockExpansion([1]))},
    "proximal": lambda: {"objective": FedProx(0.5)},
    "control variates": lambda: {"algorithm": Unfreeze([1]), "objective": Scaffold(), "optimizer": sgd},
    "anchored": lambda: {"objective": Anchor(sequences=6, sequence_length=8)},
    "a prefix": lambda: {"algorithm": BlockExpansion([2]), "prefix": PrefixReuse(gib=0.001)},
}


def remote_clients(make, clients=CLIENTS, data=OwnRows, **changes):
    """Clients, each with everything of its own."""
    return [RemoteClient(replace(toy_plan(**make(), data=data(client)), **changes), client) for client in clients]


def federation(make, engine):
    """A plan on the server, its engine started and everything prepared; and its global state."""
    options = make()
    plan = toy_plan(**options)
    engine.start(plan)
    inputs = {name: rows[:2] for name, rows in next(iter(plan.data.val_dataloader())).items()}
    prepare_model(plan, inputs)
    engine.prepared(inputs, plan.adaptation.structure())
    state = copy_tensors(plan.model, plan.adaptation.state_names)
    plan.objective.setup(state, len(CLIENTS))
    return plan, state


def tasks_of(plan, state, number, resumes=None, clients=CLIENTS):
    names = plan.adaptation.trainable_names
    received, structure = plan.topology.send(state), plan.adaptation.structure()
    return [
        FitTask(client, 0, number, received, names, plan.objective.send(names), structure, resumes)
        for client in clients
    ]


def two_rounds(make, engine):
    """All that clients send in two rounds, the mean of which is the next state, and how their models score then."""
    plan, state = federation(make, engine)
    sent = []
    for number in (0, 1):
        outcomes = [outcome for _, outcome in engine.fit(tasks_of(plan, state, number, number - 1 if number else None))]
        sent.append(outcomes)
        for outcome in outcomes:
            assert isinstance(outcome, Update), outcome
            plan.objective.check_update(outcome)
            plan.objective.receive(outcome)
        for name in outcomes[0].tensors:
            state[name] = torch.stack([outcome.tensors[name] for outcome in outcomes]).mean(0)
        plan.objective.step()
        load_tensors(plan.model, state)
    requests = [Evaluate(task, "test") for task in tasks_of(plan, state, 2, resumes=1)]
    return sent, list(engine.evaluate(requests))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES)
def test_clients_come_to_what_they_come_to_in_one_process_to_the_bit(case):
    expected, expected_scores = two_rounds(CASES[case], InProcess())
    engine = RemoteEngine(LoopbackChannel(remote_clients(CASES[case])), CLIENTS)
    try:
        found, scores = two_rounds(CASES[case], engine)
    finally:
        engine.close()
    for first, second in zip(chain(*expected), chain(*found), strict=True):
        assert (first.client_id, first.samples, first.structure) == (second.client_id, second.samples, second.structure)
        assert {**first.metrics, "seconds": 0} == {**second.metrics, "seconds": 0}
        for part in ("tensors", "extra"):
            ours, theirs = getattr(first, part), getattr(second, part)
            assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert scores == expected_scores and len(scores) == 4


def test_a_client_reuses_what_its_own_frozen_blocks_compute_and_the_server_holds_none():
    clients = remote_clients(CASES["a prefix"])
    server = RemoteEngine(LoopbackChannel(clients), CLIENTS)
    two_rounds(CASES["a prefix"], server)
    server.close()
    figures = server.prefix.figures
    assert figures["known"] == 0 and figures["bytes"] == 2 * 12 * 16 * 4  # two validation rows, its own
    for client in clients:
        figures = client.engine.prefix.figures
        assert figures["blocks"] == 3 and figures["known"] > 0 and figures["bytes"] > 0


def test_clients_say_who_they_are_and_what_stays_with_them_is_not_seen():
    make = CASES["adapters of one's own"]
    channel = LoopbackChannel(reversed(remote_clients(make)))
    engine = RemoteEngine(channel, 4)
    plan, state = federation(make, engine)
    assert engine.client_ids == list(CLIENTS)
    assert engine.samples == {"client-0": 6, "client-1": 10, "client-2": 14, "client-3": 18}
    [(task, update), *_] = engine.fit(tasks_of(plan, state, 0))
    assert update.bytes_up > 0 and engine.peek(task, plan.adaptation.trainable_names) == engine.kept(task) == {}
    assert engine.tensors({"client-0": 0}) == {} and engine.capabilities is None
    assert Trait.SHARED_MEMORY not in engine.offers
    assert set(engine.available(0)) == set(CLIENTS)
    engine.close()
    assert engine.available(0) == [] and not [t for t in threading.enumerate() if t.name.startswith("client-")]


def test_clients_probe_the_base_model_where_they_are():
    def make():
        from fedbe.algorithms import FedBE

        return {"algorithm": FedBE()}

    engine, here = RemoteEngine(LoopbackChannel(remote_clients(make)), CLIENTS), InProcess()
    engine.start(toy_plan(**make()))
    here.start(toy_plan(**make()))
    reports = engine.probe(["client-2", "client-0"])
    assert reports == here.probe(["client-2", "client-0"])
    assert all(isinstance(report, ProbeReport) for report in reports)
    engine.close()


def test_a_client_grows_its_model_when_a_task_says_so_and_renames_what_it_keeps(monkeypatch):
    make = CASES["alone"]
    [client] = remote_clients(make, ("client-0",))
    engine = RemoteEngine(LoopbackChannel([client]), ("client-0",))
    plan, state = federation(make, engine)
    [(_, first)] = engine.fit(tasks_of(plan, state, 0, clients=("client-0",)))
    name = plan.adaptation.trainable_names[0]
    seen = []

    def grow(model, structure, inputs=None):
        seen.append((structure, {name: len(rows) for name, rows in inputs.items()}))
        client.plan.adaptation.structure = lambda: structure
        return {name: f"new {name}"}

    monkeypatch.setattr(client.plan.adaptation, "grow", grow, raising=False)
    kept_before = client.engine.memory.get("client-0", 0).tensors
    larger = {**plan.adaptation.structure(), "more": 1}
    task = replace(tasks_of(plan, state, 1, 0, ("client-0",))[0], structure=larger)
    [(_, outcome)] = engine.fit([task])
    assert seen == [(larger, {"input_ids": 2, "labels": 2})]
    assert client.engine.memory.get("client-0", 0).tensors.keys() == {
        f"new {other}" if other == name else other for other in kept_before
    }
    assert outcome.structure == structure_version(larger) != first.structure
    engine.close()


def test_a_client_that_comes_again_builds_its_model_with_its_next_task():
    make = CASES["blocks"]
    channel = LoopbackChannel(remote_clients(make))
    engine = RemoteEngine(channel, CLIENTS)
    plan, state = federation(make, engine)
    [task, *_] = tasks_of(plan, state, 0)
    [(_, first)] = engine.fit([task])
    [again] = remote_clients(make, ("client-0",))
    channel.run(again)
    [(_, second)] = engine.fit([task])
    assert again.engine.memory is not None and again.plan.adaptation.structure() == task.structure
    assert all(torch.equal(tensor, second.tensors[name]) for name, tensor in first.tensors.items())
    engine.close()


# --- clients that are not what they should be ------------------------------------------------------------------------


class Scripted:
    """A client by hand: for each request what it sends, or nothing."""

    def __init__(self, channel, name, answers, base, samples=5):
        self.end = channel.connect(name)
        self.name, self.answers = name, answers
        self.requests = []
        self.end.send(framed(0, Greeting(name, samples, base)))
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self):
        while (data := self.end.receive(10**9)) is not None:
            number, request = number_of(data), unframed(data, 10**9)
            self.requests.append(request)
            if isinstance(request, Farewell):
                return
            for sent in self.answers(number, request):
                self.end.send(sent)


def by_hand(answers, **options):
    """A server and one client by hand, which has been asked to train once; and what came of it."""
    plan = toy_plan()
    channel = LoopbackChannel()
    client = Scripted(channel, "a", answers, fingerprint(plan.model))
    engine = RemoteEngine(channel, ("a",), **options)
    engine.start(plan)
    [(_, outcome)] = engine.fit([FitTask("a", 0, 0, {}, ())])
    return engine, client, outcome


GOOD = Update("a", {"w": torch.ones(2)}, 3)
ANSWERS = {
    "good": (lambda number, request: [framed(number, GOOD)], None),
    "its own failure": (lambda n, r: [framed(n, Failure("a", "memory", "too\nlittle"))], ("memory", "too little")),
    "no message": (lambda n, r: [n.to_bytes(8, "big") + b"garbage"], ("update", "not a message")),
    "nothing": (lambda n, r: [n.to_bytes(8, "big")], ("update", "not a message")),
    "another kind": (lambda n, r: [framed(n, Evaluation("a", 1.0, 0.0, 1))], ("update", "sent a Evaluation")),
    "another's name": (lambda n, r: [framed(n, replace(GOOD, client_id="b"))], ("update", "sent a Update")),
    "another's failure": (lambda n, r: [framed(n, Failure("b", "error", "x"))], ("update", "sent a Failure")),
    "a greeting": (lambda n, r: [framed(n, Greeting("a", 1, ""))], ("update", "sent a Greeting")),
    "a request": (lambda n, r: [framed(n, r)], ("update", "sent a FitTask")),
}


@pytest.mark.parametrize("what", ANSWERS)
def test_an_answer_that_is_none_is_the_client_s_failure(what):
    answers, expected = ANSWERS[what]
    engine, _, outcome = by_hand(answers, answer_seconds=60.0)
    if expected is None:
        assert torch.equal(outcome.tensors["w"], GOOD.tensors["w"])
    else:
        assert isinstance(outcome, Failure) and outcome.client_id == "a"
        assert outcome.kind == expected[0] and expected[1] in outcome.reason and "\n" not in outcome.reason
    engine.close()


@pytest.mark.parametrize(
    "answers",
    [
        lambda number, request: [],
        lambda number, request: [b"", b"short", bytes(8), framed(0, GOOD)],
        lambda number, request: [framed(number + 1, GOOD), framed(10**6, GOOD)],
        lambda number, request: [number.to_bytes(8, "big") + bytes(2000)],
    ],
    ids=["silence", "no number", "another number", "too large"],
)
def test_a_client_that_does_not_answer_in_time_has_failed_and_the_others_have_not(answers):
    plan = toy_plan()
    channel = LoopbackChannel()
    base = fingerprint(plan.model)
    Scripted(channel, "slow", answers, base)
    Scripted(channel, "swift", lambda n, r: [framed(n, replace(GOOD, client_id="swift"))], base)
    engine = RemoteEngine(channel, ("slow", "swift"), answer_seconds=0.5, most_bytes=1000)
    engine.start(plan)
    started = time.monotonic()
    outcomes = dict((t.client_id, o) for t, o in engine.fit([FitTask(c, 0, 0, {}, ()) for c in ("slow", "swift")]))
    assert time.monotonic() - started < 5
    assert outcomes["slow"].kind == "timeout" and "0.5 s" in outcomes["slow"].reason
    assert isinstance(outcomes["swift"], Update)
    engine.close()


def test_an_answer_that_comes_too_late_is_not_taken_for_the_next_one():
    late = []

    def answers(number, request):
        late.append(number)
        if len(late) == 1:
            return []
        return [framed(late[0], replace(GOOD, samples=1)), framed(number, replace(GOOD, samples=2))]

    engine, _, first = by_hand(answers, answer_seconds=0.3)
    assert first.kind == "timeout"
    engine.answer_seconds = 60.0
    [(_, second)] = engine.fit([FitTask("a", 0, 1, {}, ())])
    assert second.samples == 2
    engine.close()


def test_nobody_answers_for_another():
    plan = toy_plan()
    channel = LoopbackChannel()
    base = fingerprint(plan.model)
    Scripted(channel, "a", lambda n, r: [], base)
    Scripted(channel, "b", lambda n, r: [framed(n - 1, GOOD), framed(n, replace(GOOD, client_id="b"))], base)
    engine = RemoteEngine(channel, ("a", "b"), answer_seconds=0.5)
    engine.start(plan)
    outcomes = [outcome for _, outcome in engine.fit([FitTask(c, 0, 0, {}, ()) for c in ("a", "b")])]
    assert isinstance(outcomes[0], Failure) and isinstance(outcomes[1], Update)
    engine.close()


def test_a_client_that_goes_or_is_not_there_has_failed():
    def answers(number, request):
        client.end.gone.set()
        return []

    plan = toy_plan()
    channel = LoopbackChannel()
    client = Scripted(channel, "a", answers, fingerprint(plan.model))
    engine = RemoteEngine(channel, ("a",))
    engine.start(plan)
    reasons = [o.reason for _ in range(2) for _, o in engine.fit([FitTask("a", 0, 0, {}, ())])]
    assert reasons == ["has gone", "is not there"] and engine.available(0) == []


def test_a_run_begins_with_all_clients_or_not_at_all():
    plan = toy_plan()
    channel = LoopbackChannel()
    base = fingerprint(plan.model)
    Scripted(channel, "a", None, base)
    Scripted(channel, "b", None, "another base model")
    Scripted(channel, "c", None, base, samples=0)
    Scripted(channel, "stranger", None, base)
    with pytest.raises(ConfigError, match="b, c"):
        RemoteEngine(channel, ("a", "b", "c"), greeting_seconds=0.5).start(plan)
    with pytest.raises(ConfigError, match="2 of 2"):
        RemoteEngine(LoopbackChannel(), 2, greeting_seconds=0.1).start(plan)


def test_nobody_takes_the_place_of_a_client_that_is_there():
    plan = toy_plan()
    channel = LoopbackChannel()
    base = fingerprint(plan.model)
    Scripted(channel, "a", lambda n, r: [framed(n, GOOD)], base)
    other = channel.connect("elsewhere")
    engine = RemoteEngine(channel, ("a",))
    engine.start(plan)
    other.send(framed(0, Greeting("a", 1000, base)))
    [(_, outcome)] = engine.fit([FitTask("a", 0, 0, {}, ())])
    assert isinstance(outcome, Update) and engine.samples == {"a": 5}
    engine.close()


def test_a_client_that_cannot_prepare_its_model_or_probe_ends_the_run_before_it_begins():
    plan = toy_plan()
    channel = LoopbackChannel()
    Scripted(channel, "a", lambda n, r: [framed(n, Failure("a", "error", "no room"))], fingerprint(plan.model))
    engine = RemoteEngine(channel, ("a",))
    engine.start(plan)
    for ask in (lambda: engine.probe(["a"]), lambda: engine.prepared({}, {"positions": [1]})):
        with pytest.raises(ConfigError, match="no room"):
            ask()
    engine.prepared({}, {"positions": [2]}, {"old": "new"})  # clients learn of it with their tasks
    engine.close()


def test_a_client_that_cannot_score_its_model_is_left_out():
    plan = toy_plan()
    channel = LoopbackChannel()
    base = fingerprint(plan.model)
    Scripted(channel, "a", lambda n, r: [framed(n, Failure("a", "error", "no data"))], base)
    Scripted(channel, "b", lambda n, r: [framed(n, Evaluation("b", 0.5, 1.0, 8))], base)
    engine = RemoteEngine(channel, ("a", "b"))
    engine.start(plan)
    scores = list(engine.evaluate([Evaluate(FitTask(c, 0, 0, {}, ()), "test") for c in ("a", "b")]))
    assert [score.client_id for score in scores] == ["b"]
    engine.close()


# --- the client's side -----------------------------------------------------------------------------------------------


@pytest.fixture
def client():
    [client] = remote_clients(CASES["blocks"], ("client-0",))
    client.start()
    return client


def test_a_client_says_what_it_cannot_do(client):
    structure, unknown = {"positions": [1]}, {"no": "such structure"}
    assert isinstance(client.answer(Prepare("client-0", structure)), Prepared)
    names = client.plan.adaptation.trainable_names
    requests = {
        "is for 'other'": Probe("other"),
        "nothing that a client is asked": Greeting("client-0", 1, ""),
        "has no value to start from": FitTask("client-0", 0, 0, {}, names, structure=structure),
    }
    for said, request in requests.items():
        answer = client.answer(request)
        assert isinstance(answer, Failure) and answer.client_id == "client-0", answer
        assert said in answer.reason
    assert isinstance(client.answer(Prepare("client-0", unknown)), Failure)


def test_a_client_answers_bytes_that_are_no_message_and_goes_on(client):
    number = 3
    for data in (number.to_bytes(8, "big"), number.to_bytes(8, "big") + b"garbage"):
        answer = client._answer_to(data)
        assert number_of(answer) == number and isinstance(unframed(answer, 10**6), Failure)
    client.most_bytes = 10
    assert isinstance(unframed(client._answer_to(framed(number, Probe("client-0"))), 10**6), Failure)
    client.most_bytes = 10**6
    assert client._answer_to(framed(0, Farewell("client-0"))) is None


def test_a_client_has_only_its_rows(client):
    data = client.plan.data
    assert data.client_ids == ["client-0"] and len(data.client_dataset("client-0")) == 6
    with pytest.raises(AssertionError):
        data.client_dataset("client-1")


def test_by_default_a_client_loads_everything():
    class Loads(ToyData):
        stages = ()

        def setup(self, stage):
            self.stages = (*self.stages, stage)

    data = Loads()
    RemoteClient(toy_plan(data=data), "client-1").start()
    assert data.stages == ("fit",)


def test_plain_is_the_objective_where_none_is_given():
    plan = toy_plan(optimizer=adamw)
    assert type(plan.objective) is Plain

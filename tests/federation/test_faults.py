import time
from dataclasses import replace

import pytest
import torch
from toy import ToyData, resumed, toy_loop

from fedbe.aggregation import (
    CoordinateMedian,
    FedAvgM,
    Krum,
    Mean,
    NormClipping,
    PrivateMean,
    SampleWeighted,
    TrimmedMean,
)
from fedbe.algorithms import BlockExpansion
from fedbe.callbacks import CheckpointCallback, FaultInjection, RollbackGuard
from fedbe.callbacks.faults import CORRUPTIONS
from fedbe.engines import InProcess
from fedbe.errors import Facts, QuorumError
from fedbe.federation.callback import FederatedCallback
from fedbe.federation.cohort import CohortSampler
from fedbe.federation.quorum import Quorum


class Troubled(ToyData):
    """One client's data does something else than give samples."""

    def __init__(self, trouble, **options):
        super().__init__(**options)
        self.trouble = trouble

    def client_dataset(self, client_id):
        rows = super().client_dataset(client_id)
        if client_id == "client-1":
            rows.__class__ = type("Rows", (type(rows),), {"__getitem__": lambda rows, index: self.trouble()})
        return rows


def raising(error):
    def trouble():
        raise error

    return trouble


def without_client_1(tmp_path, **options):
    """The same run in which that client is never asked."""

    class Others(CohortSampler):
        def sample(self, *arguments):
            return [client for client in super().sample(*arguments) if client != "client-1"]

    loop = toy_loop(tmp_path / "reference", **options)
    loop.round.sampler = Others("all", 0)
    loop.run()
    return loop


@pytest.mark.parametrize(
    ("trouble", "kind", "said"),
    [
        (raising(OSError("the file is gone")), "error", "the file is gone"),
        (raising(MemoryError()), "memory", "MemoryError"),
        (raising(torch.OutOfMemoryError("CUDA out of memory")), "memory", "out of memory"),
        (raising(RuntimeError("DefaultCPUAllocator: can't allocate memory")), "memory", "can't allocate"),
    ],
)
def test_a_client_that_fails_costs_its_own_round_and_nothing_else(tmp_path, trouble, kind, said):
    loop = toy_loop(tmp_path / "run", data=Troubled(trouble))
    loop.run()
    for record in loop.history[1:]:
        [failure] = record["failures"]
        assert failure["client"] == "client-1" and failure["kind"] == kind and said in failure["reason"]
    reference = without_client_1(tmp_path)
    assert all(torch.equal(reference.server.state[name], loop.server.state[name]) for name in loop.server.state)
    assert all(parameter.grad is None for parameter in loop.model.parameters())


def test_a_client_that_takes_too_long_is_left_out(tmp_path):
    def slow():
        time.sleep(0.2)
        row = torch.arange(12)
        return {"input_ids": row, "labels": row}

    loop = toy_loop(tmp_path / "run", rounds=1, data=Troubled(slow), timeout_seconds=1.0)
    loop.run()
    [failure] = loop.record.failures
    assert failure["kind"] == "timeout" and "not done after 1 s" in failure["reason"]


@pytest.mark.parametrize("kind", ["error", "timeout", "memory", "nan", "infinity", "shape", "dtype", "name",
                                  "zero_weight", "negative_weight"])  # fmt: skip
def test_an_injected_fault_is_named_and_leaves_the_others_result(tmp_path, kind):
    fault = FaultInjection(kind, clients=["client-1"])
    assert fault.check("k", Facts()) == []
    loop = toy_loop(tmp_path / "run", callbacks=[fault])
    loop.run()
    [failure] = loop.record.failures
    assert failure["client"] == "client-1"
    assert failure["kind"] == (kind if kind in ("error", "timeout", "memory") else "update")
    reference = without_client_1(tmp_path)
    assert all(torch.equal(reference.server.state[name], loop.server.state[name]) for name in loop.server.state)


def test_faults_come_by_round_and_by_chance_and_follow_from_the_seed(tmp_path):
    def failures(name, **options):
        loop = toy_loop(tmp_path / name, rounds=3, callbacks=[FaultInjection("error", **options)])
        loop.run()
        return [[failure["client"] for failure in record["failures"]] for record in loop.history[1:]]

    assert failures("a", rounds=[2], clients=["client-0"]) == [[], ["client-0"], []]
    by_chance = failures("b", probability=0.3)
    assert by_chance == failures("c", probability=0.3) and 0 < sum(map(len, by_chance)) < 12


def test_wrong_arguments_of_a_fault_are_named():
    problems = FaultInjection("gremlin", probability=0.0, factor=-1).check("k", Facts())
    assert [problem.key for problem in problems] == ["k.kind", "k.probability", "k.factor"]


def test_below_the_quorum_others_take_the_place_of_those_that_failed(tmp_path):
    first = toy_loop(tmp_path / "a", rounds=1, cohort=2, data=ToyData(clients=6))
    first.run()
    cohort = first.record.cohort
    fault = FaultInjection("error", clients=cohort)
    loop = toy_loop(
        tmp_path / "b", rounds=1, cohort=2, data=ToyData(clients=6), callbacks=[fault], quorum=Quorum(least=1.0)
    )
    loop.run()
    assert loop.record.cohort[:2] == cohort and len(set(loop.record.cohort)) == 4
    assert loop.record.allocation.keys() == set(loop.record.cohort)
    assert [failure["client"] for failure in loop.record.failures] == cohort
    assert any(not torch.equal(loop.server.state[n], first.server.state[n]) for n in loop.server.state)


@pytest.mark.parametrize("below", ["replace", "stop"])
def test_without_a_quorum_the_run_ends_with_each_reason_and_can_be_continued(tmp_path, below):
    def make(faulty_round):
        fault = FaultInjection("error", clients=["client-0", "client-2"], rounds=[faulty_round])
        quorum = Quorum(least=3, below=below)
        return toy_loop(tmp_path / "run", rounds=3, quorum=quorum, callbacks=[CheckpointCallback(), fault])

    loop = make(2)
    with pytest.raises(QuorumError, match=r"round 2 has no quorum, 2 of 4 clients failed:\n  - client-0: error, inj"):
        loop.run()
    rest = resumed(make(99))
    while not rest.done:
        rest.advance()
    whole = toy_loop(tmp_path / "whole", rounds=3)
    whole.run()
    assert all(torch.equal(whole.server.state[name], rest.server.state[name]) for name in whole.server.state)


def test_within_the_quorum_nobody_is_replaced(tmp_path):
    fault = FaultInjection("error", clients=["client-0", "client-2"])
    loop = toy_loop(tmp_path / "run", rounds=1, callbacks=[fault], quorum=Quorum(least=0.5))
    loop.run()
    assert len(loop.record.cohort) == 4


@pytest.mark.parametrize("least", [0, -1, 0.0, 1.5, True])
def test_a_quorum_out_of_range_is_named(least):
    assert [problem.key for problem in Quorum(least=least).check("federation.quorum", Facts())] == [
        "federation.quorum.least"
    ]


ATTACKS = [("sign_flip", 10.0), ("scaled", 50.0), ("random", 50.0)]
RULES = [CoordinateMedian(), TrimmedMean(0.2), Krum(1), Krum(1, take=3), NormClipping(3.0)]


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """Test loss without an attack, and under each attack without a defence."""

    def loss(name, averaging, *callbacks):
        path = tmp_path_factory.mktemp("attack") / name
        data = ToyData(clients=5, samples=(16, 16, 16, 16, 16))
        data.rows = lambda step, count, purpose: ToyData.rows(data, 0, count, f"{purpose} {step}")
        trainer = {"max_steps": 8}
        loop = toy_loop(path, rounds=3, data=data, averaging=averaging, callbacks=callbacks, trainer=trainer)
        return loop.run()["downstream"]["loss"]

    attacks = {kind: FaultInjection(kind, clients=["client-2"], factor=factor) for kind, factor in ATTACKS}
    bare = {kind: loss(f"bare-{kind}", SampleWeighted(), attack) for kind, attack in attacks.items()}
    return loss, attacks, loss("clean", SampleWeighted()), bare


@pytest.mark.parametrize("kind", [kind for kind, _ in ATTACKS])
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__ + str(vars(rule)))
def test_an_attack_that_spoils_the_mean_does_less_to_a_robust_rule(losses, rule, kind):
    loss, attacks, clean, bare = losses
    assert bare[kind] > clean + 0.1, "the attack must do harm"
    defended = loss(f"{type(rule).__name__}-{kind}", rule, attacks[kind])
    assert defended - clean < 0.5 * (bare[kind] - clean)


def test_every_corruption_changes_what_is_sent(tmp_path):
    for kind in CORRUPTIONS:
        assert FaultInjection(kind).check("k", Facts()) == []


class Explodes(FederatedCallback):
    """Multiplies what one round has learned."""

    def __init__(self, number, factor):
        self.number, self.factor = number, factor

    def on_client_update(self, loop, task, update):
        if loop.record.round != self.number:
            return None
        return CORRUPTIONS["scaled"](update, loop.state, self.factor, torch.Generator())


@pytest.mark.parametrize(
    ("number", "options"), [(5, {"loss_rise": None}), (2, {"norm_ratio": None, "loss_rise": 0.02})]
)
def test_a_round_that_goes_wrong_is_taken_back_with_the_server_s_moments(tmp_path, number, options):
    guard = RollbackGuard(**options)
    assert guard.check("k", Facts()) == []
    optimizer = FedAvgM(momentum=0.1) if number == 2 else Mean()
    seen = {}

    class Watch(FederatedCallback):
        def on_round_start(self, loop):
            seen[loop.record.round] = (dict(loop.state), optimizer.state_dict())

    callbacks = [Explodes(number, -3e4), guard, Watch()]
    options = {"callbacks": callbacks, "server_optimizer": optimizer, "trainer": {"max_steps": 8}}
    loop = toy_loop(tmp_path / "run", rounds=6, **options)
    loop.run()
    backs = {record["round"]: record["rolled_back"] for record in loop.history}
    assert backs[number] is not None
    assert all(torch.equal(seen[number][0][n], seen[number + 1][0][n]) for n in loop.server.state)
    assert all(torch.equal(seen[number][1][n], seen[number + 1][1][n]) for n in seen[number][1])
    assert bool(seen[number][1]) == (number == 2)
    assert backs[number + 1] is None


def test_a_guard_ends_a_run_that_only_goes_wrong(tmp_path):
    class Always(Explodes):
        def on_client_update(self, loop, task, update):
            self.number = max(2, loop.record.round)
            return super().on_client_update(loop, task, update)

    guard = RollbackGuard(loss_rise=0.02, norm_ratio=None, patience=2)
    loop = toy_loop(tmp_path / "run", rounds=9, callbacks=[Always(2, -30.0), guard], trainer={"max_steps": 8})
    assert "2 rounds in a row were taken back" in loop.run()["stop_reason"]
    assert loop.progress.completed == 3


def test_private_training_learns_and_reports_epsilon(tmp_path):
    pytest.importorskip("dp_accounting")
    rule = PrivateMean(bound=1.0, noise_multiplier=0.01)
    loop = toy_loop(tmp_path / "run", rounds=3, averaging=rule, algorithm=BlockExpansion([0, 2]))
    summary = loop.run()
    assert summary["downstream"]["loss"] < summary["downstream_base"]["loss"]
    epsilons = [record["averaging"]["epsilon"] for record in loop.history[1:]]
    assert epsilons == sorted(epsilons) and epsilons[0] > 0


class Boasts(FederatedCallback):
    """Has one client report more samples than there are."""

    def on_client_update(self, run, task, update):
        return replace(update, samples=10**12) if task.client_id == "client-1" else update


def test_no_client_counts_for_more_samples_than_it_can_have_seen(tmp_path):
    honest = toy_loop(tmp_path / "honest")
    boasting = toy_loop(tmp_path / "boasting", callbacks=[Boasts()])
    honest.run()
    boasting.run()
    assert [record["averaging"] for record in boasting.history[1:]] == [{"capped_samples": 1}] * 2
    assert [record["averaging"] for record in honest.history[1:]] == [{}] * 2
    assert boasting.history[-1]["downstream"] == honest.history[-1]["downstream"]


class TwoThere(InProcess):
    """Of all clients two are there."""

    def available(self, round_index):
        return self.client_ids[:2]


def test_epsilon_counts_who_was_there_and_who_took_another_s_place(tmp_path):
    def rounds(name, **options):
        rule = PrivateMean(bound=1.0, noise_multiplier=1.0)
        options = {"callbacks": [CheckpointCallback()], "cohort": 1, "averaging": rule} | options
        toy_loop(tmp_path / name, **options).run()
        told = rule.state_dict()
        assert resumed(toy_loop(tmp_path / name, **options)).averaging.state_dict() == told
        return told["rounds"]

    pytest.importorskip("dp_accounting")
    clients = len(toy_loop(tmp_path / "none").plan.data.client_ids)
    assert rounds("all there") == [[1, clients, 2]]
    assert rounds("two there", engine=TwoThere()) == [[1, 2, 2]]
    # Three of four are asked, and one that fails is replaced by the fourth.
    failing = FaultInjection("nan", clients=["client-0"])
    callbacks = [CheckpointCallback(), failing]
    assert rounds("replaced", cohort=3, quorum=Quorum(3), callbacks=callbacks) == [[4, 4, 2]]

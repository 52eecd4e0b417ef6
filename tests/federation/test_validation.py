"""Whatever a client sends costs at most its own round: the run goes on as if the client had failed, to the bit."""

import math
from dataclasses import replace

import pytest
import torch
from toy import toy_loop

from fedbe.aggregation import CoordinateMedian, FedAdam, HolderMean, Krum, NormClipping, PrivateMean, TrimmedMean
from fedbe.algorithms import (
    BlockExpansion,
    FedAvg,
    FedBE,
    FedExLoRA,
    FedIT,
    FedSALoRA,
    FFALoRA,
    FlexLoRA,
    FLoRA,
    HetLoRA,
    LocalOnly,
    SLoRA,
)
from fedbe.federation.callback import FederatedCallback, Phase
from fedbe.messages import Failure, Update
from fedbe.objectives import Scaffold

EVIL = "client-1"


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


RUNS = {
    "blocks": lambda: {},
    "full": lambda: {"algorithm": FedAvg()},
    "fedbe": lambda: {"algorithm": FedBE(probe_batches=1)},
    "fedit": lambda: {"algorithm": FedIT(rank=2, dropout=0.0)},
    "ffa": lambda: {"algorithm": FFALoRA(rank=2)},
    "flora": lambda: {"algorithm": FLoRA(rank=2)},
    "hetlora": lambda: {"algorithm": HetLoRA(rank=2, ranks={"client-0": 1})},
    "flexlora": lambda: {"algorithm": FlexLoRA(rank=2, ranks={"client-0": 1})},
    "fedex": lambda: {"algorithm": FedExLoRA(rank=2)},
    "slora": lambda: {"algorithm": SLoRA(rank=2, sparse_rounds=1, density=0.1)},
    "fedsa": lambda: {"algorithm": FedSALoRA(rank=2)},
    "scaffold": lambda: {"objective": Scaffold(), "optimizer": sgd},
    "median": lambda: {"averaging": CoordinateMedian()},
    "trimmed": lambda: {"averaging": TrimmedMean(0.3)},
    "krum": lambda: {"averaging": Krum()},
    "clipped": lambda: {"averaging": NormClipping(1.0)},
    "private": lambda: {"averaging": PrivateMean(1.0, reproducible=True)},
    "fedadam": lambda: {"server_optimizer": FedAdam()},
}


def of_tensors(change):
    return lambda update: replace(update, tensors={name: change(t) for name, t in update.tensors.items()})


def of_first(change):
    def changed(update):
        name = next(iter(update.tensors))
        return replace(update, tensors={**update.tensors, name: change(update.tensors[name])})

    return changed


MALFORMED = {
    "no update": lambda update: "hello",
    "a dictionary": lambda update: dict(update.tensors),
    "another client's name": lambda update: replace(update, client_id="client-0"),
    "samples as text": lambda update: replace(update, samples="12"),
    "samples as a list": lambda update: replace(update, samples=[12]),
    "no samples": lambda update: replace(update, samples=None),
    "samples as NaN": lambda update: replace(update, samples=math.nan),
    "samples as a fraction": lambda update: replace(update, samples=1.5),
    "true samples": lambda update: replace(update, samples=True),
    "zero samples": lambda update: replace(update, samples=0),
    "negative samples": lambda update: replace(update, samples=-3),
    "2^63 samples": lambda update: replace(update, samples=2**63),
    "2^70 samples": lambda update: replace(update, samples=2**70),
    "metrics as text": lambda update: replace(update, metrics={**update.metrics, "loss": "low"}),
    "metrics as nothing": lambda update: replace(update, metrics=None),
    "metrics as a list": lambda update: replace(update, metrics=[1.0]),
    "a metric as a tensor": lambda update: replace(update, metrics={"loss": torch.zeros(2)}),
    "no tensors": lambda update: replace(update, tensors={}),
    "tensors as nothing": lambda update: replace(update, tensors=None),
    "tensors as a list": lambda update: replace(update, tensors=list(update.tensors.values())),
    "tensors under numbers": lambda update: replace(update, tensors=dict(enumerate(update.tensors.values()))),
    "nothing as a tensor": of_first(lambda tensor: None),
    "a list as a tensor": of_first(lambda tensor: tensor.tolist()),
    "a sparse tensor": of_first(lambda tensor: tensor.to_sparse()),
    "a meta tensor": of_first(lambda tensor: tensor.to("meta")),
    "a complex tensor": of_first(lambda tensor: tensor.to(torch.complex64)),
    "a truth value as a tensor": of_first(lambda tensor: tensor > 0),
    "another type": of_tensors(lambda tensor: tensor.double()),
    "whole numbers": of_first(lambda tensor: tensor.long()),
    "another shape": of_first(lambda tensor: tensor.flatten()[:-1]),
    "one dimension more": of_first(lambda tensor: tensor[None]),
    "no dimension": of_first(lambda tensor: torch.tensor(1.0)),
    "an empty tensor": of_first(lambda tensor: tensor[:0]),
    "NaN": of_first(lambda tensor: torch.full_like(tensor, math.nan)),
    "one NaN": of_first(lambda tensor: tensor.flatten().index_fill(0, torch.tensor([0]), math.nan).view_as(tensor)),
    "infinity": of_first(lambda tensor: torch.full_like(tensor, math.inf)),
    "3e38": of_tensors(lambda tensor: torch.full_like(tensor, 3e38)),
    "minus 3e38": of_tensors(lambda tensor: torch.full_like(tensor, -3e38)),
    "1e20": of_first(lambda tensor: torch.full_like(tensor, 1e20)),
    "an unknown name": lambda update: replace(update, tensors={f"{n}_": t for n, t in update.tensors.items()}),
    "a frozen tensor's name": lambda update: replace(
        update, tensors={**update.tensors, "model.norm.weight.": torch.ones(16)}
    ),
    "extra that nobody asked for": lambda update: replace(update, extra={**update.extra, "x": torch.ones(2)}),
    "extra as nothing": lambda update: replace(update, extra=None),
    "another structure": lambda update: replace(update, structure="0123456789abcdef"),
    "a structure as a number": lambda update: replace(update, structure=7),
}


class Sends(FederatedCallback):
    """Puts something else in the place of one client's update in round 1, as an engine or a callback might."""

    phase = Phase.GUARD

    def __init__(self, change):
        self.change, self.ended, self.failed = change, [], []

    def on_client_update(self, run, task, update):
        if task.client_id == EVIL and task.round_index == 0:
            return self.change(update)
        return None

    def on_client_end(self, run, task, update):
        self.ended.append((task.client_id, task.round_index))

    def on_client_failure(self, run, task, failure):
        self.failed.append((task.client_id, task.round_index, failure.kind))


def ran(folder, run, change):
    callback = Sends(change)
    loop = toy_loop(folder, rounds=2, callbacks=[callback], trainer={"max_steps": 2}, **RUNS[run]())
    loop.run()
    return loop, callback


@pytest.fixture(scope="module")
def left_out(tmp_path_factory):
    known = {}

    def state(run):
        if run not in known:
            folder = tmp_path_factory.mktemp("failed") / "run"
            known[run] = ran(folder, run, lambda update: Failure(EVIL, "error", "gone"))[0].server.state
        return known[run]

    return state


KINDS_OF_ONE = sorted(MALFORMED)  # all of them against one run, and a few that algorithms look into against all
INTO_ALGORITHMS = ["no update", "another shape", "another type", "NaN", "3e38", "2^63 samples", "an unknown name",
                   "metrics as text", "nothing as a tensor", "no dimension", "an empty tensor"]  # fmt: skip


def check(folder, run, kind, left_out):
    loop, callback = ran(folder, run, MALFORMED[kind])
    assert callback.failed == [(EVIL, 0, "update")]
    assert (EVIL, 0) not in callback.ended and (EVIL, 1) in callback.ended
    (failure,) = loop.history[1]["failures"]
    assert failure["client"] == EVIL and failure["kind"] == "update" and EVIL in failure["reason"]
    expected = left_out(run)
    assert loop.server.state.keys() == expected.keys()
    assert all(torch.equal(loop.server.state[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("kind", KINDS_OF_ONE)
def test_a_malformed_update_costs_its_client_the_round_and_nothing_else(tmp_path, kind, left_out):
    check(tmp_path / "run", "blocks", kind, left_out)


@pytest.mark.slow
@pytest.mark.parametrize("kind", INTO_ALGORITHMS)
@pytest.mark.parametrize("run", sorted(RUNS.keys() - {"blocks"}))
def test_whatever_the_algorithm_and_the_averaging_rule(tmp_path, run, kind, left_out):
    check(tmp_path / "run", run, kind, left_out)


@pytest.mark.parametrize("run", ["fedit", "ffa", "flora", "hetlora", "flexlora", "fedex"])
def test_a_missing_factor_is_refused_or_harmless_and_never_ends_the_run(tmp_path, run):
    def without_one(update):
        return replace(update, tensors=dict(list(update.tensors.items())[:-1]))

    loop, callback = ran(tmp_path / "run", run, without_one)
    assert loop.progress.completed == 2
    assert not callback.failed or callback.failed == [(EVIL, 0, "update")]


def test_a_control_variate_of_another_shape_is_refused(tmp_path, left_out):
    def reshaped(update):
        name = next(iter(update.extra))
        return replace(update, extra={**update.extra, name: update.extra[name].flatten()[:-1]})

    loop, callback = ran(tmp_path / "run", "scaffold", reshaped)
    assert callback.failed == [(EVIL, 0, "update")]
    assert all(torch.equal(loop.server.state[n], t) for n, t in left_out("scaffold").items())


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_that_the_objective_refuses_is_not_in_the_mean(tmp_path, left_out, value):
    def poisoned(update):
        return replace(update, extra={name: torch.full_like(t, value) for name, t in update.extra.items()})

    loop, callback = ran(tmp_path / "run", "scaffold", poisoned)
    assert callback.failed == [(EVIL, 0, "update")] and (EVIL, 0) not in callback.ended
    assert all(torch.equal(loop.server.state[n], t) for n, t in left_out("scaffold").items())


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
def test_an_update_whose_report_the_strategy_refuses_is_not_in_the_mean(tmp_path, left_out, value):
    def poisoned(update):
        norms = {name: value if name.startswith("gradient_norm/") else v for name, v in update.metrics.items()}
        assert norms != update.metrics
        return replace(update, metrics=norms)

    loop, callback = ran(tmp_path / "run", "fedbe", poisoned)
    if callback.failed:
        assert callback.failed == [(EVIL, 0, "update")] and (EVIL, 0) not in callback.ended
        assert all(torch.equal(loop.server.state[n], t) for n, t in left_out("fedbe").items())
    else:
        assert value == -1.0


def test_a_mean_of_opposite_extremes_never_becomes_the_state(tmp_path):
    class Extremes(FederatedCallback):
        def on_client_update(self, run, task, update):
            sign = 1 if task.client_id == "client-0" else -1
            huge = {name: torch.full_like(t, sign * 3e38) for name, t in update.tensors.items()}
            return replace(update, tensors=huge) if task.client_id in ("client-0", EVIL) else None

    loop = toy_loop(tmp_path / "run", rounds=2, callbacks=[Extremes()])
    loop.run()
    assert all(torch.isfinite(t).all() for t in loop.server.state.values())
    assert {f["client"] for record in loop.history for f in record["failures"]} == {"client-0", EVIL}


def test_an_average_that_is_not_finite_takes_the_round_back_and_says_so(tmp_path):
    class Overflowing(FedAdam):
        def step(self, state, mean, trained):
            new = super().step(state, mean, trained)
            return {name: t * math.inf for name, t in new.items()} if self.rounds_left() else new

        def rounds_left(self):
            self.left = getattr(self, "left", 1) - 1
            return self.left >= 0

    loop = toy_loop(tmp_path / "run", rounds=2, server_optimizer=Overflowing())
    loop.run()
    assert "not finite" in loop.history[1]["rolled_back"]["reason"]
    assert loop.history[1]["downstream"] == loop.history[0]["downstream"]
    assert loop.history[2]["rolled_back"] is None and loop.history[2]["downstream"] != loop.history[0]["downstream"]


def test_a_client_that_sends_what_another_was_given_to_train_is_refused(tmp_path):
    class OneBlock(BlockExpansion):
        def __init__(self):
            super().__init__([0, 2])
            strategy = self.strategy
            strategy.allocate = lambda cohort, round_index: {
                client: ("block_0",) if client == EVIL else ("block_0", "block_1") for client in cohort
            }

    class SendsBoth(FederatedCallback):
        def on_client_update(self, run, task, update):
            return replace(update, tensors=dict(run.state)) if task.client_id == EVIL else None

    loop = toy_loop(tmp_path / "run", rounds=1, algorithm=OneBlock(), callbacks=[SendsBoth()])
    loop.run()
    (failure,) = loop.history[1]["failures"]
    assert failure["client"] == EVIL and "was not given to train" in failure["reason"]


def test_local_training_that_sends_nothing_is_no_failure(tmp_path):
    loop = toy_loop(tmp_path / "run", rounds=1, algorithm=LocalOnly(BlockExpansion([1])))
    loop.run()
    assert loop.history[1]["failures"] == [] and loop.history[1]["bytes"]["up"] == 0


def test_an_aggregator_that_refuses_takes_nothing_in():
    state = {"a": torch.zeros(2), "b": torch.zeros(2)}
    mean = HolderMean(state)
    good = Update("x", {"a": torch.ones(2), "b": torch.ones(2)}, 3)
    mean.check(good)
    mean.add(good)
    with pytest.raises(Exception, match="client 'y' sent 'b'"):
        mean.check(Update("y", {"a": torch.ones(2), "b": torch.ones(3)}, 5))
    assert all(torch.equal(tensor, torch.ones(2)) for tensor in mean.result().values())

import json

import pytest
import torch
from toy import toy_loop

from fedbe.aggregation import FedAvgM, Mean
from fedbe.callbacks import EarlyStopping, KeepBest, RetentionCallback, RollbackGuard
from fedbe.callbacks.faults import CORRUPTIONS
from fedbe.errors import Facts
from fedbe.evaluation import GeneralTask, TaskScore
from fedbe.federation.callback import FederatedCallback


class Explodes(FederatedCallback):
    """Multiplies what a round has learned."""

    def __init__(self, *rounds, factor=-30.0):
        self.rounds, self.factor = rounds, factor

    def on_client_update(self, run, task, update):
        if run.record.round not in self.rounds:
            return None
        return CORRUPTIONS["scaled"](update, run.state, self.factor, torch.Generator())


class Drift(GeneralTask):
    """Falls with the distance to the base model."""

    name = "drift"

    def prepare(self, model, tokenizer, seed):
        self.base = None

    def evaluate(self, model):
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.arange(12)[None]).logits
        self.base = logits if self.base is None else self.base
        return TaskScore(1 / (1 + (logits - self.base).abs().mean().item()), 0.0)


def guarded(tmp_path, *callbacks, guard=None, **options):
    guard = guard or RollbackGuard(norm_ratio=None, loss_rise=0.02)
    loop = toy_loop(tmp_path / "run", callbacks=[*callbacks, guard], trainer={"max_steps": 8}, **options)
    loop.run()
    return loop


def test_the_record_of_a_round_taken_back_has_the_scores_of_the_model_kept(tmp_path):
    loop = guarded(tmp_path, Explodes(3), RetentionCallback(), rounds=4, general_tasks=[Drift()])
    before, back = loop.history[2], loop.history[3]
    assert back["downstream"] == before["downstream"] and back["general"] == before["general"]
    discarded = back["rolled_back"]["downstream"]
    assert discarded["loss"] > before["downstream"]["loss"] + 0.02
    assert "validation loss" in back["rolled_back"]["reason"]
    assert [record["rolled_back"] is None for record in loop.history] == [True, True, True, False, True]
    written = [json.loads(line) for line in loop.folder.metrics.read_text().splitlines()]
    assert written == loop.history


@pytest.mark.parametrize(
    ("number", "factor", "options"),
    [(5, -3e4, {"loss_rise": None}), (2, -30.0, {"norm_ratio": None, "loss_rise": 0.02})],
)
def test_a_round_that_goes_wrong_is_taken_back_with_the_server_s_moments(tmp_path, number, factor, options):
    optimizer = FedAvgM(momentum=0.1) if number == 2 else Mean()
    seen = {}

    class Watch(FederatedCallback):
        def on_round_start(self, run):
            seen[run.record.round] = dict(run.state), optimizer.state_dict()

    callbacks = [Explodes(number, factor=factor), Watch()]
    loop = guarded(tmp_path, *callbacks, guard=RollbackGuard(**options), rounds=6, server_optimizer=optimizer)
    backs = {record["round"]: record["rolled_back"] for record in loop.history}
    assert backs[number] is not None and backs[number + 1] is None
    (state, moments), (state_after, moments_after) = seen[number], seen[number + 1]
    assert all(torch.equal(state[name], state_after[name]) for name in state)
    assert all(torch.equal(moments[name], moments_after[name]) for name in moments)
    assert bool(moments) == (number == 2)
    written = loop.history[number]["downstream"], loop.history[number - 1]["downstream"]
    assert written[0] == written[1]


def test_a_guard_ends_a_run_that_only_goes_wrong(tmp_path):
    guard = RollbackGuard(loss_rise=0.02, norm_ratio=None, patience=2)
    loop = guarded(tmp_path, Explodes(*range(2, 10)), guard=guard, rounds=9)
    assert "2 rounds in a row were taken back" in loop.summary["stop_reason"] and loop.summary["rounds"] == 3


def test_whoever_looks_at_scores_does_not_see_those_of_a_discarded_model(tmp_path):
    """The discarded model has a better accuracy than any other: it was kept as the best, and its tensors were gone."""

    class Lies(FederatedCallback):
        """Stands for a model that is right more often and much less sure."""

        phase = -1

        def on_round_end(self, run):
            if run.record.round == 2:
                run.record.downstream = {"accuracy": 1.0, "loss": 99.0}

    best, stopping = KeepBest(), EarlyStopping(target=0.99)
    loop = guarded(tmp_path, Lies(), best, stopping, rounds=3)
    assert loop.history[2]["rolled_back"]["downstream"]["accuracy"] == 1.0
    assert loop.summary["rounds"] == 3 and loop.summary["kept_round"] != 2
    kept = loop.history[loop.summary["kept_round"]]
    assert kept["downstream"]["accuracy"] == max(record["downstream"]["accuracy"] for record in loop.history) < 0.99


def test_what_a_guard_knows_is_carried_over_a_restart():
    first, second = RollbackGuard(), RollbackGuard()
    first.lowest, first.norms, first.in_a_row = 1.5, [1.0, 2.0], 1
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second.state_dict() == first.state_dict()


def test_a_round_of_which_nothing_was_aggregated_counts_as_taken_back(fake_loop, record):
    """The loop itself takes a round back whose mean is not finite: there is no change to measure then."""
    guard = RollbackGuard(patience=2)
    loop = fake_loop(guard)
    for number, reason in ((1, None), (2, "not finite"), (3, "not finite")):
        loop.record = type(loop.record)(**record(number))
        loop.call("on_round_start")
        if reason is None:
            loop.call("on_aggregate", {"w": torch.ones(2)})
        else:
            loop.record.rolled_back = {"reason": reason, "downstream": None, "personalised": None}
        loop.call("on_round_end")
    assert loop.stop_reason == "2 rounds in a row were taken back: not finite"
    assert len(guard.norms) == 1


@pytest.mark.parametrize("options", [{"loss_rise": -1}, {"norm_ratio": 0.5}, {"window": 0}, {"patience": 0}])
def test_bad_numbers_are_reported(options):
    assert [problem.key for problem in RollbackGuard(**options).check("k", Facts())] == [f"k.{next(iter(options))}"]

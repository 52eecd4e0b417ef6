import json

import pytest
import torch
from toy import toy_loop

from fedbe.callbacks import CommunicationCallback, ConvergenceCallback, FaultInjection, RetentionCallback
from fedbe.errors import Facts
from fedbe.evaluation import GeneralTask, TaskScore
from fedbe.federation.callback import FederatedCallback
from fedbe.messages import payload_bytes


class Drift(GeneralTask):
    """Scores how far the model has moved from the base: 1 at first, less and less after it."""

    def __init__(self, name="drift", first=None):
        self.name, self.first, self.calls = name, first, 0

    def prepare(self, model, tokenizer, seed):
        self.prepared_blocks = model.config.num_hidden_layers

    def evaluate(self, model):
        self.calls += 1
        tokens = torch.arange(12)[None]
        with torch.no_grad():
            logits = model.eval()(input_ids=tokens).logits
        if not hasattr(self, "base"):
            self.base = logits
        distance = (logits - self.base).abs().mean().item()
        score = 1 / (1 + distance) if self.first is None or self.calls > 1 else self.first
        return TaskScore(score, 0.0, 1 + distance)


def test_the_base_is_scored_once_and_every_round_against_it(tmp_path):
    task = Drift()
    loop = toy_loop(tmp_path / "run", rounds=3, general_tasks=[task], callbacks=[RetentionCallback()])
    loop.run()
    assert task.prepared_blocks == 3
    assert task.calls == 1 + 3 + 1
    assert loop.history[0]["general"]["drift"] == {"score": 1.0, "standard_error": 0.0, "cross_entropy": 1.0}
    assert loop.history[0]["retention"] == {"mean": 1.0, "drift": 1.0}
    for record in loop.history[1:]:
        general = record["general"]["drift"]
        assert record["retention"] == {"mean": general["score"], "drift": general["score"]}
        assert record["retention"]["mean"] < 1
        assert record["delta_ce"]["drift"] == pytest.approx(general["cross_entropy"] - 1)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["general"] == {"base": loop.history[0]["general"], "final": loop.history[3]["general"]}
    assert summary["retention"] == loop.history[3]["retention"]
    assert summary["delta_ce"] == loop.history[3]["delta_ce"]


def test_every_n_rounds_leaves_rounds_out_but_not_the_last(tmp_path):
    loop = toy_loop(tmp_path / "run", rounds=5, general_tasks=[Drift()], callbacks=[RetentionCallback(2)])
    loop.run()
    assert [record["retention"] is not None for record in loop.history] == [True, False, True, False, True, True]
    assert loop.summary["retention"] == loop.history[5]["retention"]


def test_a_base_that_scores_nothing_is_warned_about_and_has_no_retention(tmp_path):
    tasks = [Drift("blank", first=0.0), Drift()]
    loop = toy_loop(tmp_path / "run", rounds=1, general_tasks=tasks, callbacks=[RetentionCallback()])
    with pytest.warns(UserWarning, match="scores 0 on 'blank'"):
        loop.run()
    assert set(loop.summary["retention"]) == {"mean", "drift"}
    assert loop.summary["retention"]["mean"] == loop.summary["retention"]["drift"]


def test_without_general_tasks_nothing_is_scored(tmp_path):
    loop = toy_loop(tmp_path / "run", rounds=1, callbacks=[RetentionCallback()])
    loop.run()
    assert [record["general"] for record in loop.history] == [None, None]
    assert loop.summary["general"] is loop.summary["retention"] is None


class Payloads(FederatedCallback):
    def __init__(self):
        self.down, self.up = [], []

    def on_client_start(self, run, task):
        self.down.append(payload_bytes(task.received.values()))

    def on_client_end(self, run, task, update):
        self.up.append(payload_bytes(update.tensors.values()))


def test_bytes_are_those_of_the_tensors_that_travelled(tmp_path):
    payloads = Payloads()
    callbacks = [CommunicationCallback(), payloads]
    loop = toy_loop(tmp_path / "run", rounds=2, cohort=3, callbacks=callbacks)
    loop.run()
    one_client = 4 * sum(tensor.numel() for tensor in loop.server.state.values())
    assert payloads.up == payloads.down == [one_client] * 6
    assert [record["bytes"] for record in loop.history[1:]] == [{"up": 3 * one_client, "down": 3 * one_client}] * 2
    assert loop.history[0]["bytes"] == {"up": 0, "down": 0}
    assert (loop.summary["bytes_up"], loop.summary["bytes_down"]) == (6 * one_client, 6 * one_client)


@pytest.mark.parametrize(
    ("kind", "heard", "times"), [("nan", False, 1), ("zero_weight", False, 1), ("scaled", True, 1), ("error", False, 0)]
)
def test_a_refused_update_has_travelled_and_its_client_was_not_heard(tmp_path, kind, heard, times):
    """`on_client_end` and `on_client_failure` are never both called for a client, and one of them always is."""
    ended, failed = [], []

    class Watch(FederatedCallback):
        def on_client_end(self, run, task, update):
            ended.append(task.client_id)

        def on_client_failure(self, run, task, failure):
            failed.append(task.client_id)

    fault = FaultInjection(kind, clients=["client-1"])
    loop = toy_loop(tmp_path / "run", rounds=1, callbacks=[Watch(), fault, CommunicationCallback()])
    loop.run()
    one_client = 4 * sum(tensor.numel() for tensor in loop.server.state.values())
    assert loop.record.bytes == {"up": (3 + times) * one_client, "down": 4 * one_client}
    assert sorted(ended + failed) == [f"client-{number}" for number in range(4)]
    assert ("client-1" in ended) == heard


def test_convergence_reports_the_cost_of_the_target_and_of_most_of_the_gain(fake_loop, record):
    accuracies = [0.2, 0.3, None, 0.5, 0.4]
    sent = {"up": 10, "down": 30}
    loop = fake_loop(ConvergenceCallback(target=0.35))
    loop.history = [record(n, a, bytes=sent if n else {"up": 0, "down": 0}) for n, a in enumerate(accuracies)]
    loop.call("on_run_end")
    result = loop.summary["convergence"]
    third = {"round": 3, "accuracy": 0.5, "simulated_seconds": 4.5, "bytes": 120}
    assert result["target"] == 0.35
    assert result["to_target"] == result["to_90_percent_of_gain"] == result["best"] == third
    assert [point["bytes"] for point in result["curve"]] == [0, 40, 120, 160]


@pytest.mark.parametrize("target", [0.9, None])
def test_a_target_that_was_not_reached_or_not_set_is_null(fake_loop, history, target):
    loop = fake_loop(ConvergenceCallback(target), history=history)
    loop.call("on_run_end")
    assert loop.summary["convergence"]["to_target"] is None
    assert loop.summary["convergence"]["to_90_percent_of_gain"]["round"] == 5


@pytest.mark.parametrize("callback", [RetentionCallback(0), ConvergenceCallback(0.0), ConvergenceCallback(30.0)])
def test_bad_numbers_are_reported(callback):
    assert len(callback.check("callbacks[0]", Facts())) == 1

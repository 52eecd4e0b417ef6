import json
import math

import pytest
import torch
from full_disk import no_room
from hypothesis import given
from hypothesis import strategies as st
from toy import toy_loop

from fedbe.callbacks import EarlyStopping, FaultInjection, KeepBest, RollbackGuard, metric_value
from fedbe.callbacks.stopping import without_improvement
from fedbe.errors import ConfigError, Facts
from fedbe.federation.callback import FederatedCallback, Phase
from fedbe.federation.hooks import Hooks
from fedbe.federation.record import RoundRecord, metric_paths
from fedbe.federation.view import RunView
from fedbe.figures.tables import summary_lines
from fedbe.storage.checkpoint import save_tensors


def run(loop, record, accuracies, **changes):
    for number, accuracy in enumerate(accuracies):
        loop.state = {"w": torch.full((2,), float(number))}
        loop.write(record(number, accuracy, **changes))
        if loop.stop_reason:
            return number
    return None


@given(st.lists(st.floats(0, 1), min_size=1), st.sampled_from(["max", "min"]))
def test_rounds_without_improvement_are_those_since_the_best(values, mode):
    best = (max if mode == "max" else min)(values)
    assert without_improvement(values, mode) == len(values) - 1 - values.index(best)


def test_patience_counts_measurements_without_improvement(fake_loop, record):
    loop = fake_loop(EarlyStopping(patience=2))
    assert run(loop, record, [0.2, 0.3, 0.3, None, 0.25, 0.9]) == 4
    assert loop.stop_reason == "downstream/accuracy has not improved on 0.3 in 2 measurements"


def test_small_improvements_do_not_count(fake_loop, record):
    loop = fake_loop(EarlyStopping(patience=2, min_delta=0.05))
    assert run(loop, record, [0.2, 0.24, 0.249, 0.9]) == 2


def test_less_is_better_when_it_is_said(fake_loop, record):
    loop = fake_loop(EarlyStopping("delta_ce/mean", mode="min", patience=1))
    loop.write(record(0, delta_ce={"mean": 0.3}))
    loop.write(record(1, delta_ce={"mean": 0.1}))
    assert loop.stop_reason is None
    loop.write(record(2, delta_ce={"mean": 0.2}))
    assert loop.stop_reason == "delta_ce/mean has not improved on 0.1 in 1 measurements"


@pytest.mark.parametrize("accuracy", [0.4, 0.5])
def test_a_target_that_is_reached_ends_the_run(fake_loop, record, accuracy):
    loop = fake_loop(EarlyStopping(target=0.4))
    assert run(loop, record, [0.2, 0.39, accuracy]) == 2
    assert loop.stop_reason == f"downstream/accuracy is {accuracy}, the target was 0.4"


def test_a_metric_that_is_no_number_ends_the_run(fake_loop, record):
    loop = fake_loop(EarlyStopping("downstream/loss", mode="min"))
    loop.write(record(0, downstream={"accuracy": 0.0, "loss": math.nan}))
    assert loop.stop_reason == "downstream/loss is nan"


def test_an_unknown_metric_names_those_there_are(fake_loop, record):
    loop = fake_loop(EarlyStopping("retention/doc"))
    with pytest.raises(ConfigError, match=r"retention/doc.*retention/mean, retention/docs"):
        loop.write(record(0))


def test_a_metric_that_was_not_measured_in_a_round_is_none(record):
    assert metric_value(record(0, None), "downstream/accuracy") is None
    assert metric_value(record(0, 0.25), "downstream/accuracy") == 0.25
    assert metric_value(record(0), "general/docs/score") == 0.5


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"monitor": "accuracy"}, "monitor"),
        ({"monitor": "downstream/acuracy"}, "monitor"),
        ({"mode": "maximum"}, "mode"),
        ({"patience": 0}, "patience"),
        ({"min_delta": -1.0}, "min_delta"),
    ],
)
def test_bad_arguments_are_reported_before_work_starts(arguments, key):
    facts = Facts(metrics=metric_paths(["words"]))
    assert [problem.key for problem in EarlyStopping(**arguments).check("callbacks[0]", facts)] == [
        f"callbacks[0].{key}"
    ]


def test_early_stopping_ends_a_real_run_and_says_why(tmp_path):
    loop = toy_loop(tmp_path / "run", rounds=9, callbacks=[EarlyStopping("bytes/up", patience=2)])
    summary = loop.run()
    assert summary["rounds"] == 2
    assert summary["stop_reason"] == "bytes/up has not improved on 0 in 2 measurements"


def test_keep_best_makes_the_best_round_the_final_model(fake_loop, record):
    loop = fake_loop(KeepBest())
    run(loop, record, [0.2, 0.4, None, 0.4, 0.3])
    loop.call("on_last_round")
    assert loop.restored["w"].tolist() == [1.0, 1.0]
    assert loop.summary["kept_round"] == 1


def test_keep_best_keeps_a_copy_that_later_rounds_cannot_change(fake_loop, record):
    loop = fake_loop(KeepBest())
    run(loop, record, [0.2])
    loop.state["w"].fill_(7.0)
    loop.call("on_last_round")
    assert loop.restored["w"].tolist() == [0.0, 0.0]


def test_keep_best_continues_from_its_state_and_its_file(fake_loop, record):
    first, second = KeepBest(), KeepBest()
    loop = fake_loop(first)
    run(loop, record, [0.2, 0.5])
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    loop.callbacks = [second]
    loop.write(record(2, 0.4))
    loop.call("on_last_round")
    assert loop.restored["w"].tolist() == [1.0, 1.0]


def test_keep_best_on_a_real_run_restores_the_untouched_model(tmp_path):
    loop = toy_loop(tmp_path / "run", rounds=2, callbacks=[KeepBest("wall_seconds", mode="min")])
    summary = loop.run()
    assert summary["kept_round"] == 0
    assert summary["downstream"] == summary["downstream_base"]


@pytest.mark.parametrize("damage", ["missing", "torn", "changed", "of another round", "of another run"])
def test_a_best_model_that_is_gone_costs_nothing_but_itself(fake_loop, record, damage, capsys):
    loop = fake_loop(KeepBest())
    run(loop, record, [0.2, 0.4, 0.3])
    file = loop.folder.checkpoints / "best.safetensors"
    if damage == "missing":
        file.unlink()
    elif damage == "of another round":
        save_tensors(file, {"w": torch.zeros(2)}, {"round": 2})
    elif damage == "of another run":
        save_tensors(file, {"v": torch.zeros(2)}, {"round": 1})
    else:
        content = file.read_bytes()
        file.write_bytes(content[:-3] if damage == "torn" else content[:-1] + b"\xff")
    loop.call("on_last_round")
    assert loop.restored is None and loop.state["w"].tolist() == [2.0, 2.0]
    assert loop.summary["kept_round"] is None
    assert "round 1 was best" in loop.summary["kept_note"] and "best.safetensors" in loop.summary["kept_note"]
    assert capsys.readouterr().err == f"fedbe: {loop.summary['kept_note']}\n"
    assert any("round 1 was best" in line for line in summary_lines(loop.summary, loop.folder.path))


def test_a_best_model_for_which_there_is_no_room_leaves_the_one_before(fake_loop, record, capsys):
    loop = fake_loop(KeepBest())
    run(loop, record, [0.2, 0.4])
    loop.state = {"w": torch.full((2,), 7.0)}
    with no_room():
        loop.write(record(2, 0.6))
    assert "round 1 stays the one that is kept" in capsys.readouterr().err
    loop.write(record(3, 0.5))  # not as good as the one that was lost, better than the one that was kept
    loop.call("on_last_round")
    assert loop.summary["kept_round"] == 3 and loop.restored["w"].tolist() == [7.0, 7.0]
    assert "round 2" in loop.summary["kept_note"]


def test_without_trouble_there_is_no_note(fake_loop, record):
    loop = fake_loop(KeepBest())
    run(loop, record, [0.2, 0.4])
    loop.call("on_last_round")
    assert loop.summary == {"kept_round": 1, "kept_note": None}


class LargestWeight(FederatedCallback):
    """A metric of one's own."""

    phase = Phase.MEASURE
    logs = ("largest_weight",)

    def on_round_end(self, run):
        run.log("largest_weight", max(tensor.abs().max() for tensor in run.state.values()))


def test_a_metric_of_one_s_own_is_written_and_can_end_a_run(tmp_path):
    callbacks = [EarlyStopping("largest_weight", target=0.0), KeepBest("largest_weight"), LargestWeight()]
    facts = Facts(metrics=[*metric_paths([]), *callbacks[-1].logs])
    assert [problem for callback in callbacks for problem in callback.check("k", facts)] == []
    loop = toy_loop(tmp_path / "run", rounds=4, callbacks=callbacks)
    summary = loop.run()
    assert summary["rounds"] == summary["kept_round"] == 1 and "the target was 0" in summary["stop_reason"]
    first, second = (json.loads(line) for line in loop.folder.metrics.read_text().splitlines())
    assert first["metrics"] == {} and second["metrics"]["largest_weight"] > 0
    assert metric_value(first, "largest_weight") is None and metric_value(second, "largest_weight") > 0


def test_a_metric_of_one_s_own_takes_no_name_of_the_record_s(fake_loop, record):
    loop = fake_loop()
    loop.record = RoundRecord(**record(1))
    with pytest.raises(ValueError, match="downstream/accuracy"):
        RunView(loop).log("downstream/accuracy", 1.0)
    RunView(loop).log("mine/a", torch.tensor(1.5))
    written = loop.record.to_dict()
    assert written["metrics"] == {"mine/a": 1.5} and metric_value(written, "mine/b") is None


def test_several_rules_may_end_one_run():
    rules = [EarlyStopping(target=0.9), EarlyStopping(patience=2), EarlyStopping("bytes/up", mode="min")]
    faults = [FaultInjection("nan", ["a"]), FaultInjection("nan", ["b"])]
    guards = [RollbackGuard(loss_rise=None), RollbackGuard(norm_ratio=None)]
    kept = Hooks([*rules, *faults, *guards], None).state_dict()
    assert len(kept) == 7
    with pytest.raises(ConfigError, match="KeepBest"):  # a run ends with one model
        Hooks([KeepBest(), KeepBest("retention/mean")], None)

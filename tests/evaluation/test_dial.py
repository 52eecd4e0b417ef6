import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import ToyData, toy_loop

from fedbe.dial.measure import measure_dial
from fedbe.evaluation import GeneralTask, TaskScore
from fedbe.evaluation.dial import DialPoint, choose_factor, harmonic_mean, recorded_points
from fedbe.modeling.tensors import copy_tensors


def points(*triples):
    return [DialPoint(factor, accuracy, {"mean": kept, "stories": kept}) for factor, accuracy, kept in triples]


CURVE = points((0.0, 0.2, 1.0), (0.25, 0.25, 0.99), (0.5, 0.35, 0.9), (0.75, 0.39, 0.7), (1.0, 0.4, 0.4))


@pytest.mark.parametrize(
    ("wanted", "chosen"), [(0.4, 1.0), (0.41, 0.75), (0.9, 0.5), (0.95, 0.25), (0.995, 0.0), (1.0, 0.0)]
)
def test_the_largest_factor_that_keeps_as_much_as_wanted_is_chosen(wanted, chosen):
    assert choose_factor(CURVE, wanted) == chosen


def test_the_best_trade_off_by_hand():
    # Shares of the gain: 0, .25, .75, .95, 1; harmonic means with what is kept: 0, .399, .818, .806, .571.
    assert choose_factor(CURVE) == 0.5
    assert harmonic_mean(0.9, 0.75) == pytest.approx(0.818, abs=1e-3) and harmonic_mean(0.7, -0.1) == 0


def test_what_gained_nothing_is_best_left_the_base_model_and_what_is_unknown_is_not_chosen():
    assert choose_factor(points((0.0, 0.3, 1.0), (0.5, 0.3, 1.0), (1.0, 0.2, 0.9))) == 0
    assert choose_factor([DialPoint(0.0, 0.2), DialPoint(1.0, 0.3)], 0.9) is None


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1.2)), min_size=1, max_size=6), st.floats(0.01, 1))
def test_the_choice_is_one_of_the_points_and_keeps_what_is_wanted(pairs, wanted):
    curve = points((0.0, 0.1, 1.0), *((index + 1, *pair) for index, pair in enumerate(pairs)))
    kept = {point.factor: point.mean_retention for point in curve}
    chosen = choose_factor(curve, wanted)
    assert kept[chosen] >= wanted and all(kept[factor] < wanted for factor in kept if factor > chosen)
    assert choose_factor(curve) in kept


class Agreement(GeneralTask):
    """The share of tokens on which a model says what the base model said."""

    name = "agreement"

    def __init__(self, fails=False):
        self.fails = fails

    def prepare(self, model, tokenizer, seed):
        self.said = self.say(model)

    def say(self, model):
        with torch.inference_mode():
            return model(torch.arange(30)[None]).logits.argmax(-1)

    def evaluate(self, model):
        if self.fails:
            raise RuntimeError("no")
        return TaskScore((self.say(model) == self.said).float().mean().item(), 0.0)


class WithoutTest(ToyData):
    """Data whose test part must not be looked at."""

    def test_dataset(self):
        raise AssertionError("the choice of a factor must not see test data")


def trained(tmp_path, task, rounds=3):
    loop = toy_loop(tmp_path / "run", rounds=rounds, data=WithoutTest(), general_tasks=[task])
    loop.setup()
    start = loop.server.state
    loop.folder.create({})
    for _ in range(rounds):
        loop.advance()
    return loop, start


def test_a_trained_model_is_measured_from_the_base_up_on_validation_data_and_left_as_it_was(tmp_path):
    task = Agreement()
    loop, start = trained(tmp_path, task)
    names = [name for name, _ in loop.model.named_parameters()]
    before, state = copy_tensors(loop.model, names), loop.server.state
    measured = measure_dial(loop, start, [1, 0.5])
    assert [point.factor for point in measured] == [0, 0.5, 1]
    assert measured[0].retention == {"mean": 1, "agreement": 1}
    assert measured[2].accuracy == loop.history[-1]["downstream"]["accuracy"]
    assert measured[0].accuracy != measured[2].accuracy
    assert measured[2].mean_retention == pytest.approx(task.evaluate(loop.model).score)
    assert measured[2].mean_retention < measured[1].mean_retention <= 1
    after = copy_tensors(loop.model, names)
    assert loop.server.state is state and all(torch.equal(before[name], after[name]) for name in names)


def test_a_model_is_left_as_it_was_when_a_task_fails(tmp_path):
    loop, start = trained(tmp_path, Agreement(fails=True), rounds=1)
    before = copy_tensors(loop.model, loop.server.state)
    with pytest.raises(RuntimeError):
        measure_dial(loop, start, [0.5])
    after = copy_tensors(loop.model, loop.server.state)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_recorded_points_are_the_measured_ones():
    assert recorded_points({}) == recorded_points({"dial": None}) == []
    record = {"dial": {"points": [vars(point) for point in CURVE], "chosen": 0.5, "wanted_retention": None}}
    assert recorded_points(record) == CURVE

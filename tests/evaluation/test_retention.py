import pytest

from fedbe.evaluation import GeneralTask, TaskScore, check_tasks, delta_ce, retention


def scores(**values):
    return {name: TaskScore(score, 0.01, loss) for name, (score, loss) in values.items()}


def test_retention_and_delta_ce_by_hand():
    base, now = scores(a=(0.8, 1.0), b=(0.5, 2.0)), scores(a=(0.4, 1.5), b=(0.6, 2.1))
    assert retention(base, now) == pytest.approx({"mean": 0.85, "a": 0.5, "b": 1.2})
    assert delta_ce(base, now) == pytest.approx({"mean": 0.3, "a": 0.5, "b": 0.1})


def test_the_base_against_itself_keeps_everything():
    base = scores(a=(0.3, 1.0))
    assert retention(base, base) == {"mean": 1.0, "a": 1.0}
    assert delta_ce(base, base) == {"mean": 0.0, "a": 0.0}


def test_a_task_that_the_base_cannot_do_is_left_out_of_the_mean():
    base, now = scores(a=(0.5, None), b=(0.0, 2.0)), scores(a=(0.4, None), b=(0.3, 1.0))
    assert retention(base, now) == pytest.approx({"mean": 0.8, "a": 0.8})
    assert delta_ce(base, now) == {"mean": -1.0, "b": -1.0}


def test_nothing_measured_is_an_empty_result():
    assert retention({}, {}) == delta_ce({}, {}) == {}
    assert retention(scores(b=(0.0, None)), scores(b=(0.0, None))) == {}


class Named(GeneralTask):
    def __init__(self, name):
        self.name = name

    def prepare(self, model, tokenizer, seed):
        raise NotImplementedError

    def evaluate(self, model):
        raise NotImplementedError


def test_task_names_are_unique_and_not_those_of_something_else():
    problems = check_tasks([Named("a"), Named("a"), Named("mean"), Named("x/y"), Named("b")], "general_tasks")
    assert [problem.key for problem in problems] == [f"general_tasks[{index}].init_args.name" for index in range(4)]

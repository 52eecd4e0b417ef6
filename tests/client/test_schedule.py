import math

import pytest
import torch
from toy import ToyData, toy_loop

from fedbe.client.schedule import Schedule


def test_warm_up_begins_above_zero_and_ends_at_the_full_rate():
    schedule = Schedule("constant", warmup_steps=3)
    assert [schedule.factor(step, 10) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "expected"), [("linear", [1.0, 0.75, 0.5, 0.25]), ("cosine", [1.0, 0.853553, 0.5, 0.146447])]
)
def test_a_decaying_schedule_ends_at_zero(name, expected):
    schedule = Schedule(name)
    assert [schedule.factor(step, 4) for step in range(4)] == pytest.approx(expected, abs=1e-6)
    assert schedule.factor(4, 4) == pytest.approx(0.0, abs=1e-9)


class RateSpy(torch.optim.SGD):
    """Notes the learning rate of each step."""

    rates: list[float]

    def step(self, closure=None):
        type(self).rates.append(round(self.param_groups[0]["lr"], 6))
        return super().step(closure)


@pytest.mark.parametrize(
    ("span", "expected"),
    [("round", [1.0, 0.666667, 0.333333] * 2), ("run", [1.0, 0.833333, 0.666667, 0.5, 0.333333, 0.166667])],
)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_schedule_restarts_each_round_or_spans_the_run(tmp_path, span, expected, accumulate):
    RateSpy.rates = []
    toy_loop(
        tmp_path / "run",
        rounds=2,
        data=ToyData(clients=1),
        optimizer=lambda parameters: RateSpy(parameters, lr=1.0),
        schedule=Schedule("linear", span=span),
        trainer={"accumulate_grad_batches": accumulate},
    ).run()
    assert RateSpy.rates == pytest.approx(expected, abs=1e-5)


def test_local_epochs_count_towards_the_schedule(tmp_path):
    RateSpy.rates = []
    toy_loop(
        tmp_path / "run",
        rounds=1,
        data=ToyData(clients=1, samples=(10,)),
        optimizer=lambda parameters: RateSpy(parameters, lr=1.0),
        schedule=Schedule("cosine"),
        trainer={"max_steps": -1, "max_epochs": 2},
    ).run()
    assert RateSpy.rates == pytest.approx([(1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)], abs=1e-5)

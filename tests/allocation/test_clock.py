from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbe.allocation.clock import RoundTime, SimulatedClock, round_time, steps_within
from fedbe.allocation.profiles import GivenFleet, Profile
from fedbe.errors import Facts

FLEET = GivenFleet({}, Profile(1, 1, 1, 1))
TIMES = {"a": 3.0, "b": 9.0, "c": 5.0}


def test_a_round_that_waits_takes_as_long_as_its_slowest_client():
    assert SimulatedClock(FLEET).round(TIMES) == RoundTime(9.0)
    assert SimulatedClock(FLEET, "wait", 4.0).round(TIMES) == RoundTime(9.0)


@pytest.mark.parametrize("late", ["drop", "partial"])
def test_whoever_is_not_done_by_the_deadline_is_late(late):
    assert SimulatedClock(FLEET, late, 4.0).round(TIMES) == RoundTime(4.0, ("b", "c"))
    assert SimulatedClock(FLEET, late, 9.0).round(TIMES) == RoundTime(9.0)
    assert SimulatedClock(FLEET, late, 20.0).round(TIMES) == RoundTime(9.0)
    assert SimulatedClock(FLEET, late, 4.0).round({"a": inf}) == RoundTime(4.0, ("a",))


def test_a_round_without_clients_takes_no_time():
    assert round_time({}, 5.0) == round_time({}) == RoundTime(0.0)


@pytest.mark.parametrize(
    ("deadline", "steps"), [(1.0, 0), (2.9, 0), (3.0, 1), (5.0, 3), (5.9, 3), (11.9, 9), (12.0, 10), (99.0, 10)]
)
def test_as_many_steps_are_taken_as_fit(deadline, steps):
    assert steps_within(deadline, transfer_seconds=2.0, step_seconds=1.0, steps=10) == steps


@given(st.floats(1e-3, 1e3), st.floats(0, 1e3), st.floats(1e-6, 1e2), st.integers(1, 1000))
def test_the_steps_that_fit_end_in_time_and_one_more_would_not(deadline, transfer, step, wanted):
    steps = steps_within(deadline, transfer, step, wanted)
    assert 0 <= steps <= wanted
    if steps:
        assert round_time({"a": transfer + steps * step}, deadline).late == ()
    if steps < wanted:
        assert transfer + (steps + 1) * step >= deadline * (1 - 1e-9)


@pytest.mark.parametrize("late", ["drop", "partial"])
def test_late_clients_need_a_deadline(late):
    assert [problem.key for problem in SimulatedClock(FLEET, late).check("clock", Facts())] == [
        "clock.deadline_seconds"
    ]
    assert [problem.key for problem in SimulatedClock(FLEET, late, -1.0).check("clock", Facts())] == [
        "clock.deadline_seconds"
    ]
    assert (
        SimulatedClock(FLEET, late, 1.0).check("clock", Facts()) == SimulatedClock(FLEET).check("clock", Facts()) == []
    )


def test_the_fleet_is_checked_too():
    broken = GivenFleet({}, Profile(0, 1, 1, 1))
    assert [p.key for p in SimulatedClock(broken).check("clock", Facts())] == [
        "clock.fleet.init_args.default.memory_bytes"
    ]

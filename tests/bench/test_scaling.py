import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbe.bench.scaling import Cost, Growth, Size, exponent, measure_cost
from fedbe.cli.main import main


@given(st.floats(-1, 3), st.floats(0.01, 100))
def test_the_exponent_of_a_power_law_is_found(power, factor):
    sizes = [1.0, 3.0, 10.0, 40.0]
    assert exponent(sizes, [factor * size**power for size in sizes]) == pytest.approx(power, abs=1e-9)


def test_a_growth_shows_each_run_and_the_exponents():
    costs = [Cost(Size(rounds=n), 2.0, 0.5, 0.5 * n, 2**20) for n in (2, 4)]
    growth = Growth("rounds", costs)
    assert growth.exponents() == pytest.approx(
        {"startup_seconds": 0, "round_seconds": 0, "client_milliseconds": 0, "run_seconds": 1, "in_use_bytes": 0}
    )
    assert [line.split()[0] for line in str(growth).splitlines()] == ["rounds", "2", "4", "exponent"]
    assert len({len(line) for line in str(growth).splitlines()}) == 1


def test_a_run_is_measured():
    cost = measure_cost(Size(clients=3, cohort=2, rounds=2, depth=2, blocks=1))
    assert cost.startup_seconds > 0 and cost.round_seconds > 0 and cost.in_use_bytes > 2**27
    assert cost.run_seconds >= cost.round_seconds


def test_impossible_numbers_are_refused(capsys):
    assert main(["bench", "scaling", "--clients", json.dumps([0, 5])]) == 2
    assert "give whole numbers from 1" in capsys.readouterr().err

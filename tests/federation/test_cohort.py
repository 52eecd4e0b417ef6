import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbe.errors import ConfigError
from fedbe.federation.cohort import CohortSampler, cohort_count

CLIENTS = [f"c{i}" for i in range(10)]


@pytest.mark.parametrize(
    ("size", "expected"), [("all", 10), (1.0, 10), (0.25, 3), (0.3, 3), (0.001, 1), (1, 1), (7, 7)]
)
def test_size_may_be_all_a_fraction_or_a_number(size, expected):
    assert cohort_count(size, 10) == expected


@pytest.mark.parametrize("size", [0, 11, -1, 0.0, 1.5, -0.5, True])
def test_a_size_out_of_range_is_refused_with_key_and_value(size):
    with pytest.raises(ConfigError, match=r"cohort = "):
        cohort_count(size, 10)


@given(st.integers(1, 10), st.integers(0, 100), st.integers(0, 100))
def test_a_cohort_is_drawn_without_replacement_in_client_order(size, seed, round_index):
    cohort = CohortSampler(size, seed).sample(CLIENTS, 0, round_index)
    assert len(cohort) == len(set(cohort)) == size
    assert cohort == sorted(cohort, key=CLIENTS.index)
    assert cohort == CohortSampler(size, seed).sample(CLIENTS, 0, round_index)


def test_seeds_and_rounds_see_different_cohorts():
    by_round = {tuple(CohortSampler(5, 0).sample(CLIENTS, 0, r)) for r in range(20)}
    by_seed = {tuple(CohortSampler(5, s).sample(CLIENTS, 0, 0)) for s in range(20)}
    assert len(by_round) > 10 and len(by_seed) > 10


def test_every_client_is_drawn_about_equally_often():
    counts = dict.fromkeys(CLIENTS, 0)
    for round_index in range(400):
        for client in CohortSampler(5, 0).sample(CLIENTS, 0, round_index):
            counts[client] += 1
    assert all(150 < count < 250 for count in counts.values())

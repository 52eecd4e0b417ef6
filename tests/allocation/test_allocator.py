import itertools
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedbe.allocation.allocator import Allocator
from fedbe.allocation.best_sets import CohortCosts, best_sets
from fedbe.allocation.coverage import cover_by_search, cover_exactly, covering_sets
from fedbe.errors import Facts


def whole(rng, low, high, *shape):
    """Whole numbers as floats: their sums are exact, so that a budget is met or not."""
    return rng.integers(low, high, shape).astype(float)


def random_costs(rng, clients, blocks, equal):
    def low():
        return np.ascontiguousarray(whole(rng, 0, 4, clients, blocks)[:, ::-1].cumsum(axis=1)[:, ::-1])

    def train():
        return np.repeat(whole(rng, 1, 4, clients, 1), blocks, axis=1) if equal else whole(rng, 1, 5, clients, blocks)

    def budget():
        return np.where(rng.random(clients) < 0.2, np.inf, whole(rng, 1, 4 + 3 * blocks, clients))

    return CohortCosts(low(), train(), low(), train(), budget(), budget())


def random_values(rng, clients, blocks, kind):
    return {
        "real": rng.random((clients, blocks)),
        "whole": whole(rng, 0, 4, clients, blocks),
        "equal": np.ones((clients, blocks)),
        "top": rng.random((clients, blocks)) * np.arange(1, blocks + 1) ** 2,
    }[kind]


@st.composite
def problems(draw, clients=4, blocks=4):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.integers(1, clients)), draw(st.integers(1, blocks))
    values = random_values(rng, *shape, draw(st.sampled_from(["real", "whole", "equal", "top"])))
    return values, random_costs(rng, *shape, equal=draw(st.booleans()))


def affordable_sets(costs, client):
    """All sets within a client's budgets, as columns of 0 and 1, straight from the definition."""
    found = []
    for chosen in itertools.product([0, 1], repeat=costs.time_low.shape[1]):
        blocks = [block for block, taken in enumerate(chosen) if taken]
        time = costs.time_low[client, blocks[0]] + sum(costs.time_train[client, blocks]) if blocks else 0
        memory = costs.memory_low[client, blocks[0]] + sum(costs.memory_train[client, blocks]) if blocks else 0
        if not blocks or (time <= costs.time_budget[client] and memory <= costs.memory_budget[client]):
            found.append(chosen)
    return np.array(found)


def brute_force(values, costs, coverage):
    """The most trainers that count towards the coverage, and with them the highest value, over all assignments."""
    counts, totals = np.zeros((1, values.shape[1]), dtype=int), np.zeros(1)
    for client, row in enumerate(values):
        sets = affordable_sets(costs, client)
        counts = (counts[:, None] + sets[None]).reshape(-1, values.shape[1])
        totals = (totals[:, None] + sets @ row).ravel()
    covered = np.minimum(counts, coverage).sum(axis=1)
    return covered.max(), totals[covered == covered.max()].max()


def achieved(chosen, values, coverage):
    return np.minimum(chosen.sum(axis=0), coverage).sum(), values[chosen].sum()


def names(prefix, count):
    return [f"{prefix}{index}" for index in range(count)]


def allocate(values, costs, coverage):
    return Allocator(coverage).allocate(names("c", len(values)), names("b", values.shape[1]), values, costs)


def within_budgets(chosen, costs):
    return all(
        any(np.array_equal(row, found) for found in affordable_sets(costs, client)) for client, row in enumerate(chosen)
    )


@settings(max_examples=300, deadline=None)
@given(problems(), st.integers(0, 3))
def test_an_allocation_has_the_coverage_and_the_value_of_the_best_of_all_assignments(problem, coverage):
    values, costs = problem
    chosen = allocate(values, costs, coverage).chosen
    covered, value = achieved(chosen, values, coverage)
    best_covered, best_value = brute_force(values, costs, coverage)
    assert covered == best_covered
    assert value == pytest.approx(best_value)
    assert within_budgets(chosen, costs)


@settings(max_examples=100, deadline=None)
@given(problems(clients=3, blocks=6))
def test_without_coverage_each_client_has_its_own_best_set(problem):
    values, costs = problem
    chosen = best_sets(values, costs)
    for client, row in enumerate(values):
        assert row[chosen[client]].sum() == pytest.approx((affordable_sets(costs, client) @ row).max())
    assert np.array_equal(chosen, allocate(values, costs, 0).chosen)


@settings(max_examples=100, deadline=None)
@given(problems(clients=6, blocks=6), st.integers(1, 2))
def test_the_search_stays_within_budgets_and_near_the_exact_solution(problem, coverage):
    values, costs = problem
    demand = np.minimum(coverage, costs.affordable().sum(axis=0))
    chosen = cover_by_search(values, costs, demand, best_sets(values, costs))
    exact = cover_exactly(values, costs, demand)
    assert within_budgets(chosen, costs)
    assert achieved(exact, values, demand) >= achieved(chosen, values, demand) or np.isclose(
        values[exact].sum(), values[chosen].sum()
    )
    assert achieved(chosen, values, demand)[0] >= achieved(best_sets(values, costs), values, demand)[0]


def test_the_search_has_the_best_coverage_in_nearly_all_small_cases():
    rng = np.random.default_rng(0)
    worse, lost = 0, []
    for _ in range(150):
        clients, blocks, coverage = rng.integers(2, 8), rng.integers(2, 7), rng.integers(1, 3)
        values = random_values(rng, clients, blocks, "real")
        costs = random_costs(rng, clients, blocks, equal=True)
        demand = np.minimum(coverage, costs.affordable().sum(axis=0))
        found = achieved(cover_by_search(values, costs, demand, best_sets(values, costs)), values, demand)
        best = achieved(cover_exactly(values, costs, demand), values, demand)
        worse += found[0] < best[0]
        lost.append(1 - found[1] / best[1] if best[1] > 0 and found[0] == best[0] else 0.0)
    assert worse <= 4
    assert np.mean(lost) < 0.02


def test_a_needed_client_hands_its_block_over_along_a_chain():
    """Only c0 reaches block 0; it must give up 1, which c1 can take from 2, which c2 can take from 3."""
    reach = np.array([[1, 1, 1, 1], [9, 1, 1, 1], [9, 9, 1, 1], [9, 9, 9, 1]], dtype=float)
    one, nothing, free = np.ones((4, 4)), np.zeros((4, 4)), np.full(4, np.inf)
    costs = CohortCosts(reach, one, nothing, one, np.full(4, 2.0), free)
    values = np.array([[1, 5, 1, 1], [1, 1, 5, 1], [1, 1, 1, 5], [1, 1, 1, 5]], dtype=float)
    demand = np.ones(4, dtype=int)
    own = best_sets(values, costs)
    assert own.argmax(axis=1).tolist() == [1, 2, 3, 3]
    assert np.array_equal(cover_by_search(values, costs, demand, own), np.eye(4, dtype=bool))


@settings(max_examples=50, deadline=None)
@given(problems(clients=4, blocks=5), st.integers(0, 2), st.randoms(use_true_random=False))
def test_the_order_of_the_clients_does_not_matter(problem, coverage, chance):
    values, costs = problem
    order = list(range(len(values)))
    chance.shuffle(order)
    client_ids = names("c", len(values))
    blocks = names("b", values.shape[1])
    straight = Allocator(coverage).allocate(client_ids, blocks, values, costs)
    shuffled = Allocator(coverage).allocate(
        [client_ids[index] for index in order], blocks, values[order], costs.rows(np.array(order))
    )
    assert sorted(shuffled.clients, key=lambda c: c.client_id) == sorted(straight.clients, key=lambda c: c.client_id)
    assert np.array_equal(shuffled.chosen, straight.chosen[order])


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(0, 5), st.integers(0, 5))
def test_more_budget_never_lowers_a_clients_value(problem, seconds, memory):
    values, costs = problem
    richer = replace(costs, time_budget=costs.time_budget + seconds, memory_budget=costs.memory_budget + memory)
    before, after = (allocate(values, given_costs, 0).clients for given_costs in (costs, richer))
    assert all(b.value >= a.value - 1e-9 for a, b in zip(before, after, strict=True))


def uniform_costs(time_budget, memory_budget, blocks=4):
    """Reaching the top costs 1 s, each block further down another; a block trains for 1 s and 10 bytes."""
    clients = len(time_budget)
    ladder = np.tile(np.arange(blocks, 0, -1.0), (clients, 1))
    flat = np.ones((clients, blocks))
    return CohortCosts(ladder, flat, 0 * flat, 10 * flat, np.array(time_budget), np.array(memory_budget))


def test_an_explanation_names_blocks_costs_and_the_budget_that_binds():
    inf = np.inf
    costs = uniform_costs([8.0, 4.0, inf, 3.0, 1.0], [inf, inf, 20.0, 10.0, inf])
    allocation = allocate(np.ones((5, 4)), costs, 0)
    rich, late, small, both, unable = allocation.clients
    assert (rich.blocks, rich.limit, rich.time, rich.memory) == (("b0", "b1", "b2", "b3"), "none", 8.0, 40.0)
    assert (late.blocks, late.limit, late.time) == (("b2", "b3"), "time", 4.0)
    assert (small.blocks, small.limit, small.memory) == (("b2", "b3"), "memory", 20.0)
    assert (both.blocks, both.limit, both.value) == (("b3",), "time", 1.0)
    assert (unable.blocks, unable.can_train, unable.time) == ((), False, 0.0)
    assert allocation.unable == ("c4",)
    assert json.loads(json.dumps(asdict(late)))["blocks"] == ["b2", "b3"]


def test_what_was_taken_for_coverage_and_what_is_missing_is_said():
    costs = uniform_costs([5.0, 2.0], [np.inf, np.inf])
    values = np.array([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    assert allocate(values, costs, 0).clients[0].blocks == ("b2", "b3")
    allocation = allocate(values, costs, 1)
    assert [client.blocks for client in allocation.clients] == [("b1", "b2"), ("b3",)]
    assert allocation.clients[0].for_coverage == ("b1",)
    assert allocation.missing == {"b0": 1}


def test_equal_values_go_to_higher_blocks_and_a_block_of_no_value_is_left_out():
    costs = uniform_costs([np.inf] * 2, [20.0, np.inf])
    values = np.array([[1.0, 1.0, 1.0, 1.0], [0.0, 2.0, 0.0, 1.0]])
    assert allocate(values, costs, 0).chosen.tolist() == [[False, False, True, True], [False, True, False, True]]


def test_many_blocks_of_unequal_cost_are_chosen_greedily_within_budgets():
    rng = np.random.default_rng(0)
    costs, values = random_costs(rng, 50, 16, equal=False), rng.random((50, 16))
    chosen = best_sets(values, costs)
    assert (costs.time(chosen) <= costs.time_budget).all() and (costs.memory(chosen) <= costs.memory_budget).all()
    alone = np.where(costs.affordable(), values, 0.0).max(axis=1)
    assert (np.where(chosen, values, 0.0).sum(axis=1) >= alone - 1e-9).mean() > 0.9


def test_thousands_of_clients_are_covered_within_budgets():
    rng = np.random.default_rng(0)
    clients, blocks = 1500, 32
    costs = uniform_costs(rng.uniform(0, 70, clients), rng.uniform(0, 330, clients), blocks)
    values = rng.random((clients, blocks)) * np.arange(1, blocks + 1) ** 3
    own = best_sets(values, costs)
    chosen = covering_sets(values, costs, 150, own)
    assert own.sum(axis=0).min() < 150
    assert chosen.sum(axis=0).min() == 150
    assert (costs.time(chosen) <= costs.time_budget).all() and (costs.memory(chosen) <= costs.memory_budget).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": np.ones((2, 3))}, "shape"),
        ({"values": np.full((2, 4), -1.0)}, "negative"),
        ({"values": np.full((2, 4), np.nan)}, "values"),
        ({"values": np.full((2, 4), np.inf)}, "infinite"),
        ({"client_ids": ["a", "a"]}, "once"),
    ],
)
def test_unsound_input_is_refused(changes, message):
    given_input = {"client_ids": ["a", "b"], "block_names": names("b", 4), "values": np.ones((2, 4))}
    with pytest.raises(ValueError, match=message):
        Allocator().allocate(**{**given_input, **changes}, costs=uniform_costs([5.0, 5.0], [50.0, 50.0]))


def test_a_negative_coverage_is_a_problem():
    assert not Allocator(0).check("a", Facts())
    assert [problem.key for problem in Allocator(-1).check("a", Facts())] == ["a.coverage"]

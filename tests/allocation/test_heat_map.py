import numpy as np
import pytest

from fedbe.figures.allocation import allocation_figure


def history(*rounds):
    records = [{"round": 0, "cohort": [], "allocation": {}}]
    return records + [
        {"round": number + 1, "cohort": list(allocation), "allocation": allocation}
        for number, allocation in enumerate(rounds)
    ]


def shares(figure):
    return [np.ma.filled(panel.images[0].get_array(), np.nan).tolist() for panel in figure.axes[:2]]


def test_the_picture_shows_shares_of_cohorts_by_round_and_of_rounds_by_client():
    figure = allocation_figure(history({"a": ["block 2", "block 10"], "b": ["block 2"]}, {"b": ["block 10"], "c": []}))
    by_round, by_client = shares(figure)
    left, right = figure.axes[:2]
    assert [label.get_text() for label in left.get_yticklabels()] == ["block 2", "block 10"]
    assert by_round == [[1.0, 0.0], [0.5, 0.5]]
    assert [label.get_text() for label in right.get_xticklabels()] == ["a", "b", "c"]  # the strongest first
    assert by_client == [[1.0, 0.5, 0.0], [1.0, 0.5, 0.0]]


def test_given_blocks_are_shown_in_their_order_even_if_nobody_trained_them():
    figure = allocation_figure(history({"a": ["low"]}), names=["low", "high"])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["low", "high"]
    assert shares(figure)[0] == [[1.0], [0.0]]


def test_a_round_without_allocation_is_blank():
    by_round = shares(allocation_figure(history({"a": ["x"]}, {}, {"a": ["x"]})))[0]
    assert by_round == [[1.0, pytest.approx(float("nan"), nan_ok=True), 1.0]]


def test_a_client_of_the_cohort_that_trained_nothing_counts():
    records = [{"round": 1, "cohort": ["a", "idle"], "allocation": {"a": ["x"]}}]
    by_round, by_client = shares(allocation_figure(records))
    assert by_round == [[0.5]] and by_client == [[1.0, 0.0]]


def test_many_clients_are_counted_and_not_named():
    figure = allocation_figure(history({f"c{number}": ["x"] for number in range(100)}))
    assert figure.axes[1].get_xlabel().startswith("100 clients")
    assert not figure.axes[1].get_xticklabels()


def test_without_allocation_there_is_no_picture():
    assert allocation_figure(history()) is None

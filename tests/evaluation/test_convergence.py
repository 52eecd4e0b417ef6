import pytest

from fedbe.evaluation.convergence import Point, best, curve, first_reaching, level_of_gain, mean_accuracy


def record(number, accuracy, seconds, up, down):
    downstream = None if accuracy is None else {"accuracy": accuracy, "loss": 1.0}
    sent = {"up": up, "down": down}
    return {"round": number, "downstream": downstream, "simulated_seconds": seconds, "bytes": sent}


HISTORY = [
    record(0, 0.2, 0.0, 0, 0),
    record(1, 0.3, 2.0, 10, 30),
    record(2, None, 5.0, 10, 30),
    record(3, 0.5, 6.0, 10, 30),
    record(4, 0.4, 9.0, 10, 30),
]


def test_bytes_add_up_over_rounds_that_were_not_evaluated_too():
    assert curve(HISTORY) == [
        Point(0, 0.2, 0.0, 0),
        Point(1, 0.3, 2.0, 40),
        Point(3, 0.5, 6.0, 120),
        Point(4, 0.4, 9.0, 160),
    ]


def test_the_cost_of_a_target_is_that_of_the_first_round_at_it():
    points = curve(HISTORY)
    assert first_reaching(points, 0.35) == points[2]
    assert first_reaching(points, 0.1) == points[0]
    assert first_reaching(points, 0.51) is None


def test_best_level_and_area_by_hand():
    points = curve(HISTORY)
    assert best(points) == points[2]
    assert level_of_gain(points, 0.9) == pytest.approx(0.47)
    assert mean_accuracy(points) == pytest.approx((0.25 + 2 * 0.4 + 0.45) / 4)


def test_a_run_that_gained_nothing_has_no_level():
    assert level_of_gain(curve([record(0, 0.2, 0, 0, 0), record(1, 0.1, 1, 1, 1)]), 0.9) is None
    assert (level_of_gain([], 0.9), best([]), mean_accuracy([])) == (None, None, None)

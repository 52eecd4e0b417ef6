import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from fedbe.comparison.statistics import Estimate, common_level, pareto_front, standard_error, value_at

NUMBERS = st.integers(-1000, 1000).map(lambda x: x / 10)
POINTS = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=12)


def test_the_standard_error_of_three_by_hand():
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / math.sqrt(3))
    assert standard_error([5.0]) is None
    assert Estimate.of([1.0, 2.0, 3.0]) == Estimate(2.0, pytest.approx(1 / math.sqrt(3)), 3)


@settings(max_examples=50)
@given(st.lists(NUMBERS, min_size=2, max_size=20), NUMBERS, st.floats(0.1, 10))
def test_the_standard_error_is_free_of_shift_and_grows_with_scale(values, shift, scale):
    moved = standard_error([scale * value + shift for value in values])
    assert moved == pytest.approx(scale * standard_error(values), abs=1e-6)


def test_a_value_is_interpolated_where_the_level_is_first_reached():
    points = [(0.2, 1.0), (0.3, 0.8), (0.25, 0.7), (0.4, 0.1)]
    assert value_at(points, 0.25) == pytest.approx(0.9)
    assert value_at(points, 0.3) == pytest.approx(0.8)
    assert value_at(points, 0.325) == pytest.approx(0.4)
    assert value_at(points, 0.1) == 1.0
    assert value_at(points, 0.41) is None
    assert value_at([], 0.1) is None


@settings(max_examples=50)
@given(POINTS, NUMBERS)
def test_a_value_exists_just_where_the_level_is_reached_and_lies_among_the_values(points, level):
    value = value_at(points, level)
    assert (value is None) == (max(x for x, _ in points) < level)
    if value is not None:
        ys = [y for _, y in points]
        assert min(ys) - 1e-9 <= value <= max(ys) + 1e-9


@settings(max_examples=50)
@given(POINTS, NUMBERS, NUMBERS)
def test_a_straight_line_is_read_off_exactly(points, slope, offset):
    assume(len({x for x, _ in points}) > 1)
    line = [(x, slope * x + offset) for x in sorted({x for x, _ in points})]
    middle = (line[0][0] + line[-1][0]) / 2
    assert value_at(line, middle) == pytest.approx(slope * middle + offset, abs=1e-6)


def test_the_common_level_is_the_lowest_peak_of_those_that_learn():
    good, worse, idle = [(0.1, 1.0), (0.5, 0.5), (0.4, 0.4)], [(0.1, 1.0), (0.3, 0.9)], [(0.1, 1.0), (0.1, 1.0)]
    assert common_level({"a": [good], "b": [good, worse]}) == 0.3
    assert common_level({"a": [good], "idle": [good, idle]}) == 0.5
    assert common_level({"idle": [idle]}) is None and common_level({"a": [[]]}) is None


SHORT = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=4)


@settings(max_examples=30)
@given(st.dictionaries(st.sampled_from("abc"), st.lists(SHORT, min_size=1, max_size=2), min_size=1))
def test_every_arm_that_learns_reaches_the_common_level(trajectories):
    level = common_level(trajectories)
    for seeds in trajectories.values():
        if all(max(x for x, _ in points) > points[0][0] for points in seeds):
            assert level is not None and all(value_at(points, level) is not None for points in seeds)


def test_the_pareto_front_by_hand():
    assert pareto_front([(1, 1), (3, 1), (2, 2), (1, 3), (2, 1)]) == [3, 2, 1]
    assert pareto_front([(1, 1), (1, 1)]) == [0, 1]


@settings(max_examples=50)
@given(POINTS)
def test_the_front_holds_no_beaten_point_and_beats_every_other(points):
    front = pareto_front(points)
    ends = [points[index] for index in front]
    assert ends == sorted(ends) and [y for _, y in ends] == sorted((y for _, y in ends), reverse=True)
    for index, (x, y) in enumerate(points):
        beaten = any(a >= x and b >= y and (a, b) != (x, y) for a, b in ends)
        assert beaten != (index in front)

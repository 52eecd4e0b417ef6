import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedbe.allocation.scores import (
    LEAST,
    GradientScore,
    LabelDivergenceScore,
    LossScore,
    RandomScore,
    Score,
    StaticScore,
)
from fedbe.errors import ConfigError, Facts, UpdateError

CLIENTS = ["a", "b", "c"]
BLOCKS = ["low", "middle", "high"]
LABELS = {"a": [4, 0], "b": [0, 4], "c": [2, 2]}


def ready(score):
    score.setup(CLIENTS, BLOCKS, seed=3, label_shares=LABELS)
    return score


def report(score, client, norms, round_index=0, before=None, after=None):
    """As the server does: nothing is observed that the score would refuse."""
    score.check_report(client, norms, before, after)
    score.observe(client, norms, before, after, round_index)


ALL_SCORES = [GradientScore, LossScore, LabelDivergenceScore, RandomScore, StaticScore]


@pytest.mark.parametrize("kind", ALL_SCORES)
def test_a_score_is_finite_not_negative_and_continues_from_its_state(kind):
    score = ready(kind())
    score.probe("a", {"low": 1.0, "middle": 0.0, "high": 2.0})
    report(score, "a", {"low": 3.0}, 0, before=2.0, after=1.0)
    report(score, "b", {"middle": 0.5, "high": 0.1}, 1, before=2.0, after=2.5)
    values = score.values(["c", "a"], 2)
    assert values.shape == (2, 3)
    assert np.isfinite(values).all() and (values >= 0).all()
    again = ready(kind())
    again.load_state_dict(json.loads(json.dumps(score.state_dict())))
    for continued in (score, again):
        report(continued, "c", {"low": 1.0}, 3, before=1.0, after=0.5)
    assert np.array_equal(score.values(CLIENTS, 4), again.values(CLIENTS, 4))


@pytest.mark.parametrize("kind", ALL_SCORES)
def test_within_a_round_the_order_of_reports_and_of_the_cohort_does_not_matter(kind):
    reports = {"a": {"low": 0.3, "high": 0.7}, "b": {"low": 1.1}, "c": {"middle": 0.9}}
    first, second = ready(kind()), ready(kind())
    for score, order in ((first, "abc"), (second, "cba")):
        for round_index in range(3):
            for client in order:
                report(score, client, reports[client], round_index, before=2.0, after=1.7)
    assert np.array_equal(first.values(CLIENTS, 3), second.values(CLIENTS[::-1], 3)[::-1])


def test_gradient_norms_are_averaged_and_relative_to_the_clients_mean():
    score = ready(GradientScore(decay=0.75, rarity=0.0))
    score.probe("a", {"low": 4.0, "high": 2.0})
    report(score, "a", {"low": 8.0})  # 0.75 · 4 + 0.25 · 8 = 5
    assert score.values(["a", "b"], 1) == pytest.approx(np.array([[5 / 3.5, 1.0, 2 / 3.5], [1.0, 1.0, 1.0]]))


def test_without_a_probe_the_first_report_is_taken_as_it_is():
    score = ready(GradientScore(rarity=0.0))
    report(score, "a", {"low": 1.0, "middle": 3.0})
    assert score.values(["a"], 1) == pytest.approx(np.array([[0.5, 1.5, 1.0]]))


def test_no_block_is_written_off():
    score = ready(GradientScore(rarity=0.0))
    report(score, "a", {"low": 0.0, "middle": 1.0})
    report(score, "b", {"low": 0.0})
    assert score.values(["a", "b"], 1) == pytest.approx(np.array([[LEAST, 2.0, 1.0], [1.0, 1.0, 1.0]]))


def test_blocks_that_few_clients_trained_lately_get_a_bonus_that_fades():
    score = ready(GradientScore(decay=0.5, rarity=1.0))
    for client in ("a", "b"):
        report(score, client, {"high": 1.0}, 0)
    # Two trainers a round ago count 1: n = (0, 0, 1), its mean 1/3.
    assert score.values(["c"], 1) == pytest.approx(np.array([[4 / 3, 4 / 3, 2 / 3]]))
    far = score.values(["c"], 30)
    assert far == pytest.approx(np.ones((1, 3)), abs=1e-6)


def test_the_fall_of_the_loss_is_split_among_the_blocks_that_trained():
    score = ready(LossScore(decay=0.0))
    report(score, "a", {"low": 1.0, "middle": 1.0}, 0, before=2.0, after=1.2)  # 0.4, 0.2 for each
    report(score, "a", {"high": 1.0}, 1, before=1.0, after=0.4)  # 0.6
    assert score.values(["a"], 2) == pytest.approx(np.array([[0.6, 0.6, 1.8]]))
    report(score, "a", {"high": 1.0}, 2, before=1.0, after=1.5)  # a rise counts 0
    assert score.values(["a"], 3) == pytest.approx(np.array([[1.5, 1.5, LEAST]]))


def test_unmeasured_losses_teach_nothing():
    score = ready(LossScore())
    report(score, "a", {"low": 1.0})
    assert (score.values(["a"], 1) == 1).all()


@pytest.mark.parametrize("norms", [{"low": math.nan}, {"low": math.inf}, {"elsewhere": 1.0}])
def test_a_number_that_is_none_or_an_unknown_block_is_an_error_with_a_name(norms):
    with pytest.raises(UpdateError, match="'a'"):
        report(ready(GradientScore()), "a", norms)


def test_a_loss_that_is_no_number_is_an_error_with_a_name():
    with pytest.raises(UpdateError, match="'a'"):
        report(ready(LossScore()), "a", {"low": 1.0}, before=1.0, after=math.nan)


weird = st.sampled_from([0.0, -1.0, 5e-324, 1e-9, 2.0, 1e308, -1e308, math.inf, -math.inf, math.nan])
losses = st.none() | weird


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("kind", ALL_SCORES)
@given(
    reports=st.lists(st.tuples(st.dictionaries(st.sampled_from([*BLOCKS, "gone"]), weird), losses, losses), max_size=9)
)
def test_whatever_passes_the_check_is_observed_without_an_error_and_what_does_not_leaves_nothing(kind, reports):
    score = ready(kind())
    for number, (norms, before, after) in enumerate(reports):
        state = json.dumps(score.state_dict())
        try:
            score.check_report("a", norms, before, after)
        except UpdateError as error:
            assert "'a'" in str(error) and json.dumps(score.state_dict()) == state
        else:
            score.observe("a", norms, before, after, number)
            values = score.values(CLIENTS, number)
            assert np.isfinite(values).all() and (values >= 0).all()


@pytest.mark.parametrize("kind", ALL_SCORES)
def test_only_scores_that_do_not_learn_leave_reports_alone(kind):
    assert bool(kind().needs) == (kind not in (RandomScore, StaticScore))
    assert kind.probe_fields == ({"labels"} if kind is LabelDivergenceScore else set())


def test_unusual_labels_tilt_a_client_towards_high_blocks():
    """All labels together are even: a and b are ½ away, c not at all."""
    values = ready(LabelDivergenceScore(strength=0.8)).values(CLIENTS, 0)
    assert values == pytest.approx(np.array([[0.6, 1.0, 1.4], [0.6, 1.0, 1.4], [1.0, 1.0, 1.0]]))
    turned = ready(LabelDivergenceScore(strength=-0.8)).values(["a"], 0)
    assert turned == pytest.approx(np.array([[1.4, 1.0, 0.6]]))


def test_larger_clients_weigh_more_in_the_distribution_of_all_labels():
    score = LabelDivergenceScore()
    score.setup(["large", "small"], BLOCKS, 0, {"large": [30, 0], "small": [0, 10]})
    assert score.divergences == pytest.approx({"large": 0.25, "small": 0.75})


@pytest.mark.parametrize("labels", [None, {"a": [1, 1]}, LABELS | {"c": [0, 0]}, LABELS | {"c": [1, 1, 1]}])
def test_label_divergence_needs_the_labels_of_all_clients(labels):
    with pytest.raises(ConfigError, match="LabelDivergenceScore"):
        LabelDivergenceScore().setup(CLIENTS, BLOCKS, 0, labels)


def test_random_values_depend_on_seed_round_and_client_only():
    score, other = ready(RandomScore()), RandomScore()
    other.setup(CLIENTS, BLOCKS, seed=4)
    values = score.values(CLIENTS, 5)
    assert np.array_equal(values[[2]], score.values(["c"], 5))
    assert not np.isclose(values, score.values(CLIENTS, 6)).any()
    assert not np.isclose(values, other.values(CLIENTS, 5)).any()
    assert len(set(values.ravel())) == 9


@pytest.mark.parametrize(
    ("given", "row"),
    [("even", [1, 1, 1]), ("top-first", [1, 2, 3]), ("bottom-first", [3, 2, 1]), ([0.5, 0.0, 2.0], [0.5, 0.0, 2.0])],
)
def test_static_values_are_the_same_for_all(given, row):
    assert ready(StaticScore(given)).values(["a", "b"], 7).tolist() == [row, row]


def test_static_values_need_one_number_for_each_block():
    with pytest.raises(ConfigError, match="3 blocks"):
        ready(StaticScore([1.0, 2.0]))


@pytest.mark.parametrize(
    ("score", "keys"),
    [
        (GradientScore(), []),
        (GradientScore(decay=1.0, rarity=-1.0), ["s.init_args.decay", "s.init_args.rarity"]),
        (GradientScore(rarity=math.inf), ["s.init_args.rarity"]),
        (LossScore(decay=-0.1), ["s.init_args.decay"]),
        (LabelDivergenceScore(strength=1.0), ["s.init_args.strength"]),
        (LabelDivergenceScore(strength=-0.5), []),
        (RandomScore(), []),
        (StaticScore("bottom-first"), []),
        (StaticScore("sideways"), ["s.init_args.values"]),
        (StaticScore([0.0, 0.0]), ["s.init_args.values"]),
        (StaticScore([1.0, math.nan]), ["s.init_args.values"]),
    ],
)
def test_numbers_outside_their_range_are_problems(score, keys):
    assert [problem.key for problem in score.check("s.init_args", Facts())] == keys


def test_a_score_of_ones_own_needs_values_only():
    class Mine(Score):
        def values(self, cohort, round_index):
            return np.full((len(cohort), len(self.block_names)), 2.0)

    score = ready(Mine())
    report(score, "a", {"low": 1.0})
    assert score.values(["a"], 0).tolist() == [[2.0, 2.0, 2.0]]
    assert score.state_dict() == {} and score.check("s", Facts()) == []

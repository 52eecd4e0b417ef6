"""Where blocks go: the clients' weights and agreement, the picks, the controls, the picture."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedbe.errors import Facts, UpdateError
from fedbe.expansion.placement import (
    AdaptivePlacement,
    Choice,
    FixedPlacement,
    Placement,
    RandomPlacement,
    appraise,
    share_left,
)
from fedbe.figures.placement import placement_figure
from fedbe.messages import ProbeReport
from fedbe.seeding import generator

SCORES = (1.0, 4.0, 3.9, 1.0, 2.0, 0.1)


def report(*scores: float, client: str = "a", samples: int = 1, sketch: Any = None) -> ProbeReport:
    return ProbeReport(client, scores, samples, sketch)


def test_scores_are_weighted_by_samples() -> None:
    appraisals = appraise([report(1.0, 2.0, samples=30), report(5.0, 0.0, client="b", samples=10)], 2)
    assert [reason.score for reason in appraisals] == [2.0, 1.5]
    assert [reason.agreement for reason in appraisals] == [1.0, 1.0]


def test_score_times_agreement_is_the_norm_of_the_mean_gradient() -> None:
    gradients = torch.randn(3, 2, 5, generator=generator(0)).double()
    samples = torch.tensor([1.0, 5.0, 2.0]).double()
    reports = [
        report(*g.norm(dim=-1).tolist(), client=str(k), samples=int(n), sketch=tuple(map(tuple, g.tolist())))
        for k, (g, n) in enumerate(zip(gradients, samples, strict=True))
    ]
    appraisals = appraise(reports, 2)
    mean = torch.einsum("k,kpd->pd", samples / samples.sum(), gradients)
    gains = torch.tensor([reason.gain for reason in appraisals]).double()
    torch.testing.assert_close(gains, mean.norm(dim=-1))
    assert appraise(reports[::-1], 2) == appraisals


def test_agreement_spans_from_opposite_to_equal_clients() -> None:
    one = report(2.0, 1.0, 0.0, sketch=((2.0, 0.0), (1.0, 0.0), (0.0, 0.0)))
    other = report(2.0, 1.0, 0.0, client="b", sketch=((-2.0, 0.0), (1.0, 0.0), (0.0, 0.0)))
    assert [reason.agreement for reason in appraise([one, other], 3)] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("reports", "message"),
    [
        ([], "no client reported"),
        ([report(1.0, 2.0, samples=0)], "client 'a' reports 0 samples"),
        ([report(1.0)], "client 'a' sent 1 scores for 2 positions"),
        ([report(1.0, math.nan)], "client 'a' sent a probe with values that are not finite"),
        ([report(1.0, 1.0), report(1.0, 1.0, client="b", sketch=((1.0,), (1.0,)))], "client 'b' sent a sketch"),
        ([report(1.0, 1.0, sketch=((1.0,), (1.0, 2.0)))], "client 'a' sent a sketch"),
        ([report(1.0, 1.0, sketch=((1.0,),))], "client 'a' sent a sketch"),
        ([report(1.0, 1.0, sketch=((1.0,), (math.inf,)))], "not finite"),
    ],
)
def test_unusable_report_is_an_error_with_a_name(reports: list[ProbeReport], message: str) -> None:
    with pytest.raises(UpdateError, match=message):
        appraise(reports, 2)


@pytest.mark.parametrize("costs", [[1.0], [1.0, 0.0], [1.0, math.inf]])
def test_impossible_costs_are_refused(costs: list[float]) -> None:
    with pytest.raises(ValueError, match="give 2 positive numbers"):
        appraise([report(1.0, 1.0)], 2, costs)


def test_picks_by_hand() -> None:
    choice = AdaptivePlacement(max_blocks=6, spacing=1.0, threshold=0.3).choose([report(*SCORES)], 6)
    # 4.0 first. Left then: 3.9·(1 − 1/e) = 2.465 at 2, and 2·(1 − 1/e³) = 1.900 at 4. After 2 it is 1.900·(1 − 1/e²)
    # = 1.643 at 4; after 4 the most is 1·(1 − 1/e)(1 − 1/e²)(1 − 1/e⁴) = 0.537 at 0, under 0.3 · 4.0.
    assert choice.positions == (1, 2, 4)
    orders = {reason.position: (reason.order, round(reason.gain or 0, 3)) for reason in choice.reasons}
    assert orders[1] == (1, 4.0) and orders[2] == (2, 2.465) and orders[4] == (3, 1.643)
    assert orders[0] == (None, 0.537) and "under the threshold of 30%" in choice.reasons[0].why
    assert "41% as much per cost as the first" in choice.reasons[4].why
    assert [reason.position for reason in choice.reasons] == list(range(6))


def test_spacing_keeps_equal_positions_apart() -> None:
    flat = [report(*[1.0] * 12)]
    near = AdaptivePlacement(max_blocks=4, spacing=0, threshold=0).choose(flat, 12)
    apart = AdaptivePlacement(max_blocks=4, spacing=2.0, threshold=0).choose(flat, 12)
    assert near.positions == (8, 9, 10, 11)
    assert apart.positions == (0, 3, 6, 11)


def test_cost_moves_the_choice() -> None:
    placement, reports = AdaptivePlacement(max_blocks=1), [report(3.0, 2.5, 2.0)]
    assert placement.choose(reports, 3).positions == (0,)
    assert placement.choose(reports, 3, [3.0, 2.0, 1.0]).positions == (2,)


def test_fewest_and_most_blocks_hold_in_any_case() -> None:
    steep = [report(1.0, 0.001, 0.001, 0.001)]
    assert AdaptivePlacement(threshold=1.0).choose(steep, 4).positions == (0,)
    assert len(AdaptivePlacement(min_blocks=3, threshold=1.0).choose(steep, 4).positions) == 3
    most = AdaptivePlacement(max_blocks=2, threshold=0.0).choose(steep, 4)
    assert len(most.positions) == 2 and "there are 2 blocks already" in most.reasons[1].why
    assert AdaptivePlacement(threshold=0.0).choose([report(0.0, 0.0)], 2).positions == (1,)


positive = st.floats(0.01, 10)


@given(
    st.lists(positive, min_size=1, max_size=10), st.integers(1, 10), st.floats(0, 4), st.floats(0, 1), st.integers(1, 3)
)
def test_marginal_gains_per_cost_fall_and_pay(
    scores: list[float], most: int, spacing: float, threshold: float, least: int
) -> None:
    placement = AdaptivePlacement(most, min(least, most), spacing, threshold)
    choice = placement.choose([report(*scores)], len(scores))
    assert min(least, most, len(scores)) <= len(choice.positions) <= min(most, len(scores))
    taken = sorted((reason for reason in choice.reasons if reason.order), key=lambda reason: reason.order or 0)
    assert sorted(reason.position for reason in taken) == list(choice.positions)
    gains = [reason.gain or 0.0 for reason in taken]
    assert gains == sorted(gains, reverse=True) and gains[0] == max(scores)
    assert all(gain >= threshold * gains[0] for gain in gains[least:])
    assert Choice.from_dict(json.loads(json.dumps(choice.to_dict()))) == choice


@given(st.integers(0, 9), st.lists(st.integers(0, 9), max_size=5), st.floats(0, 5))
def test_each_block_leaves_less_and_the_nearest_leaves_least(position: int, taken: list[int], spacing: float) -> None:
    share = share_left(position, taken, spacing)
    assert 0 <= share <= 1 and (share == 0 or position not in taken)
    assert share_left(position, [*taken, position], spacing) == 0
    assert share_left(position, [*taken, 4], spacing) <= share
    assert share_left(0, [1], spacing) <= share_left(0, [2], spacing)


def test_next_position_is_what_a_longer_choice_takes_next() -> None:
    placement = AdaptivePlacement(max_blocks=2, threshold=0.0)
    choice = placement.choose([report(*SCORES)], 6, [1.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    longer = AdaptivePlacement(max_blocks=6, threshold=0.0).choose([report(*SCORES)], 6, [1.0, 2.0, 1.0, 1.0, 1.0, 1.0])
    order = [r.position for r in sorted(longer.reasons, key=lambda reason: reason.order or 0)]
    taken = list(choice.positions)
    while (position := placement.next_position(choice, taken)) is not None:
        taken.append(position)
    assert set(taken[:2]) == set(order[:2]) and taken[2:] == order[2:] and len(taken) == 6


def test_fixed_placement_listens_to_nobody_and_does_not_grow() -> None:
    placement = FixedPlacement([2, 0, 2])
    choice = placement.choose([], 4)
    assert choice.positions == (0, 2, 2) and not placement.needs
    assert placement.next_position(choice, choice.positions) is None
    assert [reason.why for reason in choice.reasons] == ["given", "not given", "given", "not given"]
    assert FixedPlacement(2).choose([], 4).positions == (1, 3)


def test_random_placement_depends_on_the_seed_alone() -> None:
    placement = RandomPlacement(2)
    choices = []
    for seed in range(20):
        placement.seed = seed
        choices.append(placement.choose([], 6))
        assert placement.choose([report(*SCORES)], 6) == choices[-1]
        assert len(set(choices[-1].positions)) == 2
    assert len({choice.positions for choice in choices}) > 5


def test_random_placement_grows_in_the_order_drawn() -> None:
    placement = RandomPlacement(2)
    placement.seed = 3
    choice, taken = placement.choose([], 5), set(placement.choose([], 5).positions)
    following = placement.next_position(choice, taken)
    assert following is not None and {*taken, following} == set(
        RandomPlacement.choose(_with_seed(3, 3), [], 5).positions
    )
    assert placement.next_position(choice, range(5)) is None


def _with_seed(blocks: int, seed: int) -> RandomPlacement:
    placement = RandomPlacement(blocks)
    placement.seed = seed
    return placement


@pytest.mark.parametrize(
    ("placement", "keys"),
    [
        (AdaptivePlacement(), []),
        (AdaptivePlacement(0, 1, -1.0, 1.5), ["max_blocks", "min_blocks", "spacing", "threshold"]),
        (AdaptivePlacement(9, 10, math.inf, math.nan), ["min_blocks", "spacing", "threshold"]),
        (FixedPlacement([0, 3]), []),
        (FixedPlacement([4]), ["positions"]),
        (FixedPlacement(0), ["positions"]),
        (RandomPlacement(4), []),
        (RandomPlacement(5), ["blocks"]),
    ],
)
def test_arguments_out_of_range_are_reported_all_at_once(placement: Placement, keys: list[str]) -> None:
    assert [problem.key for problem in placement.check("x.placement.init_args", Facts(depth=4))] == [
        f"x.placement.init_args.{k}" for k in keys
    ]


def test_picture_shows_gains_order_and_disagreement() -> None:
    sketches = (((1.0,),) * 6, ((-0.5,),) * 6)
    reports = [report(*SCORES, client=name, sketch=sketch) for name, sketch in zip("ab", sketches, strict=True)]
    choice = AdaptivePlacement().choose(reports, 6)
    figure = placement_figure(choice)
    assert figure is not None
    (panel,) = figure.axes
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["taken, in this order", "left", "clients disagree"]
    numbers = {round(text.xy[0]): text.get_text() for text in panel.texts}
    assert numbers == {reason.position: str(reason.order) for reason in choice.reasons if reason.order}
    heights = {round(bar.get_x() + bar.get_width() / 2): bar.get_height() for bar in panel.patches[:6]}
    expected = {reason.position: (reason.score or 0) * (reason.agreement or 0) for reason in choice.reasons}
    assert heights == pytest.approx(expected)
    agreeing = AdaptivePlacement().choose([replace(reports[0], sketch=None)], 6)
    assert [text.get_text() for text in placement_figure(agreeing).legends[0].get_texts()] == labels[:2]  # type: ignore[union-attr]
    assert placement_figure(FixedPlacement(2).choose([], 6)) is None

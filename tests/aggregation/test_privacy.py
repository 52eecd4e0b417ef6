"""What ε counts is what happened, and agrees with other ways to compute it."""

import math

import pytest
import torch
from scipy.optimize import brentq
from scipy.stats import norm

from fedbe.aggregation import PrivateMean
from fedbe.aggregation.averaging import clipped_changes
from fedbe.aggregation.privacy import epsilon, system_noise
from fedbe.messages import Update

DELTA = 1e-5
ORDERS = range(2, 257)


def gaussian_epsilon(noise, rounds):
    """ε of the Gaussian mechanism in closed form (Balle and Wang, arXiv 1805.06530); clients may be exchanged."""
    size = 2 * math.sqrt(rounds) / noise

    def excess(e):
        return norm.cdf(size / 2 - e / size) - math.exp(e) * norm.cdf(-size / 2 - e / size) - DELTA

    return brentq(excess, 0.0, 700.0)


def converted(renyi, rounds):
    """ε from the Rényi divergences of one round by order (arXiv 2004.00010, proposition 12)."""
    return min(
        rounds * value + math.log1p(-1 / order) - math.log(DELTA * order) / (order - 1)
        for order, value in renyi.items()
    )


def bound_written_out(noise, fraction, rounds):
    """From above: Wang, Balle and Kasiviswanathan (arXiv 1808.00087), theorem 9, in logarithms."""

    def renyi(order):
        single = [j * (2 / noise) ** 2 / 2 for j in range(order + 1)]
        choose = [math.lgamma(order + 1) - math.lgamma(j + 1) - math.lgamma(order - j + 1) for j in range(order + 1)]
        second = min(4 * math.expm1(single[2]), 2 * math.exp(single[2]))
        terms = [0.0, 2 * math.log(fraction) + choose[2] + math.log(second)]
        terms += [j * math.log(fraction) + choose[j] + (j - 1) * single[j] + math.log(2) for j in range(3, order + 1)]
        return torch.logsumexp(torch.tensor(terms, dtype=torch.float64), 0).item() / (order - 1)

    return converted({order: renyi(order) for order in ORDERS}, rounds)


def one_case_integrated(noise, fraction, rounds):
    """From below: all other clients change nothing, the exchanged one changes by the bound, one way or the other."""
    x = torch.linspace(-60, 60, 200_001, dtype=torch.float64)

    def log_density(shift):
        parts = [math.log(1 - fraction) - x.square() / 2, math.log(fraction) - (x - shift).square() / 2]
        return torch.logaddexp(*parts) - math.log(2 * math.pi) / 2

    one, other = log_density(1 / noise), log_density(-1 / noise)
    step = math.log(x[1] - x[0])

    def renyi(order):
        return (torch.logsumexp(order * one + (1 - order) * other, 0).item() + step) / (order - 1)

    return converted({order: renyi(order) for order in range(2, 65)}, rounds)


@pytest.mark.parametrize(("noise", "rounds"), [(4.0, 1), (8.0, 10), (20.0, 100), (2.0, 3)])
def test_of_all_clients_in_each_round_it_is_little_above_the_closed_form(noise, rounds):
    pytest.importorskip("dp_accounting")
    exact = gaussian_epsilon(noise, rounds)
    assert exact <= epsilon(noise, {(20, 20): rounds}, DELTA) <= 1.2 * exact


@pytest.mark.parametrize(
    ("noise", "asked", "present", "rounds"), [(4.0, 5, 100, 100), (8.0, 10, 1000, 500), (3.0, 2, 10, 20)]
)
def test_of_clients_that_are_drawn_it_lies_between_a_case_integrated_and_a_bound_written_out(
    noise, asked, present, rounds
):
    pytest.importorskip("dp_accounting")
    found, fraction = epsilon(noise, {(asked, present): rounds}, DELTA), asked / present
    low, high = one_case_integrated(noise, fraction, rounds), bound_written_out(noise, fraction, rounds)
    assert low <= found <= high <= 1.4 * found


def test_a_round_counts_by_who_was_there_and_who_was_asked():
    pytest.importorskip("dp_accounting")

    def after(*rounds):
        rule = PrivateMean(1.0, 4.0)
        rule.setup(clients=100, cohort=5, seed=0)
        for asked, present in rounds:
            rule.asked(asked, present)
        return rule.figures(20)["epsilon"]

    plain = after(*[(5, 100)] * 20)
    assert after() == plain
    assert plain < after(*[(5, 50)] * 20) < after(*[(5, 5)] * 20) == after(*[(7, 5)] * 20)
    assert plain < after(*[(10, 100)] * 20)
    assert after(*[(5, 5)] * 20) == pytest.approx(epsilon(4.0, {(1, 1): 20}, 1e-5))
    assert plain < after((5, 5), *[(5, 100)] * 19)


def test_what_was_counted_is_kept_over_an_interruption():
    pytest.importorskip("dp_accounting")
    whole, continued = PrivateMean(1.0, 4.0), PrivateMean(1.0, 4.0)
    for rule in (whole, continued):
        rule.setup(clients=100, cohort=5, seed=0)
    whole.asked(9, 20)
    continued.load_state_dict(whole.state_dict())
    for rule in (whole, continued):
        rule.asked(5, 40)
    assert continued.figures(2) == whole.figures(2)


def test_noise_is_nobody_s_to_repeat_unless_that_was_asked_for():
    state = {"a": torch.zeros(300, 300), "b": torch.zeros(300, 300)}
    results = []
    for reproducible in (False, False, True, True):
        rule = PrivateMean(2.0, 1.5, reproducible=reproducible)
        rule.setup(clients=100, cohort=10, seed=3)
        results.append(rule.begin(state, 0).result())
    assert not torch.equal(results[0]["a"], results[1]["a"]) and torch.equal(results[2]["a"], results[3]["a"])
    for result in results:
        assert not torch.equal(result["a"], result["b"])
        assert result["a"].std().item() == pytest.approx(0.3, rel=0.02)


def test_system_noise_is_normal():
    noise = system_noise(torch.Size([400, 250])).double()
    assert noise.dtype == torch.float64 and noise.isfinite().all()
    for point in (-2.0, -1.0, 0.0, 0.5, 1.5, 2.5):
        assert (noise < point).double().mean().item() == pytest.approx(norm.cdf(point), abs=6e-3)
    assert system_noise(torch.Size([0])).shape == (0,) and system_noise(torch.Size([])).shape == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_change_is_no_longer_than_the_bound_whatever_the_state_s_type(dtype):
    state = {"a": torch.ones(100_000, dtype=dtype), "b": torch.full((7,), 3.0, dtype=dtype)}
    sent = Update("c", {name: tensor + 0.25 for name, tensor in state.items()}, 1)
    changes = clipped_changes(sent, state, bound=0.5)
    assert all(change.dtype == torch.float32 for change in changes.values())
    assert sum(change.double().square().sum() for change in changes.values()).sqrt() <= 0.5 * (1 + 1e-6)

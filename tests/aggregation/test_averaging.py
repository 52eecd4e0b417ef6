import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedbe.aggregation import CoordinateMedian, HolderMean, Krum, NormClipping, PrivateMean, SampleWeighted, TrimmedMean
from fedbe.aggregation.averaging import clip_update, krum_scores, squared_distances
from fedbe.errors import Facts, UpdateError
from fedbe.messages import Update
from fedbe.seeding import generator

ROBUST = [CoordinateMedian(), TrimmedMean(0.2), Krum(1), Krum(1, take=3), NormClipping(5.0)]


def updates(count: int, seed: int, holders: int | None = None) -> list[Update]:
    chance = generator(seed, "test")
    every = [Update(f"c{k}", {"a": torch.randn(3, 2, generator=chance)}, 1 + k) for k in range(count)]
    return every[:holders]


def averaged(rule, sent, state=None):
    aggregator = rule.begin(state or {"a": torch.zeros(3, 2), "b": torch.ones(2)}, 0)
    for update in sent:
        aggregator.add(update)
    return aggregator.result()


def named(value):
    """The name of a case, the same in every process."""
    return value if isinstance(value, str) else type(value).__name__


@pytest.mark.parametrize("rule", ROBUST, ids=named)
@given(count=st.integers(1, 8), seed=st.integers(0, 100))
def test_clients_that_agree_are_believed_and_what_nobody_trained_stays(rule, count, seed):
    same = updates(1, seed)[0]
    mean = averaged(rule, [Update(f"c{k}", same.tensors, 3) for k in range(count)])
    torch.testing.assert_close(mean["a"], clip_update(same, {"a": torch.zeros(3, 2)}, 5.0).tensors["a"])
    assert torch.equal(mean["b"], torch.ones(2))


@pytest.mark.parametrize("rule", [CoordinateMedian(), TrimmedMean(0.2), Krum(2), Krum(2, take=4)], ids=named)
@given(count=st.integers(10, 14), seed=st.integers(0, 100), size=st.sampled_from([1e2, 1e6, 1e12]))
def test_two_hostile_clients_of_ten_cannot_move_the_result_out_of_the_others_range(rule, count, seed, size):
    good = updates(count - 2, seed)
    bad = [Update(f"evil{k}", {"a": torch.full((3, 2), sign * size)}, 10_000) for k, sign in ((0, 1), (1, -1))]
    result = averaged(rule, [bad[0], *good, bad[1]])["a"]
    values = torch.stack([update.tensors["a"] for update in good])
    assert (result >= values.min(0).values - 1e-5).all() and (result <= values.max(0).values + 1e-5).all()
    # Samples of a hostile client would win the ordinary mean.
    assert averaged(SampleWeighted(), [*good, bad[0]])["a"].abs().min() > 50


@given(count=st.integers(1, 9), seed=st.integers(0, 100))
def test_the_median_is_the_middle_value(count, seed):
    sent = updates(count, seed)
    values = torch.stack([update.tensors["a"] for update in sent])
    torch.testing.assert_close(averaged(CoordinateMedian(), sent)["a"], values.quantile(0.5, dim=0))


@given(count=st.integers(1, 9), seed=st.integers(0, 100))
def test_nothing_trimmed_is_the_plain_mean(count, seed):
    sent = updates(count, seed)
    values = torch.stack([update.tensors["a"] for update in sent])
    torch.testing.assert_close(averaged(TrimmedMean(0.1), sent)["a"], values.mean(0))


@given(count=st.integers(4, 9), seed=st.integers(0, 100), malicious=st.integers(0, 3))
def test_krum_s_scores_are_those_of_the_rule_written_out(count, seed, malicious):
    values = torch.stack([update.tensors["a"].flatten() for update in updates(count, seed)])
    near = max(1, count - malicious - 2)
    for k in range(count):
        distances = sorted(float((values[k] - values[j]).square().sum()) for j in range(count) if j != k)
        assert krum_scores(squared_distances(values), malicious)[k].item() == pytest.approx(
            sum(distances[:near]), rel=1e-4
        )


def test_multi_krum_of_all_is_the_sample_weighted_mean_and_of_one_client_that_client():
    sent = updates(5, 0)
    torch.testing.assert_close(averaged(Krum(1, take=5), sent)["a"], averaged(SampleWeighted(), sent)["a"])
    assert torch.equal(averaged(Krum(1), sent[:1])["a"], sent[0].tensors["a"])


@given(seed=st.integers(0, 100), bound=st.floats(0.1, 10))
def test_clipping_shortens_the_whole_change_and_keeps_its_direction(seed, bound):
    state = {"a": torch.full((3, 2), 7.0), "b": torch.zeros(4)}
    sent = Update("c", {"a": 7 + updates(1, seed)[0].tensors["a"], "b": torch.randn(4)}, 1)
    clipped = clip_update(sent, state, bound)
    before, after = (torch.cat([(u.tensors[n] - state[n]).flatten() for n in state]) for u in (sent, clipped))
    assert after.norm() <= bound * 1.0001 and after.norm() <= before.norm() * 1.0001
    assert torch.nn.functional.cosine_similarity(before, after, dim=0) > 0.9999
    if before.norm() <= bound:
        assert clipped is sent


def test_the_default_is_the_holders_mean_to_the_bit():
    sent = updates(4, 1)
    reference = HolderMean({"a": torch.zeros(3, 2)})
    for update in sent:
        reference.add(update)
    assert torch.equal(averaged(SampleWeighted(), sent)["a"], reference.result()["a"])


@pytest.mark.parametrize("rule", ROBUST, ids=named)
def test_broken_updates_are_refused_by_every_rule(rule):
    with pytest.raises(UpdateError, match="not finite"):
        rule.begin({"a": torch.zeros(3, 2)}, 0).check(Update("c", {"a": torch.full((3, 2), float("nan"))}, 1))


@pytest.mark.parametrize(
    ("rule", "key"),
    [
        (NormClipping(0.0), "bound"), (TrimmedMean(0.5), "share"), (Krum(-1), "malicious"), (Krum(1, 0), "take"),
        (PrivateMean(-1.0), "bound"), (PrivateMean(1.0, 0.0), "noise_multiplier"), (PrivateMean(1.0, delta=2), "delta"),
    ],
    ids=named,
)  # fmt: skip
def test_numbers_out_of_range_are_named(rule, key):
    assert f"federation.averaging.init_args.{key}" in [
        problem.key for problem in rule.check("federation.averaging.init_args", Facts())
    ]


def test_private_noise_has_the_deviation_asked_for_and_is_each_round_s_own():
    rule = PrivateMean(bound=2.0, noise_multiplier=1.5, reproducible=True)
    rule.setup(clients=100, cohort=10, seed=3)
    state = {"a": torch.zeros(200, 200)}
    first, again, second = (rule.begin(state, k).result()["a"] for k in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert first.std().item() == pytest.approx(2.0 * 1.5 / 10, rel=0.02)
    assert first.mean().abs() < 0.01


def test_a_private_mean_divides_by_the_cohort_whoever_trained_a_tensor():
    rule = PrivateMean(bound=1.0, noise_multiplier=1e-9)
    rule.setup(clients=100, cohort=10, seed=0)
    sent = [Update("c0", {"a": torch.full((3, 2), 100.0)}, 5), Update("c1", {"b": torch.tensor([1.0, 1.1])}, 500)]
    mean = averaged(rule, sent)
    torch.testing.assert_close(mean["a"].norm(), torch.tensor(0.1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mean["b"], torch.tensor([1.0, 1.01]), rtol=1e-4, atol=1e-5)


def test_epsilon_grows_with_rounds_and_shrinks_with_noise_and_rarer_clients():
    pytest.importorskip("dp_accounting")

    def epsilon(noise=4.0, clients=1000, cohort=20, rounds=100):
        rule = PrivateMean(1.0, noise)
        rule.setup(clients, cohort, 0)
        return rule.figures(rounds)["epsilon"]

    assert epsilon(noise=8.0) < epsilon() < epsilon(rounds=200)
    assert epsilon(clients=10_000) < epsilon() < epsilon(clients=20)
    # Everyone in every round is the Gaussian mechanism, of which the figure is known: sensitivity 2, T compositions.
    order = torch.arange(1.01, 200, 0.01).double()
    renyi = 100 * order * (2 / 4.0) ** 2 / 2
    bound = (renyi + torch.log1p(-1 / order) - (torch.log(torch.tensor(1e-5)) + order.log()) / (order - 1)).min()
    assert epsilon(clients=20) == pytest.approx(bound.item(), rel=0.02)


def test_krum_takes_one_client_s_whole_model_and_no_mixture():
    # Each client lies in the middle for one tensor and far out in another; c0 is the nearest as a whole.
    places = {"c0": (1.0, 1.0, 1.0), "c1": (0.0, 9.0, 2.0), "c2": (2.0, 0.0, 9.0), "c3": (9.0, 2.0, 0.0)}
    places["c4"] = (1.1, 1.1, 1.1)
    sent = [Update(c, {n: torch.full((4,), v) for n, v in zip("xyz", at, strict=True)}, 1) for c, at in places.items()]
    chosen = averaged(Krum(1), sent, {name: torch.zeros(4) for name in "xyz"})
    assert any(all(torch.equal(chosen[name], update.tensors[name]) for name in "xyz") for update in sent)
    flat = torch.stack([torch.cat([update.tensors[name] for name in "xyz"]) for update in sent])
    best = krum_scores(squared_distances(flat), 1).argmin()
    assert torch.equal(torch.cat([chosen[name] for name in "xyz"]), flat[best])


@pytest.mark.parametrize(
    ("rule", "least"),
    [(TrimmedMean(0.2), 5), (TrimmedMean(0.0), 1), (CoordinateMedian(), 3), (Krum(1), 5), (Krum(2), 7)],
)
def test_tensors_with_too_few_holders_to_withstand_anybody_are_counted(rule, least):
    for holders in (least - 1, least):
        sent = [Update(f"c{k}", {"a": torch.full((3, 2), float(k))}, 1) for k in range(holders)]
        averaged(rule, sent)
        assert rule.figures(1) == ({"unprotected_tensors": 1} if 0 < holders < least else {})

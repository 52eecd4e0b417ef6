import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedbe.aggregation import HolderMean
from fedbe.errors import UpdateError
from fedbe.messages import Update

STATE = {"a": torch.zeros(3), "b": torch.ones(2, 2)}


def update(client, samples, **tensors):
    return Update(client, tensors, samples)


def aggregate(updates, state=STATE):
    mean = HolderMean(state)
    for one in updates:
        mean.add(one)
    return mean.result()


def test_each_tensor_is_averaged_over_its_holders_by_samples():
    result = aggregate(
        [update("x", 1, a=torch.full((3,), 2.0)), update("y", 3, a=torch.full((3,), 6.0), b=torch.zeros(2, 2))]
    )
    assert torch.equal(result["a"], torch.full((3,), 5.0))
    assert torch.equal(result["b"], torch.zeros(2, 2))


def test_a_tensor_that_nobody_trained_keeps_its_value():
    assert torch.equal(aggregate([update("x", 1, a=torch.ones(3))])["b"], STATE["b"])


@given(st.integers(1, 10**6), st.integers(0, 1000))
def test_one_client_s_update_comes_out_to_the_bit(samples, seed):
    tensor = torch.randn(3, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(aggregate([update("x", samples, a=tensor)])["a"], tensor)


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=8), st.integers(0, 1000))
def test_equal_updates_come_out_to_the_bit(weights, seed):
    tensor = torch.randn(3, generator=torch.Generator().manual_seed(seed))
    result = aggregate([update(str(i), n, a=tensor) for i, n in enumerate(weights)])
    assert torch.equal(result["a"], tensor)


@given(st.lists(st.integers(1, 1000), min_size=2, max_size=8), st.integers(0, 1000), st.data())
def test_the_mean_equals_the_textbook_one_whatever_the_order(weights, seed, data):
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(3, generator=generator) for _ in weights]
    order = data.draw(st.permutations(range(len(weights))))
    result = aggregate([update(str(i), weights[i], a=tensors[i]) for i in order])
    total = sum(weights)
    expected = sum(w / total * t.double() for w, t in zip(weights, tensors, strict=True))
    torch.testing.assert_close(result["a"], expected.float(), rtol=1e-5, atol=1e-6)


def test_bfloat16_updates_are_summed_in_float32():
    state = {"a": torch.zeros(1, dtype=torch.bfloat16)}
    tensors = [torch.tensor([256.0 if i == 0 else 1.0], dtype=torch.bfloat16) for i in range(256)]
    result = aggregate([update(str(i), 1, a=t) for i, t in enumerate(tensors)], state)
    assert result["a"].dtype == torch.bfloat16
    assert abs(result["a"].item() - (256 + 255) / 256) < 0.01


def test_the_sender_s_tensors_are_not_kept_or_changed():
    first = torch.ones(3)
    mean = HolderMean(STATE)
    mean.add(update("x", 1, a=first))
    mean.add(update("y", 1, a=torch.zeros(3)))
    assert torch.equal(first, torch.ones(3))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (update("eve", 0, a=torch.ones(3)), "0 samples"),
        (update("eve", -2, a=torch.ones(3)), "-2 samples"),
        (update("eve", float("nan"), a=torch.ones(3)), "nan samples"),
        (update("eve", 1, c=torch.ones(3)), "'c'"),
        (update("eve", 1, a=torch.ones(4)), r"\(4,\)"),
        (update("eve", 1, a=torch.ones(3, dtype=torch.float64)), "float64"),
        (update("eve", 1, a=torch.tensor([0.0, float("inf"), 0.0])), "not finite"),
    ],
)
def test_an_unusable_update_is_an_error_that_names_the_client(bad, message):
    mean = HolderMean(STATE)
    with pytest.raises(UpdateError, match=f"'eve'.*{message}"):
        mean.check(bad)
    assert torch.equal(mean.result()["a"], STATE["a"])

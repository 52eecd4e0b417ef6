import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from fedbe.data import IGNORED
from fedbe.evaluation.scoring import ratio_standard_error, sequence_statistics, token_statistics
from fedbe.modeling.passes import evaluation_mode


@given(st.integers(1, 4), st.integers(2, 6), st.integers(2, 5), st.integers(0, 2**31), st.booleans())
def test_token_statistics_equal_a_loop_over_tokens(rows, length, classes, seed, half):
    chance = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, length, classes, generator=chance).to(torch.bfloat16 if half else torch.float32)
    labels = torch.randint(classes, (rows, length), generator=chance)
    labels[torch.rand(rows, length, generator=chance) < 0.3] = IGNORED
    sums = token_statistics(logits, labels)
    for row in range(rows):
        predicted = [t for t in range(1, length) if labels[row, t] != IGNORED]
        losses = [cross_entropy(logits[row, t - 1].float(), labels[row, t]).item() for t in predicted]
        assert sums.items[row] == len(predicted)
        assert sums.correct[row] == sum(logits[row, t - 1].argmax() == labels[row, t] for t in predicted)
        assert sums.loss[row].item() == pytest.approx(sum(losses), rel=1e-5, abs=1e-6)


def test_classes_are_not_shifted_and_ignored_ones_not_counted():
    logits = torch.tensor([[0.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    sums = token_statistics(logits, torch.tensor([1, 1, IGNORED]))
    assert sums.items.tolist() == [1, 1, 0]
    assert sums.correct.tolist() == [1, 0, 0]


@pytest.mark.parametrize("labels", [torch.zeros(2, 3), torch.zeros(4), torch.zeros(2)])
def test_shapes_that_do_not_go_together_are_refused(labels):
    with pytest.raises(ValueError, match=r"`logits` \(2, 4, 5\) and `labels`"):
        token_statistics(torch.zeros(2, 4, 5), labels.long())


def test_evaluation_leaves_training_modes_and_cache_setting_as_they_were(model):
    model.model.layers[1].eval()
    before = [module.training for module in model.modules()]
    with pytest.raises(RuntimeError), evaluation_mode(model):
        assert not any(module.training for module in model.modules())
        assert model.config.use_cache is False
        raise RuntimeError
    assert [module.training for module in model.modules()] == before
    assert any(before) and not all(before)
    assert model.config.use_cache is True


def test_batch_size_does_not_change_sequence_statistics(model):
    tokens = torch.randint(32, (7, 9), generator=torch.Generator().manual_seed(0))
    one, all_ = (sequence_statistics(model, tokens, tokens, size) for size in (1, 7))
    assert torch.equal(one.correct, all_.correct)
    torch.testing.assert_close(one.loss, all_.loss, rtol=1e-5, atol=1e-5)


def test_standard_error_counts_sequences_and_not_their_tokens():
    # Two sequences, all right and all wrong: ratio .5, residuals ±5, sqrt(50 · 2 / 1) / 20.
    assert ratio_standard_error(torch.tensor([10, 0]), torch.tensor([10, 10])) == pytest.approx(0.5)
    assert ratio_standard_error(torch.tensor([5, 5]), torch.tensor([10, 10])) == 0.0
    assert ratio_standard_error(torch.tensor([5]), torch.tensor([10])) == pytest.approx((0.25 / 10) ** 0.5)

"""Arithmetic on low-rank factors against dense references."""

import numpy
import pytest
import torch
from lora_tools import factors

from fedbe.aggregation.low_rank import cut, live_factors, pad, product_norm, residual, stack, truncated_svd


def test_stacked_factors_of_any_ranks_multiply_to_the_weighted_sum():
    parts = [factors(seed, rank) for seed, rank in enumerate([1, 4, 2])]
    b, a = stack([b for b, _ in parts], [a for _, a in parts], [0.5, 0.2, 0.3])
    assert b.shape == (7, 7) and a.shape == (7, 5)
    torch.testing.assert_close(b @ a, sum(w * (b @ a) for w, (b, a) in zip([0.5, 0.2, 0.3], parts, strict=True)))


@pytest.mark.parametrize("clients", [1, 2, 5])
def test_the_residual_is_the_error_of_averaging_with_rank_k_minus_1_times_r(clients):
    parts = [factors(seed, 2) for seed in range(clients)]
    weights = [(k + 1) / sum(range(clients + 1)) for k in range(clients)]
    left, right = residual([b for b, _ in parts], [a for _, a in parts], weights)
    mean_b = sum(w * b for w, (b, _) in zip(weights, parts, strict=True))
    mean_a = sum(w * a for w, (_, a) in zip(weights, parts, strict=True))
    expected = sum(w * b @ a for w, (b, a) in zip(weights, parts, strict=True)) - mean_b @ mean_a
    assert left.shape[1] == right.shape[0] == (clients - 1) * 2
    torch.testing.assert_close(left @ right, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_truncated_svd_is_the_best_approximation(rank):
    b, a = factors(3, 6)
    u, sigma, vt = truncated_svd(b, a, rank)
    values = numpy.linalg.svd((b.double() @ a.double()).numpy(), compute_uv=False)
    numpy.testing.assert_allclose(sigma.numpy(), values[:rank], rtol=1e-9)
    rest = torch.linalg.norm(b.double() @ a.double() - u @ torch.diag(sigma) @ vt).item()
    assert rest == pytest.approx(numpy.sqrt((values[rank:] ** 2).sum()), abs=1e-9)


def test_padding_is_undone_by_cutting_and_keeps_the_product():
    b, a = factors(1, 2)
    wide_b, wide_a = pad(b, 5, 1), pad(a, 5, 0)
    assert torch.equal(wide_b @ wide_a, b @ a)
    assert torch.equal(cut(wide_b, 2, 1), b) and torch.equal(cut(wide_a, 2, 0), a)
    assert product_norm(b, a) == pytest.approx((b.double() @ a.double()).norm().item())


def test_rows_without_weight_start_anew():
    start = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    b, a = live_factors(torch.ones(7, 2), torch.ones(2, 5), torch.tensor([1.0, 0.0]), start)
    assert torch.equal(a, torch.cat([torch.ones(1, 5), start[1:]]))
    assert torch.equal(b[:, 1:], torch.zeros(7, 2))
    b, a = live_factors(torch.ones(7, 2), torch.ones(2, 5), torch.zeros(2), start)
    assert torch.equal(a, start) and not b.any()

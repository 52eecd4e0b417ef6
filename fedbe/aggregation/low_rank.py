"""Arithmetic on low-rank factors: a change of a weight is s·BA, with B of shape [out, r] and A of shape [r, in]."""

from collections.abc import Sequence

import torch
from torch import Tensor

_NEGLIGIBLE = 1e-6


def product_norm(b: Tensor, a: Tensor) -> float:
    """Return ‖BA‖_F without forming the product: ‖BA‖² = ⟨BᵀB, AAᵀ⟩."""
    b, a = b.double(), a.double()
    return float(((b.T @ b) * (a @ a.T)).sum().clamp_min(0).sqrt())


def cut(factor: Tensor, rank: int, dim: int) -> Tensor:
    """Return the first `rank` rows of A (`dim` 0) or columns of B (`dim` 1): a copy, or the factor if that is all."""
    return factor if factor.shape[dim] == rank else factor.narrow(dim, 0, rank).clone()


def pad(factor: Tensor, rank: int, dim: int) -> Tensor:
    """Return a factor filled up with zeros to `rank` rows of A (`dim` 0) or columns of B (`dim` 1)."""
    missing = rank - factor.shape[dim]
    if missing == 0:
        return factor
    shape = list(factor.shape)
    shape[dim] = missing
    return torch.cat([factor, factor.new_zeros(shape)], dim=dim)


def stack(bs: Sequence[Tensor], as_: Sequence[Tensor], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return (B, A) of rank Σ r_k, in float32, with BA = Σ_k w_k B_k A_k, whatever the ranks r_k.

    Args:
        bs: B_k of shape [out, r_k].
        as_: A_k of shape [r_k, in].
        weights: w_k, for example p_k s_k.

    Source: FLoRA (arXiv 2409.05976), which puts the weight on A; on B it is the same product.
    """
    left = torch.cat([weight * b.float() for b, weight in zip(bs, weights, strict=True)], dim=1)
    return left, torch.cat([a.float() for a in as_], dim=0)


def residual(bs: Sequence[Tensor], as_: Sequence[Tensor], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return factors (P, Q) of rank (K−1)r with PQ = Σ_k p_k B_k A_k − B̄Ā, the error of averaging the factors.

    The residual equals Σ p_k (B_k − B̄)(A_k − Ā), and, since Σ p_k (B_k − B̄) = 0, also Σ p_k (B_k − B̄)(A_k − A_1),
    whose first term is zero: one client fewer to send.

    Args:
        bs: B_k of shape [out, r].
        as_: A_k of shape [r, in].
        weights: p_k, which sum to 1.

    Source: FedEx-LoRA (arXiv 2410.09432) for the residual; the form with K − 1 terms is ours.
    """
    mean = sum(weight * b.double() for b, weight in zip(bs, weights, strict=True))
    first = as_[0].double()
    left = [weight * (b.double() - mean) for b, weight in zip(bs[1:], weights[1:], strict=True)]
    right = [a.double() - first for a in as_[1:]]
    if not left:
        return bs[0].float()[:, :0], as_[0].float()[:0]
    return torch.cat(left, dim=1).float(), torch.cat(right, dim=0).float()


def truncated_svd(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U [out, q], singular values [q] and Vᵀ [q, in] of BA, q at most `rank`: its best approximation.

    BA is not formed: with B = Q₁R₁ and Aᵀ = Q₂R₂ the small R₁R₂ᵀ has the same singular values.

    Source: Eckart and Young; FlexLoRA (arXiv 2402.11505) for its use.
    """
    left, upper_left = torch.linalg.qr(b.double())
    right, upper_right = torch.linalg.qr(a.double().T)
    u, sigma, vt = torch.linalg.svd(upper_left @ upper_right.T, full_matrices=False)
    return leading(left @ u, sigma, vt @ right.T, rank)


def leading(u: Tensor, sigma: Tensor, vt: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first `rank` parts of an SVD, each with the sign that makes its largest entry of Vᵀ positive.

    An SVD leaves the signs open; factors whose signs changed from round to round could not be averaged with others.

    Source: ours.
    """
    u, sigma, vt = u[:, :rank], sigma[:rank], vt[:rank]
    largest = vt.gather(1, vt.abs().argmax(dim=1, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0).to(vt.dtype)
    return u * sign.T, sigma, vt * sign


def live_factors(b: Tensor, a: Tensor, sigma: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Return (B, A) of the rank of `start`, with rows of no weight reset: A's rows from `start`, B's zero.

    A row that is zero in both factors would never get a gradient again.

    Args:
        b: Columns per singular value, shape [out, q].
        a: Rows per singular value, shape [q, in].
        sigma: Singular values, shape [q], largest first.
        start: A at the start of the run, shape [r, in] with r >= q.

    Source: ours.
    """
    live = int((sigma > _NEGLIGIBLE * sigma[:1].clamp_min(torch.finfo(torch.float32).tiny)).sum())
    rows = torch.cat([a[:live].to(start.dtype), start[live:]], dim=0)
    return pad(b[:, :live].to(start.dtype), start.shape[0], 1), rows

"""Counts and losses of a model's predictions, on tensors."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from fedbe.data import IGNORED
from fedbe.modeling.passes import evaluation_mode


@dataclass(frozen=True)
class Statistics:
    """Sums over what was predicted in each row of a batch: tokens of a sequence, or one class.

    Attributes:
        items: Number of predictions. Shape ``[b]``.
        correct: Number of right ones. Shape ``[b]``.
        loss: Sum of their cross-entropies in nats, float32. Shape ``[b]``.
    """

    items: Tensor
    correct: Tensor
    loss: Tensor


def token_statistics(logits: Tensor, labels: Tensor) -> Statistics:
    """Return per sequence how well each next token is predicted, or per sample how well its class is.

    Args:
        logits: ``[b, s, v]`` of a causal language model: position t predicts the token at t + 1; or ``[b,
            c]`` of a classifier.
        labels: ``[b, s]`` token ids or ``[b]`` classes; -100 where nothing is to be predicted.

    Raises:
        ValueError: The shapes do not go together.

    Rows are taken one at a time and only where something is predicted, so that a float32 copy of a
    half-precision model's logits is never larger than one row. Source: ours.
    """
    if logits.shape[:-1] != labels.shape or logits.ndim not in (2, 3):
        raise ValueError(
            f"`logits` {tuple(logits.shape)} and `labels` {tuple(labels.shape)}: [b, s, v] goes with "
            "[b, s], and [b, c] with [b]."
        )
    if logits.ndim == 3:
        logits, labels = logits[:, :-1], labels[:, 1:]
    else:
        logits, labels = logits[:, None], labels[:, None]
    rows = [_row_sums(row, targets) for row, targets in zip(logits, labels, strict=True)]
    items, correct, loss = (torch.stack(column) for column in zip(*rows, strict=True))
    return Statistics(items, correct, loss)


def _row_sums(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    predicted = targets != IGNORED
    logits, targets = logits[predicted], targets[predicted]  # [n, v], [n]
    correct = (logits.argmax(-1) == targets).sum()
    return predicted.sum(), correct, cross_entropy(logits.float(), targets, reduction="sum")


def sequence_statistics(model: PreTrainedModel, tokens: Tensor, labels: Tensor, batch_size: int) -> Statistics:
    """Return `token_statistics` of a causal language model on sequences of equal length, on the CPU.

    Args:
        model: A causal language model; its training modes are left as they are.
        tokens: Token ids. Shape ``[n, s]``.
        labels: The same, or -100. Shape ``[n, s]``.
        batch_size: Sequences in a forward pass.
    """
    parts = []
    with evaluation_mode(model):
        for ids, targets in zip(torch.split(tokens, batch_size), torch.split(labels, batch_size), strict=True):
            logits = model(input_ids=ids.to(model.device)).logits
            parts.append(token_statistics(logits, targets.to(logits.device)))
    return join(parts)


def join(parts: Sequence[Statistics]) -> Statistics:
    """Return the statistics of several batches as one, on the CPU, losses in float64."""
    return Statistics(
        torch.cat([part.items.cpu() for part in parts]),
        torch.cat([part.correct.cpu() for part in parts]),
        torch.cat([part.loss.cpu().double() for part in parts]),
    )


def ratio_standard_error(correct: Tensor, items: Tensor) -> float:
    """Return the standard error of ``correct.sum() / items.sum()`` when rows were drawn, not single predictions.

    Neighbouring tokens are right or wrong together, so that a sequence counts as one draw. A single row is
    treated as independent draws, for want of anything better.

    Args:
        correct: Right predictions of each row. Shape ``[n]``.
        items: Predictions of each row. Shape ``[n]``.

    Source: the linearised variance of a ratio estimator (Cochran, Sampling Techniques, §2.11).
    """
    rows, total = len(items), items.sum().item()
    ratio = correct.sum().item() / total
    if rows < 2:
        return float((ratio * (1 - ratio) / total) ** 0.5)
    residual = correct.double() - ratio * items.double()
    return float((residual.square().sum() * rows / (rows - 1)).sqrt() / total)

"""The score on the downstream task: accuracy and loss of a causal language model or a classifier."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from fedbe.data import Batch
from fedbe.evaluation.scoring import evaluation_mode, token_statistics


@dataclass(frozen=True)
class DownstreamScore:
    """The result on the downstream task.

    Attributes:
        accuracy: Share of right predictions, in [0, 1]: next tokens or classes.
        loss: Mean cross-entropy in nats per predicted token or per sample.
        items: Number of predictions.
    """

    accuracy: float
    loss: float
    items: int


def evaluate_downstream(
    model: PreTrainedModel, batches: Iterable[Batch], device: torch.device | str | None = None
) -> DownstreamScore:
    """Score a model on batches; each prediction weighs the same, however batches are cut and padded.

    Args:
        model: A causal language model (logits ``[b, s, v]``) or a classifier (logits ``[b, c]``); its
            training modes are left as they are.
        batches: Keyword arguments of the model; ``labels`` (-100 where nothing is to be predicted) are kept
            from it.
        device: Where to send batches; by default where the model is.

    Raises:
        ValueError: No batch holds a label.
    """
    # Plain sums: torchmetrics' MeanMetric either drops NaN losses or, with nan_strategy="disable", ignores the weights.
    items, correct, loss = 0, 0, 0.0
    with evaluation_mode(model):
        for batch in batches:
            inputs = {name: tensor.to(device or model.device) for name, tensor in batch.items()}
            labels = inputs.pop("labels")
            sums = token_statistics(model(**inputs).logits, labels)
            items += int(sums.items.sum())
            correct += int(sums.correct.sum())
            loss += sums.loss.sum().item()
    if not items:
        raise ValueError(
            "`batches` holds no label to predict; give the downstream task's data a validation and a "
            "test part that are not empty."
        )
    return DownstreamScore(correct / items, loss / items, items)

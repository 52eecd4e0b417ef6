"""The score on the downstream task: accuracy and loss of a causal language model or a classifier."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torchmetrics import SumMetric
from transformers import PreTrainedModel

from fedbe.data import Batch
from fedbe.evaluation.scoring import token_statistics
from fedbe.modeling.passes import evaluation_mode


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


def evaluate_downstream(model: PreTrainedModel, batches: Iterable[Batch]) -> DownstreamScore:
    """Score a model on batches; each prediction weighs the same, however batches are cut and padded.

    Args:
        model: A causal language model (logits ``[b, s, v]``) or a classifier (logits ``[b, c]``); its
            training modes are left as they are.
        batches: Keyword arguments of the model; ``labels`` (-100 where nothing is to be predicted) are kept
            from it.

    Raises:
        ValueError: No batch holds a label.
    """
    # Sums, since torchmetrics' MeanMetric drops NaN losses or, with nan_strategy="disable", ignores the weights.
    items, correct, loss = (SumMetric(nan_strategy="disable").set_dtype(torch.float64) for _ in range(3))
    with evaluation_mode(model):
        for batch in batches:
            inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
            labels = inputs.pop("labels")
            sums = token_statistics(model(**inputs).logits, labels)
            items.update(sums.items.sum().cpu())
            correct.update(sums.correct.sum().cpu())
            loss.update(sums.loss.sum().cpu())
    count = items.compute().item() if items.update_called else 0
    if not count:
        raise ValueError(
            "`batches` holds no label to predict; give the downstream task's data a validation and a "
            "test part that are not empty."
        )
    return DownstreamScore(correct.compute().item() / count, loss.compute().item() / count, int(count))

"""The score on the downstream task: accuracy and loss of a causal language model or a classifier."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchmetrics import SumMetric
from transformers import PreTrainedModel

from fedbe.data import IGNORED, Batch
from fedbe.evaluation.classes import class_scores
from fedbe.evaluation.scoring import Statistics, join, ratio_standard_error, token_statistics
from fedbe.modeling.passes import evaluation_mode


@dataclass(frozen=True)
class DownstreamScore:
    """The result on the downstream task.

    Attributes:
        accuracy: Share of right predictions, in [0, 1]: next tokens or classes.
        loss: Mean cross-entropy in nats per predicted token or per sample.
        items: Number of predictions.
        standard_error: Standard error of `accuracy`, each row of a batch (a text, a picture) one draw.
        by_class: What `class_scores` says of a classifier, if it was asked for.
    """

    accuracy: float
    loss: float
    items: int
    standard_error: float = 0.0
    by_class: Mapping[str, Any] | None = None


def evaluate_downstream(
    model: PreTrainedModel, batches: Iterable[Batch], by_class: bool = False, class_names: Sequence[str] | None = None
) -> DownstreamScore:
    """Score a model on batches; each prediction weighs the same, however batches are cut and padded.

    Args:
        model: A causal language model (logits ``[b, s, v]``) or a classifier (logits ``[b, c]``); its
            training modes are left as they are.
        batches: Keyword arguments of the model; ``labels`` (-100 where nothing is to be predicted) are kept
            from it.
        by_class: Score a classifier class by class as well, for which all its predictions are kept.
        class_names: The names of the classes; by default their numbers.

    Raises:
        ValueError: No batch holds a label.
    """
    # Sums, since torchmetrics' MeanMetric drops NaN losses or, with nan_strategy="disable", ignores the weights.
    items, correct, loss = (SumMetric(nan_strategy="disable").set_dtype(torch.float64) for _ in range(3))
    rows: list[Statistics] = []
    predictions: list[tuple[Tensor, Tensor]] = []
    with evaluation_mode(model):
        for batch in batches:
            inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
            labels = inputs.pop("labels")
            logits = model(**inputs).logits
            sums = token_statistics(logits, labels)
            rows.append(sums)
            if by_class and logits.ndim == 2:
                predictions.append((logits.float().cpu(), labels.cpu()))
            items.update(sums.items.sum().cpu())
            correct.update(sums.correct.sum().cpu())
            loss.update(sums.loss.sum().cpu())
    count = items.compute().item() if items.update_called else 0
    if not count:
        raise ValueError(
            "`batches` holds no label to predict; give the downstream task's data a validation and a "
            "test part that are not empty."
        )
    every = join(rows)
    return DownstreamScore(
        accuracy=correct.compute().item() / count,
        loss=loss.compute().item() / count,
        items=int(count),
        standard_error=ratio_standard_error(every.correct, every.items),
        by_class=_by_class(predictions, class_names),
    )


def _by_class(predictions: list[tuple[Tensor, Tensor]], names: Sequence[str] | None) -> Mapping[str, Any] | None:
    if not predictions:
        return None
    logits, labels = (torch.cat(column) for column in zip(*predictions, strict=True))
    labelled = labels != IGNORED
    return class_scores(logits[labelled], labels[labelled], names)

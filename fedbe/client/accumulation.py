"""The batches of one optimizer step, weighted as if they were one batch: each label counts the same."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from fedbe.data import Batch
from fedbe.data.batch import IGNORED


class Accumulation:
    """Weighs the losses of the batches whose gradients add up to one optimizer step.

    A batch's loss is a mean over its n_i labels, so that the mean over all N labels of the step is Σ n_i loss_i / N. As
    N is known only after the last batch, losses are weighted by n_i / n_1 and the gradients of the step by n_1 / N at
    its end: sizes stay what they are for one batch, also where a scale keeps float16 from overflowing. A step of a
    single batch is left as it is, to the bit.

    Args:
        batches: What each loss is divided by before its backward pass, by Lightning; a step may have fewer batches.

    Attributes:
        batches: The same; it may change from step to step.

    Source: `num_items_in_batch` of transformers (its pull request 34191); the weights are ours.
    """

    def __init__(self, batches: int = 1) -> None:
        self.batches = batches
        self._first = self._total = 0

    def weight(self, batch: Batch) -> float:
        """Return what the loss on the next batch of the step is multiplied by."""
        if self.batches == 1:
            return 1.0
        labels = count_labels(batch)
        self._first = self._first or labels
        self._total += labels
        return labels / self._first if labels else 1.0

    def end(self, parameters: Iterable[nn.Parameter]) -> None:
        """End the step: bring the gradients, in place, to those of the mean over all of its labels."""
        factor = self.batches * self._first / self._total if self._total else 1.0
        self._first = self._total = 0
        if factor != 1:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)


def count_labels(batch: Batch) -> int:
    """Return over how many labels the model's loss on a batch is a mean.

    Of sequences ``[b, s]`` the first label of each is the prediction of nothing; of classes ``[b]`` all count.
    """
    labels: Tensor | None = batch.get("labels")
    if labels is None:
        return len(next(iter(batch.values())))
    return int((labels[:, 1:] if labels.ndim > 1 else labels).ne(IGNORED).sum())

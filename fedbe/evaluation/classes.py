"""How well a classifier tells each class from the others, by its predictions on the downstream task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchmetrics.functional.classification import binary_average_precision, multiclass_confusion_matrix
from torchmetrics.functional.retrieval import retrieval_precision

PRECISION_AT = 10
"""Of how many samples, those that a class is given with the most confidence, the precision is told."""


def class_scores(logits: Tensor, labels: Tensor, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the scores of a classifier class by class, as JSON values.

    Args:
        logits: Shape ``[n, classes]``.
        labels: The true classes. Shape ``[n]``.
        names: The names of the classes; by default their numbers.

    Returns:
        ``macro_f1``: mean F1 over the classes that occur, in the labels or among the predictions. ``classes``: for each
        name its ``samples``, ``precision``, ``recall`` and ``f1``, and, with the samples in the order of the confidence
        that they are of this class, the ``average_precision`` and the precision among the first ten
        (``precision_at_10``); None where nothing is divided by. ``confusion``: true class → predicted class → how many
        samples, without zeros.
    """
    count = logits.shape[1]
    names = names or [str(number) for number in range(count)]
    matrix = multiclass_confusion_matrix(logits.argmax(-1), labels, count)
    confidence = logits.float().softmax(-1)
    classes = {
        name: _counted(matrix, number) | _ranked(confidence[:, number], labels == number)
        for number, name in enumerate(names)
    }
    known = [score["f1"] for score in classes.values() if score["f1"] is not None]
    rows = zip(names, matrix.tolist(), strict=True)
    confusion = {name: {other: n for other, n in zip(names, row, strict=True) if n} for name, row in rows}
    return {"macro_f1": sum(known) / len(known), "classes": classes, "confusion": confusion}


def _counted(matrix: Tensor, number: int) -> dict[str, Any]:
    right = matrix[number, number].item()
    actual, predicted = matrix[number].sum().item(), matrix[:, number].sum().item()
    return {
        "samples": actual,
        "precision": right / predicted if predicted else None,
        "recall": right / actual if actual else None,
        "f1": 2 * right / (actual + predicted) if actual + predicted else None,
    }


def _ranked(confidence: Tensor, members: Tensor) -> dict[str, Any]:
    if not members.any():
        return {"average_precision": None, f"precision_at_{PRECISION_AT}": None}
    first = min(PRECISION_AT, len(members))
    return {
        "average_precision": binary_average_precision(confidence, members.long()).item(),
        f"precision_at_{PRECISION_AT}": retrieval_precision(confidence, members, top_k=first).item(),
    }

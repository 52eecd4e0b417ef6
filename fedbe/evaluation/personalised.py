"""The downstream score of methods that give each client a model of its own."""

from collections.abc import Sequence
from statistics import fmean

from fedbe.messages import Evaluation


def summarise_clients(scores: Sequence[Evaluation]) -> dict[str, float]:
    """Return ``mean``, ``min`` and ``max`` of the accuracies of the clients' own models, and the mean ``loss``.

    Each client weighs the same. Source: ours.

    Args:
        scores: One for each client; at least one.
    """
    accuracies = [score.accuracy for score in scores]
    return {
        "mean": fmean(accuracies),
        "min": min(accuracies),
        "max": max(accuracies),
        "loss": fmean(score.loss for score in scores),
    }

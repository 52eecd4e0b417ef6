"""How much of the base model's general ability is left."""

from collections.abc import Mapping

from fedbe.evaluation.tasks import RESERVED_NAME, TaskScore

Scores = Mapping[str, TaskScore]
"""Task name → score."""


def retention(base: Scores, now: Scores) -> dict[str, float]:
    """Return score now ÷ score of the base for each task, and their ``mean``.

    A task on which the base scores 0 has no ratio: it is left out, of the mean too. Without any task the
    result is empty.

    Args:
        base: Scores of the base model.
        now: Scores of the model now, of the same tasks.

    Source: FedBE, arXiv 2506.05977 (accuracy retention on general tasks).
    """
    return _with_mean({name: now[name].score / score.score for name, score in base.items() if score.score > 0})


def delta_ce(base: Scores, now: Scores) -> dict[str, float]:
    """Return cross-entropy now - cross-entropy of the base in nats per token for each task, and their ``mean``.

    Tasks without a cross-entropy are left out. Without any task the result is empty.

    Args:
        base: Scores of the base model.
        now: Scores of the model now, of the same tasks.

    Source: the figure that PEFT's method comparison prints as "forgetting".
    """
    pairs = {name: (score.cross_entropy, now[name].cross_entropy) for name, score in base.items()}
    return _with_mean({name: b - a for name, (a, b) in pairs.items() if a is not None and b is not None})


def _with_mean(values: dict[str, float]) -> dict[str, float]:
    return {RESERVED_NAME: sum(values.values()) / len(values), **values} if values else {}

"""The dial measured on a trained run."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from fedbe.evaluation.dial import DialPoint
from fedbe.evaluation.downstream import evaluate_downstream
from fedbe.evaluation.retention import retention
from fedbe.evaluation.tasks import TaskScore
from fedbe.federation.loop import FederatedLoop
from fedbe.modeling.tensors import load_tensors


def measure_dial(loop: FederatedLoop, start: Mapping[str, Tensor], factors: Collection[float]) -> list[DialPoint]:
    """Score a trained model at 0 and at each of `factors`, in ascending order, and leave it as it was.

    Downstream validation data and general tasks are the calibration set on which a factor is chosen; test data is not
    looked at.

    Args:
        loop: A run with its trained state, of an algorithm that has a dial.
        start: Its global tensors right after `setup`.
        factors: In [0, 1]; at 0 retention is 1.
    """
    scores = {}
    try:
        for factor in sorted({0.0, *factors}):
            load_tensors(loop.model, loop.algorithm.adaptation.dial(start, loop.server.state, factor))
            scores[factor] = _scored(loop)
    finally:
        load_tensors(loop.model, loop.server.state)
    _, base = scores[0.0]
    return [DialPoint(factor, accuracy, retention(base, general)) for factor, (accuracy, general) in scores.items()]


def _scored(loop: FederatedLoop) -> tuple[float, dict[str, TaskScore]]:
    downstream = evaluate_downstream(loop.model, loop.plan.data.val_dataloader())
    return downstream.accuracy, {task.name: task.evaluate(loop.model) for task in loop.general_tasks}

"""What every update must be before anything looks further into it, whatever the algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedbe.aggregation.base import check_values
from fedbe.errors import UpdateError
from fedbe.messages import FitTask, Structure, Update, structure_version

LARGEST_SQUARED = 1e18
"""Values below this can be squared and added up in float32."""

MOST_SAMPLES = 2**53
"""From here on a count of samples is no longer exact in float64."""


class UpdateCheck:
    """Checks the updates of one round against what the clients were given; takes nothing in.

    Shapes, types and values of the tensors are the aggregator's to check (`Aggregator.check`), who knows what they are.

    Args:
        state: The global tensors at the start of the round.
        structure: The model's structure in this round.

    Source: ours.
    """

    def __init__(self, state: Mapping[str, Tensor], structure: Structure) -> None:
        self._state = state
        self._structure = structure_version(structure)

    def __call__(self, task: FitTask, update: Any) -> None:
        """Refuse an object that is not an update, or that holds more than a client was asked for.

        Raises:
            UpdateError: It is so; the message names the client, and the tensor or the metric.
        """
        check_form(task, update)
        who = f"client {task.client_id!r}"
        if update.structure not in ("", self._structure):
            raise UpdateError(f"{who} sent an update of another structure of the model: it has grown since")
        # Some methods send tensors under names of their own, which the client has received like that.
        allowed = {*task.trainable_names, *(name for name in task.received if name not in self._state)}
        for name in update.tensors:
            if name not in allowed:
                known = "was not given to train" if name in self._state else "is not a trainable tensor of this run"
                raise UpdateError(f"{who} sent {name!r}, which {known}")
        for name, tensor in update.extra.items():
            what = f"{who} sent {name!r} for its objective"
            if name not in task.extra:
                raise UpdateError(f"{what}, which it was not given")
            if tensor.shape != task.extra[name].shape:
                raise UpdateError(f"{what} as {tuple(tensor.shape)}, expected {tuple(task.extra[name].shape)}")
            check_values(what, tensor, LARGEST_SQUARED)


def check_form(task: FitTask, update: Any) -> None:
    """Refuse what is not an update of plain tensors and numbers; values are not looked at.

    Raises:
        UpdateError: It is so; the message names the client, and the tensor or the metric.
    """
    who = f"client {task.client_id!r}"
    if not isinstance(update, Update):
        raise UpdateError(f"{who} sent a {type(update).__name__} where an update is expected")
    if update.client_id != task.client_id:
        raise UpdateError(f"{who} sent an update in the name of {update.client_id!r}")
    if not isinstance(update.structure, str):
        raise UpdateError(f"{who} sent {update.structure!r} as the version of the model's structure")
    _check_samples(who, update.samples)
    for name, value in _mapping(who, "metrics", update.metrics).items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UpdateError(f"{who} reports {name!r} as {value!r}, which is no number")
    for part, what in (("tensors", ""), ("extra", " for its objective")):
        for name, tensor in _mapping(who, part, getattr(update, part)).items():
            _check_plain(f"{who} sent {name!r}{what}", tensor)


def _check_plain(what: str, tensor: Any) -> None:
    if not isinstance(tensor, Tensor):
        raise UpdateError(f"{what} as a {type(tensor).__name__} and not as a tensor")
    unusual = tensor.is_meta or tensor.is_quantized or tensor.is_complex() or tensor.dtype == torch.bool
    if unusual or tensor.layout != torch.strided:
        raise UpdateError(f"{what} as a tensor without plain numbers ({tensor.dtype}, {tensor.layout})")


def _check_samples(who: str, samples: Any) -> None:
    if isinstance(samples, bool) or not isinstance(samples, int):
        raise UpdateError(f"{who} reports {samples!r} samples: a weight must be a whole number")
    if samples <= 0:
        raise UpdateError(f"{who} reports {samples} samples: a weight must be positive")
    if samples >= MOST_SAMPLES:
        raise UpdateError(f"{who} reports {samples} samples, more than can be counted exactly")


def _mapping(who: str, part: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UpdateError(f"{who} sent {part} that are no mapping of names: {type(value).__name__}")
    wrong = [name for name in value if not isinstance(name, str)]
    if wrong:
        raise UpdateError(f"{who} sent {part} under {wrong[0]!r}, which is no name")
    return value

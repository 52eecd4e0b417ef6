"""What every way of aggregating has in common."""

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from fedbe.errors import UpdateError
from fedbe.messages import Update


class Aggregator(Protocol):
    """Takes in the updates of one round, one after another, and gives the next global tensors."""

    def add(self, update: Update) -> None:
        """Take in one update; called in the order of the cohort."""
        ...

    def result(self) -> dict[str, Tensor]:
        """Return the next global tensors, of the same names, shapes and types as before."""
        ...


def check_update(update: Update, state: Mapping[str, Tensor]) -> None:
    """Refuse an update that must not enter an average.

    Args:
        update: What a client sent.
        state: The global tensors it was trained from.

    Raises:
        UpdateError: The weight is not positive, a name is unknown, or a tensor has another shape or type, or holds a
            value that is not finite; the message names the client and the tensor.
    """
    who = f"client {update.client_id!r}"
    if not (math.isfinite(update.samples) and update.samples > 0):
        raise UpdateError(f"{who} reports {update.samples} samples: a weight must be positive")
    for name, tensor in update.tensors.items():
        if name not in state:
            raise UpdateError(f"{who} sent {name!r}, which is not a trainable tensor of this run")
        expected = state[name]
        if tensor.shape != expected.shape or tensor.dtype != expected.dtype:
            raise UpdateError(
                f"{who} sent {name!r} as {tuple(tensor.shape)} {tensor.dtype}, "
                f"expected {tuple(expected.shape)} {expected.dtype}"
            )
        if not torch.isfinite(tensor).all():
            raise UpdateError(f"{who} sent {name!r} with values that are not finite")


def check_extra(update: Update) -> None:
    """Refuse an update of which nothing is new, or whose tensors for the local objective are not finite.

    Raises:
        UpdateError: It is so; the message names the client and the tensor.
    """
    who = f"client {update.client_id!r}"
    if not update.tensors and not update.kept:
        raise UpdateError(f"{who} neither sent nor kept a tensor")
    for name, tensor in update.extra.items():
        if not torch.isfinite(tensor).all():
            raise UpdateError(f"{who} sent {name!r} for its objective with values that are not finite")

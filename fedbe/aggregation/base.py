"""What every way of aggregating has in common."""

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from fedbe.errors import UpdateError
from fedbe.messages import Update

LARGEST = 1e6
"""The largest absolute value that a client may send for a tensor.

Values far beyond that turn the mean, or the next round's activations, into infinities; no training comes to them.
"""


class Aggregator(Protocol):
    """Takes in the updates of one round, one after another, and gives the next global tensors."""

    def check(self, update: Update) -> None:
        """Refuse an update that `add` could not use; nothing of it is taken in.

        Raises:
            UpdateError: It cannot be used; the message names the client and the tensor.
        """
        ...

    def add(self, update: Update) -> None:
        """Take in one update that `check` has let pass; called in the order of the cohort."""
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
            value that is not finite or larger than `LARGEST`; the message names the client and the tensor.
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
        check_values(f"{who} sent {name!r}", tensor)


def check_values(what: str, tensor: Tensor, largest: float = LARGEST) -> None:
    """Refuse a tensor with values that are not finite, or too large to be what training comes to.

    Args:
        what: Who sent which tensor, for the message.
        tensor: Any shape; real numbers.
        largest: The largest absolute value that may be.

    Raises:
        UpdateError: It has such values.
    """
    if not tensor.numel():
        return
    lowest, highest = (value.item() for value in torch.aminmax(tensor.detach()))
    if not (math.isfinite(lowest) and math.isfinite(highest)):
        raise UpdateError(f"{what} with values that are not finite")
    if max(-lowest, highest) > largest:
        raise UpdateError(f"{what} with values up to {max(-lowest, highest):.3g}, which no training comes to")

"""Documents packed one after another into sequences."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fedbe.data import IGNORED


def pack(documents: Sequence[Sequence[int]], begin: int, length: int) -> tuple[Tensor, Tensor]:
    """Return documents one after another, a begin token before each, cut into sequences; and their labels.

    Args:
        documents: Token ids of each document.
        begin: The begin token.
        length: Tokens of a sequence.

    Returns:
        Token ids and labels, both of shape ``[n, length]``; the last sequence is filled up, with labels of
        -100.
    """
    stream = torch.cat([torch.tensor([begin, *document]) for document in documents])
    rows = -(-len(stream) // length)
    tokens = torch.full((rows * length,), begin)
    labels = torch.full((rows * length,), IGNORED)
    tokens[: len(stream)] = labels[: len(stream)] = stream
    return tokens.view(rows, length), labels.view(rows, length)

"""Token sequences of different lengths in compact memory."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


class Ragged:
    """Sequences of token ids of different lengths, end to end in one int32 tensor.

    Args:
        tokens: All ids, shape ``[tokens]``, int32.
        offsets: Where each sequence begins, and the end of the last: shape ``[sequences + 1]``, int64.
    """

    def __init__(self, tokens: Tensor, offsets: Tensor) -> None:
        self.tokens = tokens
        self.offsets = offsets

    @classmethod
    def of(cls, sequences: Iterable[Sequence[int]]) -> Ragged:
        """Store sequences one by one, so that never all of them exist as Python lists."""
        flat, ends = array("i"), array("q", [0])
        for sequence in sequences:
            flat.extend(sequence)
            ends.append(len(flat))
        return cls(torch.tensor(flat, dtype=torch.int32), torch.tensor(ends, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each sequence."""
        lengths: list[int] = self.offsets.diff().tolist()
        return lengths

    @property
    def empty(self) -> list[int]:
        """The sequences without a token."""
        return [index for index, length in enumerate(self.lengths) if not length]

    def without_empty(self) -> Ragged:
        """Return the sequences that have a token."""
        return Ragged(self.tokens, torch.cat([self.offsets[:1], self.offsets[1:][self.offsets.diff() > 0]]))

    def span(self, index: int) -> slice:
        """Return where sequence ``index`` lies in `tokens`.

        Raises:
            IndexError: There is no such sequence.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"`index` {index} is outside 0 to {len(self) - 1}.")
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    def chunked(self, length: int) -> Ragged:
        """Return the same tokens in pieces of at most ``length``; a piece never spans two sequences."""
        starts = [torch.arange(int(a), int(b), length) for a, b in zip(self.offsets, self.offsets[1:], strict=False)]
        return Ragged(self.tokens, torch.cat([*starts, self.offsets[-1:]]))

    def concatenated(self, length: int) -> Ragged:
        """Return the same tokens as one stream cut every ``length`` tokens; the last piece may be shorter."""
        total = len(self.tokens)
        return Ragged(self.tokens, torch.tensor([*range(0, total, length), total], dtype=torch.int64))

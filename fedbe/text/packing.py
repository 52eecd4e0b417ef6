"""Documents packed into sequences: one after another, or whole into as few as possible."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fedbe.data.batch import IGNORED, pad
from fedbe.text.ragged import Ragged


def pack(documents: Iterable[Sequence[int]], begin: int, length: int) -> tuple[Tensor, Tensor]:
    """Return documents one after another, a begin token before each, cut into sequences; and their labels.

    Args:
        documents: Token ids of each document; at least one.
        begin: The begin token.
        length: Tokens of a sequence.

    Returns:
        Token ids and labels, both of shape ``[n, length]``, int64; the last sequence is filled up, with labels of
        -100.
    """
    stream = Ragged.of([begin, *document] for document in documents).tokens.long()
    rows = torch.split(stream, length)
    return pad(rows, begin, length), pad(rows, IGNORED, length)


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Return bins of at most ``capacity`` that hold every item, each item put where it leaves the least room.

    Largest items first (best-fit decreasing; Johnson, SIAM J. Comput. 3, 1974: at most 11/9 of the fewest bins).

    Args:
        sizes: Size of each item, in 1 to ``capacity``.
        capacity: Most that a bin holds.
    """
    bins: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room left → bins
    rooms: list[int] = []  # the keys of `with_room`, sorted
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):
        place = bisect_left(rooms, sizes[item])
        if place == len(rooms):
            room, chosen = capacity, len(bins)
            bins.append([])
        else:
            room = rooms[place]
            chosen = with_room[room].pop()
            if not with_room[room]:
                del with_room[room], rooms[place]
        bins[chosen].append(item)
        if left := room - sizes[item]:
            if left not in with_room:
                insort(rooms, left)
            with_room.setdefault(left, []).append(chosen)
    return bins

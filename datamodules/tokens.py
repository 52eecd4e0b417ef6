"""Token sequences in compact memory, and how they are cut and packed."""

from array import array
from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from fedbe.data import IGNORED


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
    def of(cls, sequences: Iterable[Sequence[int]]) -> "Ragged":
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

    def span(self, index: int) -> slice:
        """Return where sequence ``index`` lies in `tokens`."""
        if not 0 <= index < len(self):
            raise IndexError(f"`index` {index} is outside 0 to {len(self) - 1}.")
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    def chunked(self, length: int) -> "Ragged":
        """Return the same tokens in pieces of at most ``length``; a piece never spans two sequences."""
        starts = [torch.arange(int(a), int(b), length) for a, b in zip(self.offsets, self.offsets[1:], strict=False)]
        return Ragged(self.tokens, torch.cat([*starts, self.offsets[-1:]]))

    def concatenated(self, length: int) -> "Ragged":
        """Return the same tokens as one stream cut every ``length`` tokens; the last piece may be shorter."""
        total = len(self.tokens)
        return Ragged(self.tokens, torch.tensor([*range(0, total, length), total], dtype=torch.int64))


class TokenSamples(Dataset[dict[str, Tensor]]):
    """Samples for next-token prediction.

    A sample is ``input_ids`` and ``labels`` of shape ``[tokens]``, int64; the models shift the labels themselves.

    Args:
        sequences: One sequence a sample.
        scored: Which tokens are to be predicted, shape ``[all tokens]``, bool.
        restart_positions: Add ``position_ids`` that count from 0 at the sample's start and at each unscored token.
    """

    def __init__(self, sequences: Ragged, scored: Tensor, restart_positions: bool = False) -> None:
        self.sequences = sequences
        self.scored = scored
        self.restart_positions = restart_positions

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def tokens(self) -> int:
        """Number of tokens in all samples."""
        return len(self.sequences.tokens)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each sample."""
        return self.sequences.lengths

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        span = self.sequences.span(index)
        ids, scored = self.sequences.tokens[span].long(), self.scored[span]
        sample = {"input_ids": ids, "labels": ids.masked_fill(~scored, IGNORED)}
        if self.restart_positions:
            order = torch.arange(len(ids))
            sample["position_ids"] = order - order.masked_fill(scored, 0).cummax(0).values
        return sample

    def evenly(self, count: int | None) -> "TokenSamples":
        """Return ``count`` samples spread evenly over these, the same for every seed; all if ``None`` or fewer."""
        if count is None or count >= len(self):
            return self
        spans = [self.sequences.span(index * len(self) // count) for index in range(count)]
        rows = torch.cat([torch.arange(span.start, span.stop) for span in spans])
        offsets = torch.tensor([0, *accumulate(span.stop - span.start for span in spans)], dtype=torch.int64)
        return TokenSamples(Ragged(self.sequences.tokens[rows], offsets), self.scored[rows], self.restart_positions)


class LabelledTokens(Dataset[dict[str, Tensor]]):
    """Samples for sequence classification: ``input_ids`` of shape ``[tokens]`` and a scalar ``labels``, int64.

    Args:
        sequences: One sequence a sample.
        targets: Class of each sample, shape ``[samples]``, int64.
    """

    def __init__(self, sequences: Ragged, targets: Tensor) -> None:
        self.sequences = sequences
        self.targets = targets

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def tokens(self) -> int:
        """Number of tokens in all samples."""
        return len(self.sequences.tokens)

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each sample."""
        return self.sequences.lengths

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.sequences.tokens[self.sequences.span(index)].long(), "labels": self.targets[index]}


def tokenize_documents(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Ragged:
    """Return each text's tokens, the begin token before it; the end token after it where there is no begin token.

    Texts without a token are left out.
    """
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [tokenizer.eos_token_id] if not begin and tokenizer.eos_token_id is not None else []
    return Ragged.of([*begin, *ids, *end] for ids in plain_ids(tokenizer, texts) if ids)


def plain_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], size: int = 256) -> Iterable[list[int]]:
    """Yield the tokens of each text, no special token added, tokenised ``size`` texts at a time."""
    for start in range(0, len(texts), size):
        batch = [text or "" for text in texts[start : start + size]]
        yield from tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def pack_documents(documents: Ragged, length: int, restart_positions: bool) -> TokenSamples:
    """Fill samples of at most ``length`` tokens with whole documents; longer documents are cut into pieces first.

    No piece's first token is scored, for what comes before it belongs to another document.

    Args:
        documents: One sequence a document.
        length: Most tokens of a sample.
        restart_positions: Count positions from 0 at each piece (see `fedbe.datamodules.separates_documents`).
    """
    pieces = documents.chunked(length)
    sizes = pieces.lengths
    bins = best_fit(sizes, length)
    spans = [pieces.span(piece) for content in bins for piece in content]
    starts = torch.tensor([0, *accumulate(span.stop - span.start for span in spans)][:-1], dtype=torch.int64)
    scored = torch.ones(len(documents.tokens), dtype=torch.bool)
    scored[starts] = False
    tokens = torch.cat([documents.tokens[span] for span in spans]) if spans else documents.tokens
    ends = accumulate(sum(sizes[piece] for piece in content) for content in bins)
    return TokenSamples(Ragged(tokens, torch.tensor([0, *ends], dtype=torch.int64)), scored, restart_positions)


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

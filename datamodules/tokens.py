"""Samples made of token sequences, and documents packed into them."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from fedbe.data.batch import IGNORED
from fedbe.text.packing import best_fit
from fedbe.text.ragged import Ragged
from fedbe.text.tokens import tokenise


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
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that samples are made of."""
        return self.sequences.tokens, self.sequences.offsets, self.scored, torch.tensor(self.restart_positions)

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
        types: Which text of a pair each token is of, ``token_type_ids``, shape ``[all tokens]``; ``None`` for a model
            that is not told.
    """

    def __init__(self, sequences: Ragged, targets: Tensor, types: Tensor | None = None) -> None:
        self.sequences = sequences
        self.targets = targets
        self.types = types

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def tokens(self) -> int:
        """Number of tokens in all samples."""
        return len(self.sequences.tokens)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Everything that samples are made of."""
        types = () if self.types is None else (self.types,)
        return self.sequences.tokens, self.sequences.offsets, self.targets, *types

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of each sample."""
        return self.sequences.lengths

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        span = self.sequences.span(index)
        types = {} if self.types is None else {"token_type_ids": self.types[span].long()}
        return {"input_ids": self.sequences.tokens[span].long(), **types, "labels": self.targets[index]}


def tokenise_documents(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str | None], end_token: bool
) -> Iterator[list[int]]:
    """Yield each text's tokens with the begin token before them, and the end token after them; none for an empty text.

    No token is added that the text begins or ends with already.

    Args:
        tokenizer: What turns text into tokens.
        texts: The texts.
        end_token: Put the end token after each text; without a begin token it is put there anyway.
    """
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    ends = end is not None and (end_token or begin is None)
    for ids in tokenise(tokenizer, texts):
        first = [begin] if begin is not None and ids[:1] != [begin] else []
        last = [end] if ends and ids[-1:] != [end] else []
        yield [*first, *ids, *last] if ids else []


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

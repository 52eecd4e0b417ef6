"""Batches: what they are made of, and how sequences of unequal length come into one."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad as extend
from torch.nn.utils.rnn import pad_sequence

IGNORED = -100
"""The label of what is not to be predicted, as in `torch.nn.CrossEntropyLoss`."""

Batch = dict[str, Tensor]
"""Keyword arguments of the model: tensors whose first dimension is the sample, ``labels`` among them."""


def pad(rows: Sequence[Tensor | Sequence[int]], value: float = 0, length: int | None = None) -> Tensor:
    """Return sequences as one tensor, filled up at the right. Shape ``[n, longest, …]`` for rows ``[s, …]``.

    Args:
        rows: Tensors of one kind, or token ids.
        value: What they are filled up with.
        length: How long they are to be; as long as the longest if left out.
    """
    tensors = [row if isinstance(row, Tensor) else torch.tensor(row, dtype=torch.long) for row in rows]
    batch = pad_sequence(tensors, batch_first=True, padding_value=value)
    missing = 0 if length is None else length - batch.shape[1]
    return extend(batch, (*(0, 0) * (batch.ndim - 2), 0, missing), value=value) if missing > 0 else batch


def pad_samples(samples: Sequence[Mapping[str, Tensor]], pad_token_id: int, attention_mask: bool) -> Batch:
    """Join samples into a batch, padded at the right to the longest.

    Padding is never scored. Padded ``position_ids`` count from 0, as a further document that nothing attends to.

    Args:
        samples: Tensors by name, ``input_ids`` of shape ``[tokens]`` among them; those of one dimension are padded.
        pad_token_id: The id to pad ``input_ids`` with.
        attention_mask: Add the mask of real tokens, shape ``[samples, tokens]``, int64.
    """
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    fill = {"input_ids": pad_token_id, "labels": IGNORED}
    batch: Batch = {}
    for name, first in samples[0].items():
        values = [sample[name] for sample in samples]
        batch[name] = torch.stack(values) if first.ndim == 0 else pad(values, fill.get(name, 0))
    real = torch.arange(int(lengths.max())) < lengths[:, None]
    if "position_ids" in batch:
        batch["position_ids"] = restarted(batch["position_ids"], lengths)
    if attention_mask:
        batch["attention_mask"] = real.long()
    return batch


def lengthen(batch: Batch, length: int) -> Batch:
    """Return a batch of token sequences padded at the right with zeros to a length.

    Padded ``position_ids`` count from 0, as a further document that nothing attends to.

    Args:
        batch: Tensors by name, ``input_ids`` of shape ``[b, s]`` among them; those of this shape's length are padded.
        length: Tokens of a sequence, at least s.
    """
    present = batch["input_ids"].shape[1]
    by_token = {name for name, tensor in batch.items() if tensor.ndim == 2 and tensor.shape[1] == present}
    longer = {name: extend(t, (0, length - present)) if name in by_token else t for name, t in batch.items()}
    if "position_ids" in by_token:
        longer["position_ids"] = restarted(longer["position_ids"], torch.tensor([present]))
    return longer


def restarted(positions: Tensor, lengths: Tensor) -> Tensor:
    """Return positions that count from 0 again behind the end of each sequence.

    Args:
        positions: Shape ``[b, s]``.
        lengths: How many of a sequence's positions are real; shape ``[b]``, or ``[1]`` for all alike.
    """
    places = torch.arange(positions.shape[1], device=positions.device)
    ends = lengths.to(positions.device)[:, None]
    return torch.where(places < ends, positions, places - ends)

"""Digests of encoded data, by which a run that is continued notices that its data has changed."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset

from fedbe.storage.checkpoint import raw

MOST_SAMPLES = 2**14
"""How many samples are drawn one by one at most for a fingerprint, over all datasets."""


def fingerprint(dataset: Dataset[Any], stride: int = 1) -> str:
    """Return the number of samples of a dataset and a digest of them, for example ``12:9a8b7c6d5e4f3a2b``.

    A dataset that holds its values in ``tensors``, as `torch.utils.data.TensorDataset` and the token datasets of
    `fedbe.datamodules` do, is read as a whole, at memory speed. Of any other, samples are drawn one by one.

    Args:
        dataset: Of any kind.
        stride: Draw every stride-th sample where they are drawn one by one.

    Source: ours.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in _parts(dataset):
        for value in _tensors(part) or _samples(part, stride):
            _update(digest, value)
    return f"{_length(dataset)}:{digest.hexdigest()}"


def drawn_samples(dataset: Dataset[Any]) -> int:
    """Return how many samples of a dataset are drawn one by one at a stride of 1."""
    return sum(int(_length(part) or 0) for part in _parts(dataset) if not _tensors(part))


@contextmanager
def seeded() -> Iterator[None]:
    """Seed the global generators of torch, NumPy and Python inside the block, for samples that are drawn at random."""
    with isolate_rng():
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        yield


def _parts(dataset: Dataset[Any]) -> Iterator[Dataset[Any]]:
    if isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from _parts(part)
    else:
        yield dataset


def _length(dataset: Any) -> int | None:
    return len(dataset) if hasattr(dataset, "__len__") else None


def _tensors(dataset: Any) -> Sequence[Tensor]:
    tensors = getattr(dataset, "tensors", ())
    whole = isinstance(tensors, tuple | list) and all(isinstance(tensor, Tensor) for tensor in tensors)
    return tensors if whole else ()


def _samples(dataset: Any, stride: int) -> Iterator[Any]:
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        return (dataset[index] for index in range(0, len(dataset), stride))
    return islice(iter(dataset), MOST_SAMPLES)


def _update(digest: hashlib.blake2b, value: Any) -> None:
    """Take in a value and what it is, so that no two values look alike end to end."""
    if isinstance(value, Mapping):
        digest.update(f"mapping {len(value)};".encode())
        for name in sorted(value, key=str):
            _update(digest, name)
            _update(digest, value[name])
    elif isinstance(value, list | tuple):
        digest.update(f"sequence {len(value)};".encode())
        for item in value:
            _update(digest, item)
    elif isinstance(value, Tensor):
        digest.update(f"{value.dtype} {tuple(value.shape)};".encode())
        digest.update(raw(value))
    elif isinstance(value, str | bytes | int | float | None):
        text = repr(value).encode()
        digest.update(f"{type(value).__name__} {len(text)};".encode() + text)
    else:  # an array or a picture; of anything else its type
        content = value.tobytes() if hasattr(value, "tobytes") else b""
        kind = [getattr(value, name, None) for name in ("dtype", "shape", "mode", "size")]
        digest.update(f"{type(value).__name__} {kind};".encode() + content)

"""Where the outputs of frozen blocks are kept."""

from __future__ import annotations

import errno
import logging
import mmap
import os
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from fedbe.errors import ConfigError, Facts, Problem

_log = logging.getLogger(__name__)

KEY = "prefix"

_ALIGNMENT = 16
_CHUNK = 2**24


@dataclass(frozen=True)
class PrefixReuse:
    """Keep the outputs of the frozen blocks below every trained one, sequence by sequence.

    Training, validation and general tasks alike take a sequence's outputs from there from the second time on. Each
    sequence is computed alone, so that the result does not depend on what else was in its batch: to the bit the same
    however often a run is continued, and equal to a run without this up to rounding. Nothing below may be random
    (frozen blocks drop nothing) or trained.

    Attributes:
        gib: Most that is kept, in GiB; what comes after is computed each time.
        on_disk: Whether it is kept in a temporary file, mapped into memory, instead of in memory. It takes up space
            only as it fills; when the disk is full, no more is kept.
        folder: Where the file lies; ``null`` for the system's folder of temporary files.

    Source: ours.
    """

    gib: float = 1.0
    on_disk: bool = False
    folder: Path | None = None

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return what is wrong with the size or the folder."""
        problems = [] if self.gib > 0 else [Problem(f"{key}.gib", self.gib, "give a size above 0")]
        if self.folder is not None and not self.folder.is_dir():
            problems.append(Problem(f"{key}.folder", str(self.folder), "there is no such folder"))
        return problems

    def store(self, parts: int = 1) -> Store:
        """Return an empty store, for this many processes.

        Raises:
            ConfigError: There is no room for it.
        """
        folder = (self.folder or Path(tempfile.gettempdir())) if self.on_disk else None
        try:
            return Store(int(self.gib * 2**30), folder, parts)
        except OSError as error:
            place = "in memory" if folder is None else f"in {folder}"
            remedy = f"there is no room for this {place} ({error.strerror}): give a smaller size, or leave `prefix` out"
            raise ConfigError(Problem(f"{KEY}.gib", self.gib, remedy)) from error


@dataclass
class News:
    """What a process has kept and looked up, since it was last asked, in a store that it shares with others.

    Attributes:
        places: Key → where in the buffer its tensor lies.
        ends: How far the process has filled its part of the buffer, by the part's number.
        hits: How many keys it found.
        misses: How many it did not find.
    """

    places: dict[bytes, tuple[int, torch.Size, torch.dtype]] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)
    hits: int = 0
    misses: int = 0


class Store:
    """Tensors by key in one buffer of fixed size, which takes up space only as it fills.

    Processes forked from this one have the same buffer. Each fills a part of its own (`join`), one tensor after
    another, and others find what it has kept once they have taken in its `news` (`learn`).

    Args:
        size: Bytes.
        folder: Where to keep the buffer as a file; ``None`` for memory.
        parts: In how many equal parts it is filled.

    Attributes:
        hits: How many keys were found.
        misses: How many were not.
        recalled: Keys that the run had kept before it was continued; they count as found, their tensors are gone.

    Raises:
        OSError: There can be no buffer of this size.
    """

    def __init__(self, size: int, folder: Path | None = None, parts: int = 1) -> None:
        self._space = None if folder is None else _Space(size, folder)
        memory = mmap.mmap(-1, size) if self._space is None else self._space.mapped()
        self._buffer = torch.frombuffer(memory, dtype=torch.uint8)
        self._places: dict[bytes, tuple[int, torch.Size, torch.dtype]] = {}
        self._starts = [_aligned(part * (size // parts)) for part in range(parts)] + [size]
        self._ends = self._starts[:-1]
        self._part, self._news = 0, News()
        self.hits = self.misses = 0
        self.recalled: frozenset[bytes] = frozenset()
        self._recalled_bytes = 0

    def __len__(self) -> int:
        return len(self._places)

    @property
    def used(self) -> int:
        """How many bytes are taken, or would be in a run that was never interrupted."""
        kept = (_size(place) for key, place in self._places.items() if key not in self.recalled)
        return self._recalled_bytes + sum(kept)

    def get(self, key: bytes) -> Tensor | None:
        """Return what is kept under a key."""
        known = key in self._places
        if known or key in self.recalled:
            self.hits += 1
        else:
            self.misses += 1
        if not known:
            return None
        start, shape, dtype = self._places[key]
        return self._buffer[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)

    def put(self, key: bytes, tensor: Tensor) -> bool:
        """Keep a tensor and return True, or False if there is no room for it: in this part, or on the disk."""
        start, size = self._ends[self._part], tensor.numel() * tensor.element_size()
        last = self._starts[self._part + 1]
        if start + size > last or (self._space is not None and not self._space.holds(start, start + size, last)):
            return False
        self._places[key] = (start, tensor.shape, tensor.dtype)
        if self._part:
            self._news.places[key] = self._places[key]
        self._buffer[start : start + size] = tensor.cpu().contiguous().view(-1).view(torch.uint8)
        self._ends[self._part] = _aligned(start + size)
        return True

    def state_dict(self) -> dict[str, int]:
        """Return what the figures are, for a run that is continued with an empty store."""
        return {"hits": self.hits, "misses": self.misses, "bytes": self.used}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Count on from a `state_dict`."""
        self.hits, self.misses, self._recalled_bytes = state["hits"], state["misses"], state["bytes"]

    def tensors(self) -> dict[str, Tensor]:
        """Return the keys that a continued run counts as found. Shape ``[keys, bytes of a key]``."""
        keys = sorted(self.recalled | self._places.keys())
        return {"keys": torch.tensor([list(key) for key in keys], dtype=torch.uint8)} if keys else {}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from `tensors`."""
        self.recalled = frozenset(bytes(key) for key in tensors["keys"].tolist()) if tensors else frozenset()

    def join(self, part: int) -> None:
        """Fill this part from now on, in a process that was forked; part 0 is for the one they were forked from."""
        self._part = part
        self.hits = self.misses = 0

    def news(self) -> News:
        """Return what this process has kept and looked up since it joined or was last asked."""
        news = replace(self._news, ends={self._part: self._ends[self._part]}, hits=self.hits, misses=self.misses)
        self._news, self.hits, self.misses = News(), 0, 0
        return news

    def learn(self, news: News) -> None:
        """Take in what another process has kept."""
        self._places |= news.places
        for part, end in news.ends.items():
            self._ends[part] = end
        self.hits, self.misses = self.hits + news.hits, self.misses + news.misses


class _Space:
    """A temporary file, without a name, that is allocated as it fills: a write to a full disk would end the process.

    Args:
        size: Bytes.
        folder: Where it lies.
    """

    def __init__(self, size: int, folder: Path) -> None:
        self._folder, self._size = folder, size
        self._file, name = tempfile.mkstemp(prefix="fedbe-prefix-", dir=folder)
        weakref.finalize(self, os.close, self._file)
        os.unlink(name)
        os.truncate(self._file, size)
        self._allocated = 0
        self._full = False

    def mapped(self) -> mmap.mmap:
        """Return the file as memory."""
        return mmap.mmap(self._file, self._size)

    def holds(self, start: int, end: int, last: int) -> bool:
        """Whether there is room on the disk for the bytes from `start` to `end`, which are filled without gaps.

        Args:
            start: Where this process goes on.
            end: Where the next tensor ends.
            last: Where this process's part ends.
        """
        if self._full or end <= self._allocated:
            return not self._full
        # Some more at a time, for it is a call to the system each time; where that is not there, what is needed.
        for stop in (min(last, end + _CHUNK), end):
            try:
                _allocate(self._file, start, stop - start)
            except OSError as error:
                reason = error.strerror
            else:
                self._allocated = stop
                return True
        self._full = True
        _log.warning("No more outputs of frozen blocks are kept in %s: %s.", self._folder, reason)
        return False


def _allocate(file: int, start: int, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, start, size)
    else:
        if os.pwrite(file, bytes(size), start) < size:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _size(place: tuple[int, torch.Size, torch.dtype]) -> int:
    _, shape, dtype = place
    return _aligned(shape.numel() * dtype.itemsize)


def _aligned(place: int) -> int:
    return -(-place // _ALIGNMENT) * _ALIGNMENT

"""What clients of the round under way have sent, on disk until the round is done."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from fedbe.errors import MessageError
from fedbe.messages import Failure, FitTask, Outcome, Update, decode, encode
from fedbe.seeding import derive_seed
from fedbe.storage.checkpoint import load_tensors, raw, save_tensors
from fedbe.storage.files import explained
from fedbe.storage.packed import pack, unpack

_CONTINUE = "the checkpoints and what other clients sent are intact: make room, then continue with --ckpt_path last"


@dataclass(frozen=True)
class KeptOutcomes:
    """A file for each client that has finished, so that a run which is continued does not train it again.

    Attributes:
        folder: Where the files are.
        run: What tells this run from others.
    """

    folder: Path
    run: str

    def save(self, task: FitTask, outcome: Outcome, kept: Mapping[str, Tensor]) -> None:
        """Write a client's outcome, whole or not at all; an outcome that cannot be encoded is not kept.

        Args:
            task: What the client was given.
            outcome: What it sent.
            kept: What it kept to itself (`Engine.kept`).

        Raises:
            StorageError: The disk is full; nothing is left of it, and those before it are intact.
        """
        try:
            parts = {"outcome": _as_tensor(encode(outcome)), "kept": _as_tensor(pack({}, kept))}
        except MessageError:
            return
        with explained(f"what client {task.client_id!r} sent", _CONTINUE):
            self.folder.mkdir(exist_ok=True)
            save_tensors(self._path(task), parts, {"task": self._key(task)})

    def load(self, task: FitTask) -> tuple[Outcome, dict[str, Tensor]] | None:
        """Return a client's outcome and what it kept; ``None`` if there is none, or the file is torn."""
        try:
            parts, state = load_tensors(self._path(task))
            outcome, kept = decode(raw(parts["outcome"])), unpack(raw(parts["kept"]))[1]
        except (OSError, SafetensorError, ValueError, KeyError, MessageError):
            return None
        if state["task"] != self._key(task) or not isinstance(outcome, Update | Failure):
            return None
        return outcome, kept

    def clear(self) -> None:
        """Forget all of them: the round is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, task: FitTask) -> Path:
        return self.folder / f"{derive_seed(0, *task.purpose):016x}.safetensors"

    def _key(self, task: FitTask) -> list[str | int]:
        return [self.run, *task.purpose]


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)

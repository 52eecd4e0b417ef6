"""What all sides share: the case to measure, its data, the local steps. Needs PyTorch and safetensors, nothing else."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

VOCABULARY = 2048
BASE, EXPANDED, TOKENS, START = "base", "expanded", "tokens.safetensors", "start.safetensors"


@dataclass(frozen=True)
class Case:
    """One federation, the same for every side.

    Attributes:
        name: What it is called in the results.
        kind: What clients train: LoRA adapters on all linear layers of the blocks, or inserted blocks.
        clients: Number of clients; all of them take part in every round.
        rounds: Rounds, of which the first warms up.
        steps: Local steps of a client in a round.
        batch_size: Sequences in a step.
        length: Tokens of a sequence.
        hidden: Width of the model.
        layers: Blocks of the base model.
        rank: Rank of the adapters.
        positions: Base blocks above which an inserted block is trained.
        threads: PyTorch's threads in each process.
        seed: Of weights and data.
    """

    name: str
    kind: Literal["lora", "blocks"] = "lora"
    clients: int = 10
    rounds: int = 4
    steps: int = 4
    batch_size: int = 4
    length: int = 64
    hidden: int = 256
    layers: int = 6
    rank: int = 8
    positions: tuple[int, ...] = ()
    threads: int = 1
    seed: int = 0

    @classmethod
    def read(cls, folder: Path) -> Case:
        """Return the case that was written into a folder."""
        given = json.loads((folder / "case.json").read_text())
        return cls(**{**given, "positions": tuple(given["positions"])})

    def write(self, folder: Path) -> None:
        """Write the case into a folder."""
        (folder / "case.json").write_text(json.dumps(asdict(self), indent=1))

    @property
    def trained_layers(self) -> tuple[int, ...]:
        """Where the inserted blocks are in the expanded model."""
        return tuple(position + count + 1 for count, position in enumerate(sorted(self.positions)))

    def trains(self, name: str) -> bool:
        """Whether clients train the parameter of this name, in a model with adapters or inserted blocks."""
        if self.kind == "lora":
            return ".lora_" in name
        return name.startswith(tuple(f"model.layers.{layer}." for layer in self.trained_layers))


class Rows(Dataset[dict[str, Tensor]]):
    """Sequences of token ids, each its own label. Shape ``[samples, tokens]``, int64."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def client_rows(folder: Path) -> list[Rows]:
    """Return each client's sequences, just as many as it takes steps on in a round."""
    return [Rows(tokens) for tokens in load_file(folder / TOKENS)["tokens"]]


def in_order(rows: Dataset[dict[str, Tensor]], batch_size: int) -> DataLoader[Any]:
    """Return the batches of a client, in the same order on every side and in every round."""
    return DataLoader(rows, batch_size=batch_size, generator=torch.Generator())


def adamw(parameters: Iterator[nn.Parameter] | Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer of every side."""
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)


def take_steps(model: nn.Module, parameters: Sequence[nn.Parameter], batches: DataLoader[Any]) -> float:
    """Take a step on each batch and return the seconds: the training itself, of which nobody can do without."""
    started = time.perf_counter()
    optimizer = adamw(parameters)
    for batch in batches:
        optimizer.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
    return time.perf_counter() - started

"""A federation over bytes, of parties that each have a plan, a model and rows of their own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from toy import ToyData, adamw, tiny_llama

from fedbe.callbacks import PlotCallback
from fedbe.config.build import remote_client
from fedbe.config.federation import Federation
from fedbe.engines import InProcess
from fedbe.engines.loopback import LoopbackChannel
from fedbe.engines.remote import RemoteClient, RemoteEngine, unframed
from fedbe.messages import Message
from fedbe.seeding import generator

CLIENTS = ("client-0", "client-1", "client-2")
TIMES = {"wall_seconds", "evaluation_seconds"}
MEASURED = {"client_seconds", "simulated_seconds"}
ELSEWHERE = {"peak_rss_bytes", "versions", "engine", "prefix"}


class Marked(ToyData):
    """The first row of each client is one that nobody would guess."""

    def client_dataset(self, client_id):
        sequences = super().client_dataset(client_id)
        rows = sequences.rows.clone()
        rows[0] = torch.randint(32, (rows.shape[1],), generator=generator(0, "canary", client_id))
        return type(sequences)(rows)


class NoRows(ToyData):
    """The server's: knows of no client, and has what the global model is scored on."""

    @property
    def client_ids(self) -> list[str]:
        return []

    def client_dataset(self, client_id):
        raise AssertionError("the server has no training rows")


class OwnRows(Marked):
    """Has the training rows of one client and no others, and what its model is scored on."""

    def __init__(self, client_id: str, **options: Any):
        super().__init__(**options)
        self.client_id, self._rows = client_id, None

    def setup(self, stage):
        raise AssertionError("a client loads its own rows")

    def setup_client(self, client_id):
        assert client_id == self.client_id
        self._rows = super().client_dataset(client_id)

    @property
    def client_ids(self) -> list[str]:
        return [self.client_id]

    def client_dataset(self, client_id):
        assert client_id == self.client_id and self._rows is not None
        return self._rows


class NoPlots(PlotCallback):
    def on_run_written(self, run) -> None:
        pass


@dataclass(frozen=True)
class Sent:
    """What went over the channel: ``down`` to a client or ``up`` from it."""

    way: str
    address: str
    data: bytes

    @property
    def message(self) -> Message:
        return unframed(self.data, 10**9)


class Tapped(LoopbackChannel):
    """A channel that notes everything."""

    def __init__(self, clients: Sequence[RemoteClient] = ()):
        self.seen: list[Sent] = []
        super().__init__(clients)

    def send(self, address, data):
        self.seen.append(Sent("down", address, data))
        super().send(address, data)

    def receive(self, seconds, most_bytes):
        received = super().receive(seconds, most_bytes)
        if received is not None:
            self.seen.append(Sent("up", *received))
        return received


def federated(make, folder: Path, data, engine, **changes: Any) -> Federation:
    """A run of a case: `make` returns the arguments of a `Federation`, with objects of its own each time."""
    defaults = {
        "model": tiny_llama(), "rounds": 2, "optimizer": adamw, "logger": "none", "output": folder,
        "trainer": {"accelerator": "cpu", "max_steps": 3},
    }  # fmt: skip
    given = {**defaults, **make(), **changes}
    return Federation(data, engine=engine, **{**given, "callbacks": [*given.get("callbacks", ()), NoPlots()]})


def client(make, name: str, data=OwnRows) -> RemoteClient:
    return remote_client(federated(make, Path("unused"), data(name), InProcess()).run, name)


def over_bytes(make, folder: Path, clients: Sequence[RemoteClient] | None = None, **changes: Any) -> Tapped:
    """Run a case with clients of their own; a server without rows; return all that was said."""
    channel = Tapped([client(make, name) for name in CLIENTS] if clients is None else clients)
    federated(make, folder, NoRows(), RemoteEngine(channel, CLIENTS), **changes).fit()
    return channel


def in_process(make, folder: Path, engine=None, **changes: Any) -> None:
    """Run a case in this process."""
    federated(make, folder, Marked(clients=len(CLIENTS)), engine or InProcess(), **changes).fit()


def outcome(folder: Path, clocked: bool = False) -> dict[str, Any]:
    """All that a run has left but for what is measured, and for what it says of the place where clients were."""
    rounds = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    left_out = TIMES | ELSEWHERE | (set() if clocked else MEASURED)
    tensors = {
        f"{file.name}/{name}": t for file in sorted((folder / "model").rglob("*.safetensors"))
        for name, t in load_file(file).items()
    }  # fmt: skip
    return {"rounds": without(rounds, left_out), "summary": without(summary, left_out), "model": tensors}


def without(value: Any, names: set[str]) -> Any:
    if isinstance(value, dict):
        return {name: without(inner, names) for name, inner in value.items() if name not in names}
    return [without(inner, names) for inner in value] if isinstance(value, list) else value

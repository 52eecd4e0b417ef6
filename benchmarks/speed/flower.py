"""The same federation in Flower's simulation: ``flower.py DIR [kept] [side-by-side]``, in an environment of its own.

As in Flower's examples for language models the client app loads the model for each message, puts the adapters that it
received in with `peft`, trains, and replies with an `ArrayRecord` of the adapters. Kept: each worker process loads the
model once. Side by side: a worker process for each CPU, where Flower's default is one for two.
"""

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from case import START, Case
from flower_client import client_app, peft_name
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from safetensors.torch import load_file


class TimedFedAvg(FedAvg):
    """FedAvg that notes how long each round takes and how long its clients train.

    Attributes:
        rounds: Of each round its seconds and those of all clients' local steps.
        began: When the first client began to train, by the system's monotonic clock.
    """

    def __init__(self, clients: int) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
        self.clients = clients
        self.rounds: list[dict[str, float]] = []
        self.began: float | None = None
        self._started = 0.0

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Begin a round."""
        self._started = time.perf_counter()
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average what the clients sent, and end the round."""
        replies = list(replies)
        result = super().aggregate_train(server_round, replies)
        seconds = time.perf_counter() - self._started
        metrics = [reply.content["metrics"] for reply in replies if reply.has_content()]
        if len(metrics) < self.clients:
            raise RuntimeError(f"{self.clients - len(metrics)} of {self.clients} clients failed")
        self.began = self.began or min(metric["began"] for metric in metrics)
        self.rounds.append({"seconds": seconds, "steps": sum(metric["steps"] for metric in metrics)})
        return result


def main(folder: Path, *options: str) -> None:
    """Run a case and print what was measured."""
    case = Case.read(folder)
    torch.set_num_threads(case.threads)
    strategy = TimedFedAvg(case.clients)
    server, final = ServerApp(), []

    @server.main()
    def serve(grid: Grid, context: Context) -> None:
        arrays = ArrayRecord({peft_name(name): tensor for name, tensor in load_file(folder / START).items()})
        final.append(strategy.start(grid, arrays, num_rounds=case.rounds).arrays)

    cpus = 1 if "side-by-side" in options else 2
    run_simulation(
        server,
        client_app(case, folder, kept="kept" in options),
        num_supernodes=case.clients,
        backend_config={"client_resources": {"num_cpus": cpus}, "init_args": {"num_cpus": 2}},
    )
    print(json.dumps(result(strategy, 2 // cpus)))


def result(strategy: TimedFedAvg, workers: int) -> dict[str, Any]:
    """Return what was measured; of clients side by side a round's local steps count as divided among the workers."""
    rounds = [{"seconds": r["seconds"], "steps": r["steps"] / workers} for r in strategy.rounds]
    return {"rounds": rounds, "began": strategy.began}


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

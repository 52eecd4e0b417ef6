"""The same federation by fedbe: ``framework.py DIR [prefix] [side-by-side] [paired]``.

Paired: beside each round there is the same round of the bare loop, in this process and on a model of its own; they take
turns in who is first, so that a machine that becomes slower or quicker favours neither.
"""

import json
import sys
import time
from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import yaml
from bare import BareLoop
from case import BASE, START, Case, Rows, client_rows, in_order
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from fedbe.bench.display import quiet
from fedbe.bench.overhead import UNEVALUATED, difference, timed
from fedbe.config.build import build
from fedbe.config.parser import read_run, run_parser
from fedbe.data import FederatedDataModule
from fedbe.federation.callback import FederatedCallback
from fedbe.federation.loop import FederatedLoop
from fedbe.federation.view import RunView
from fedbe.messages import FitTask


class CaseData(FederatedDataModule):
    """The sequences of a case; those of the first client are the held-out ones as well, a few of them.

    Args:
        folder: Where the case is.
    """

    def __init__(self, folder: str) -> None:
        case = Case.read(Path(folder))
        super().__init__(case.batch_size)
        self.rows = client_rows(Path(folder))

    @property
    def client_ids(self) -> list[str]:
        """The clients' numbers."""
        return [str(number) for number in range(len(self.rows))]

    def client_dataset(self, client_id: str) -> Rows:
        """Return one client's sequences."""
        return self.rows[int(client_id)]

    def client_dataloader(self, client_id: str, generator: torch.Generator) -> DataLoader[Any]:
        """Return one client's batches, in the order of every side."""
        return in_order(self.client_dataset(client_id), self.batch_size)

    def validation_dataset(self) -> Rows:
        """Return what the base model is scored on before the first round."""
        return Rows(self.rows[0].tokens[:2])

    def test_dataset(self) -> Rows:
        """Return what the base model is scored on before the first round."""
        return self.validation_dataset()


class Beginning(FederatedCallback):
    """Notes when the first client begins, by the system's monotonic clock."""

    began: float | None = None

    def on_client_start(self, run: RunView, task: FitTask) -> None:
        """Note the time, the first time."""
        self.began = self.began or time.monotonic()


def configuration(case: Case, folder: Path, options: Collection[str]) -> dict[str, Any]:
    """Return the run's configuration; side by side means two processes that train clients."""
    algorithm: dict[str, Any] = {
        "class_path": "fedbe.algorithms.FedIT",
        "init_args": {"rank": case.rank, "alpha": float(case.rank), "dropout": 0.0},
    }
    if case.kind == "blocks":
        algorithm = {"class_path": "fedbe.algorithms.BlockExpansion", "init_args": {"positions": list(case.positions)}}
    forked = {"class_path": "fedbe.engines.Forked", "init_args": {"workers": 2}}
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "weight_decay": 0.0}}
    return {
        "seed": case.seed,
        "model": {"name": str(folder / BASE)},
        "algorithm": algorithm,
        "data": {"class_path": "framework.CaseData", "init_args": {"folder": str(folder)}},
        "client": {"optimizer": optimizer},
        "federation": {"rounds": case.rounds + 1, "cohort": "all"},
        "engine": forked if "side-by-side" in options else {"class_path": "fedbe.engines.InProcess"},
        "trainer": {"max_steps": case.steps, "accelerator": "cpu"},
    } | ({"prefix": {"gib": 1.0}} if "prefix" in options else {})


def started_loop(case: Case, folder: Path, output: Path, options: Collection[str]) -> FederatedLoop:
    """Return a loop whose next call of `advance` is the first round, from the tensors from which all sides start."""
    file = output / "run.yaml"
    file.write_text(yaml.safe_dump(configuration(case, folder, options)))
    run, config = read_run(run_parser("fit"), [f"--config={file}", f"--output={output}/run", *UNEVALUATED])
    loop = quiet(build(run, config), Beginning())
    loop.setup()
    loop.on_run_start()
    loop.server.restore(load_file(folder / START))
    return loop


def measure(case: Case, folder: Path, options: Collection[str] = ()) -> dict[str, Any]:
    """Run a case and return what was measured: seconds of each round, and with ``paired`` those of the bare loop's."""
    rounds, bare = [], None
    with TemporaryDirectory() as output:
        loop = started_loop(case, folder, Path(output), options)
        for number in range(case.rounds):
            found: dict[str, float] = {}
            if bare and number % 2:
                found["bare"], found["steps"] = timed(bare.round)
            found["seconds"], _ = timed(loop.advance)
            if "paired" in options and not number % 2:
                bare = bare or BareLoop(case, folder)  # not before the first round, whose beginning is measured
                found["bare"], found["steps"] = timed(bare.round)
            rounds.append(found)
    began = next(callback.began for callback in loop.callbacks if isinstance(callback, Beginning))
    apart = {"difference": difference(bare.state, loop.server.state)} if bare else {}
    return {"rounds": rounds, "began": began, **apart}


def main(folder: Path, *options: str) -> None:
    """Measure a case and print the result."""
    case = Case.read(folder)
    torch.set_num_threads(case.threads)
    print(json.dumps(measure(case, folder, options)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])

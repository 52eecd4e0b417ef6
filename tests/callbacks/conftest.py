import copy
import math
import random
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedbe.aggregation import Mean
from fedbe.federation.hooks import Hooks
from fedbe.federation.record import RoundRecord
from fedbe.federation.scorer import Scores
from fedbe.federation.view import RunView
from fedbe.messages import FitTask, Update


def make_record(number: int, accuracy: float | None = 0.3, **changes: Any) -> dict[str, Any]:
    general = {"docs": {"score": 0.5 - 0.01 * number, "standard_error": 0.01, "cross_entropy": 2.0}}
    values: dict[str, Any] = {
        "downstream": None if accuracy is None else {"accuracy": accuracy, "loss": 2.0},
        "general": general,
        "retention": {"mean": 1 - 0.02 * number, "docs": 1 - 0.02 * number},
        "delta_ce": {"mean": 0.0, "docs": 0.0},
        "simulated_seconds": 1.5 * number,
        "wall_seconds": 2.0 * number,
        **changes,
    }
    return RoundRecord(number, **values).to_dict()


def learning_history(rounds: int = 6, blocks: int = 4, clients: int = 5) -> list[dict[str, Any]]:
    chance = random.Random(0)
    history = [make_record(0, 0.2)]
    for number in range(1, rounds + 1):
        cohort = chance.sample([f"c{k}" for k in range(clients)], 3)
        allocation = {client: [f"block {chance.randrange(blocks)}"] for client in cohort}
        sent = {"up": 1000, "down": 2000}
        accuracy = 0.4 - 0.2 * math.exp(-number / 3)
        history.append(make_record(number, accuracy, cohort=cohort, allocation=allocation, bytes=sent))
    return history


class FakeLoop(SimpleNamespace):
    """What `RunView` sees of a loop; `play` gives its callbacks a history hook by hook."""

    def __init__(self, folder: Path, callbacks: list[Any], **changes: Any) -> None:
        plots, checkpoints = folder / "plots", folder / "checkpoints"
        plots.mkdir()
        checkpoints.mkdir()
        values: dict[str, Any] = {
            "model": None,
            "general_tasks": (),
            "engine": SimpleNamespace(client_ids=[f"c{k}" for k in range(5)]),
            "plan": SimpleNamespace(seed=3),
            "logger": None,
            "config": {"seed": 3},
            "rounds": 6,
            "server": SimpleNamespace(state={"w": torch.zeros(2)}, restore=self._restore, optimizer=Mean()),
            "scorer": SimpleNamespace(timed=nullcontext, seconds=0.0, scores=Scores()),
            "round": SimpleNamespace(kept_outcomes=None),
            "record": RoundRecord(0),
            "history": [],
            "summary": {},
            "stop_reason": None,
            "restored": None,
            "folder": SimpleNamespace(path=folder, plots=plots, checkpoints=checkpoints, model=folder / "model"),
        }
        super().__init__(callbacks=callbacks, **(values | changes))

    @property
    def state(self) -> dict[str, torch.Tensor]:
        return self.server.state

    @state.setter
    def state(self, state: dict[str, torch.Tensor]) -> None:
        self.server.state = state

    @property
    def hooks(self) -> Hooks:
        return Hooks(self.callbacks, RunView(self))

    def stop(self, reason: str) -> None:
        self.stop_reason = self.stop_reason or reason

    def _restore(self, state: dict[str, torch.Tensor]) -> None:
        self.restored = self.state = state

    def call(self, hook: str, *arguments: Any) -> None:
        self.hooks.call(hook, *arguments)

    def write(self, record: dict[str, Any]) -> None:
        self.record = RoundRecord(**record)
        self.history.append(record)
        self.call("on_round_written")

    def play(self, history: list[dict[str, Any]]) -> None:
        self.record = RoundRecord(**history[0])
        self.call("on_run_start")
        self.play_on(history)

    def play_on(self, history: list[dict[str, Any]]) -> None:
        for record in copy.deepcopy(history):
            self.record = RoundRecord(**record)
            if record["round"]:
                self.call("on_round_start")
            for client in record["cohort"]:
                task = FitTask(client, 0, record["round"] - 1, {}, ())
                update = Update(client, {}, 8, {"loss": 2.0 / record["round"], "seconds": 0.1})
                self.call("on_client_start", task)
                self.call("on_client_end", task, self.hooks.replaced(task, update))
            self.write(record)

    def finish(self) -> None:
        self.call("on_last_round")
        score = {"score": 0.5, "standard_error": 0.01, "cross_entropy": 2.0}
        self.summary |= {
            "algorithm": "BlockExpansion",
            "rounds": len(self.history) - 1,
            "stop_reason": "all rounds are done",
            "downstream_base": {"accuracy": 0.2, "loss": 3.0},
            "downstream": {"accuracy": 0.373, "loss": 2.5},
            "general": {"base": {"docs": score}, "final": {"docs": score | {"score": 0.44}}},
            "retention": {"mean": 0.88, "docs": 0.88},
            "delta_ce": {"mean": 0.25, "docs": 0.25},
            "bytes_up": 6000,
            "bytes_down": 12_340_000,
            "wall_seconds": 83.0,
            "simulated_seconds": 9.0,
        }
        self.call("on_run_written")


@pytest.fixture
def record() -> Any:
    return make_record


@pytest.fixture
def history() -> list[dict[str, Any]]:
    return learning_history()


@pytest.fixture
def fake_loop(tmp_path: Path) -> Any:
    return lambda *callbacks, **changes: FakeLoop(tmp_path, list(callbacks), **changes)

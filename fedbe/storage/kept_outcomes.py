"""What clients of the round under way have sent, on disk until the round is done."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from fedbe.messages import ClientTask, Failure, Outcome, Update
from fedbe.seeding import derive_seed
from fedbe.storage.checkpoint import load_tensors, save_tensors

_PARTS = ("tensors", "kept", "extra", "objective_kept")


@dataclass(frozen=True)
class KeptOutcomes:
    """A file for each client that has finished, so that a run which is continued does not train it again.

    Attributes:
        folder: Where the files are.
        run: What tells this run from others.
    """

    folder: Path
    run: str

    def save(self, task: ClientTask, outcome: Outcome) -> None:
        """Write what came of a client, whole or not at all."""
        self.folder.mkdir(exist_ok=True)
        state = {"task": self._key(task)}
        if isinstance(outcome, Failure):
            save_tensors(self._path(task), {}, state | {"failure": outcome.record})
            return
        parts = {f"{part}/{name}": t for part in _PARTS for name, t in getattr(outcome, part).items()}
        update = {"samples": outcome.samples, "metrics": dict(outcome.metrics)}
        save_tensors(self._path(task), parts, state | {"update": update})

    def load(self, task: ClientTask) -> Outcome | None:
        """Return what came of a client; ``None`` if it is not known, or the file is torn."""
        try:
            tensors, state = load_tensors(self._path(task))
        except (OSError, SafetensorError, ValueError):
            return None
        if state["task"] != self._key(task):
            return None
        if "failure" in state:
            failure = state["failure"]
            return Failure(failure["client"], failure["kind"], failure["reason"])
        parts: dict[str, Any] = {
            part: {name.removeprefix(f"{part}/"): t for name, t in tensors.items() if name.startswith(f"{part}/")}
            for part in _PARTS
        }
        known = state["update"]
        return Update(task.client_id, samples=known["samples"], metrics=known["metrics"], **parts)

    def clear(self) -> None:
        """Forget all of them: the round is done."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, task: ClientTask) -> Path:
        return self.folder / f"{derive_seed(0, *task.purpose):016x}.safetensors"

    def _key(self, task: ClientTask) -> list[str | int]:
        return [self.run, *task.purpose]

"""What it takes to continue a run, on disk after each round."""

import json
import os
from collections.abc import Collection
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

from fedbe.callback import FederatedCallback
from fedbe.errors import Problem
from fedbe.evaluation.tasks import check_at_least
from fedbe.loop import FederatedLoop

LAST = "last.safetensors"


class CheckpointCallback(FederatedCallback):
    """Writes `checkpoints/last.safetensors` after each round, whole or not at all.

    Args:
        every_n_rounds: Write after every so many rounds.
    """

    def __init__(self, every_n_rounds: int = 1) -> None:
        self.every_n_rounds = every_n_rounds

    def check(self, key: str, metrics: Collection[str] = ()) -> list[Problem]:
        """Return what is wrong with the number."""
        return check_at_least(key, 1, every_n_rounds=self.every_n_rounds)

    def on_round_written(self, loop: FederatedLoop) -> None:
        """Save the global tensors and the loop's state in one file, and put it in the place of the one before."""
        if loop.progress.completed % self.every_n_rounds == 0 or loop.done:
            save_checkpoint(loop.folder.checkpoints / LAST, loop)


def save_checkpoint(path: Path, loop: FederatedLoop) -> None:
    """Write the loop's tensors, and its `state_dict` as JSON in the file's header; nothing executable."""
    partial = path.with_suffix(".partial")
    tensors = {name: tensor.contiguous() for name, tensor in loop.tensors().items()}
    save_file(tensors, partial, metadata={"loop": json.dumps(loop.state_dict())})
    os.replace(partial, path)


def load_checkpoint(path: Path, loop: FederatedLoop) -> None:
    """Put a loop that was set up from the same configuration where the one that wrote the checkpoint was."""
    with safe_open(path, framework="pt") as file:
        loop.load_state_dict(json.loads(file.metadata()["loop"]))
        loop.load_tensors({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118

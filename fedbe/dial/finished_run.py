"""A finished run taken up again: its folder, its configuration, and the model that it ended with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from fedbe.config.build import build
from fedbe.config.parser import run_of
from fedbe.config.raw import read_yaml
from fedbe.config.run import RunConfig
from fedbe.errors import ConfigError, Problem
from fedbe.federation.loop import FederatedLoop
from fedbe.storage.checkpoint import BEST, FORMAT, Checkpoints, load_tensors
from fedbe.storage.run_folder import RunFolder
from fedbe.storage.tensor_names import grouped


@dataclass(frozen=True)
class FinishedRun:
    """A run that came to its end.

    Attributes:
        folder: Its folder.
        summary: Its `summary.json`.
        run: What of its configuration a model needs that is not trained any more: no loggers, callbacks, optimizer,
            objective, averaging or engine of its own. Nothing else is built, and no module in the folder is imported.
        config: The resolved configuration.
    """

    folder: RunFolder
    summary: Mapping[str, Any]
    run: RunConfig
    config: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path) -> FinishedRun:
        """Return the run in a folder; its weights and data are not loaded yet.

        Raises:
            ConfigError: There is no finished run, or its configuration cannot be read any more.
        """
        folder = RunFolder(path)
        summary = read_summary(folder)
        config = read_yaml(folder.config, "run")
        return cls(folder, summary, run_of(_needed(config), apart=folder.path), config)

    def open(self, general_tasks: bool = True) -> tuple[FederatedLoop, dict[str, Tensor]]:
        """Return the loop with the model that the run ended with, and the global tensors that it started from.

        Args:
            general_tasks: Whether general tasks are to be scored; without, they are not prepared.

        Raises:
            ConfigError: The configuration cannot run any more, or the tensors are gone or do not fit it.
        """
        run = self.run if general_tasks else replace(self.run, general_tasks=())
        state, tensors = self._read_checkpoint()
        kept = self._read_kept()
        loop = replace(build(run, self.config), folder=self.folder)
        loop.setup()
        try:
            loop.server.come_to(state["server"])
            start = dict(loop.server.state)
            loop.server.load_state_dict(state["server"], grouped(tensors).get("server", {}))
            if kept is not None:
                loop.server.restore(kept)
        except (KeyError, ValueError) as error:
            remedy = f"belongs to another configuration than {self.folder.config}: {' '.join(str(error).split())}"
            raise ConfigError(Problem("run", str(self.folder.checkpoints), remedy)) from error
        return loop, start

    def _read_checkpoint(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Return the state and the tensors at the run's end."""
        last = next(
            Checkpoints(self.folder.checkpoints).newest_first(), self.folder.checkpoints / "round_*.safetensors"
        )
        state, tensors = self._load(last)
        if state.get("format") != FORMAT:
            remedy = "was written by another version of fedbe: use that version"
            raise ConfigError(Problem("run", str(last), remedy))
        done = state["progress"]["completed"]
        if done != self.summary["rounds"]:
            remedy = f"was written after round {done}, and the run ended after round {self.summary['rounds']}"
            raise ConfigError(Problem("run", str(last), remedy))
        return state, tensors

    def _read_kept(self) -> dict[str, Tensor] | None:
        """Return the global tensors of the round that was kept; ``None`` if it is the last one."""
        if self.summary.get("kept_round") is None:
            return None
        _, tensors = self._load(self.folder.checkpoints / BEST)
        return tensors

    @staticmethod
    def _load(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
        try:
            tensors, state = load_tensors(path)
        except (OSError, SafetensorError, ValueError) as error:
            remedy = f"cannot be read, and the model cannot be made without it: {error}"
            raise ConfigError(Problem("run", str(path), remedy)) from error
        return state, tensors


def _needed(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of a run's configuration that its model, its data and its tasks are made of."""
    names = ("data", "name", "seed", "model", "algorithm", "general_tasks", "clock", "prefix")
    rounds, options = (config.get(name) for name in ("federation", "trainer"))
    needed = {name: config[name] for name in names if name in config}
    if isinstance(rounds, dict):
        needed["federation"] = {name: value for name, value in rounds.items() if name != "averaging"}
    if isinstance(options, dict):
        plain = (bool, int, float, str, type(None))
        needed["trainer"] = {name: value for name, value in options.items() if isinstance(value, plain)}
    return needed | {"logger": "none"}


def read_summary(folder: RunFolder) -> dict[str, Any]:
    """Return the figures of a finished run.

    Raises:
        ConfigError: There are none.
    """
    try:
        summary: dict[str, Any] = json.loads(folder.summary.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        remedy = f"holds no finished run ({' '.join(str(error).split())}); give a run's folder"
        raise ConfigError(Problem("run", str(folder.path), remedy)) from error
    return summary

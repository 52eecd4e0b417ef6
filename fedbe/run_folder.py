"""What a run leaves on disk."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fedbe.errors import ConfigError, Problem


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run; `create` makes it, and never in a place that holds something else.

    Attributes:
        path: The folder.
    """

    path: Path

    def create(self, config: Mapping[str, Any]) -> None:
        """Create the folder and write the resolved configuration into it.

        Raises:
            ConfigError: It exists and is not empty, or cannot be created where it is to be.
        """
        problem = self.problem(self.path)
        if problem is not None:
            raise ConfigError(problem)
        for directory in (self.path, self.plots, self.checkpoints):
            directory.mkdir(parents=True, exist_ok=True)
        self.config.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")

    @staticmethod
    def problem(path: Path) -> Problem | None:
        """Return why `path` cannot become a run's folder, or ``None``."""
        if path.is_dir() and any(path.iterdir()):
            return Problem("output", str(path), "the folder exists and is not empty: give another, or move it away")
        if path.exists() and not path.is_dir():
            return Problem("output", str(path), "a file stands there: give another folder")
        above = next(parent for parent in path.absolute().parents if parent.exists())
        if not path.exists() and not (above.is_dir() and os.access(above, os.W_OK)):
            return Problem("output", str(path), f"cannot be created: {above} is no folder that can be written to")
        return None

    @staticmethod
    def next_free(parent: Path, name: str) -> Path:
        """Return ``parent/name``, or the first of ``parent/name-2``, ``-3``, … that does not exist."""
        path, number = parent / name, 1
        while path.exists():
            number += 1
            path = parent / f"{name}-{number}"
        return path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        """One JSON object per round."""
        return self.path / "metrics.jsonl"

    @property
    def summary(self) -> Path:
        """The figures of the finished run."""
        return self.path / "summary.json"

    @property
    def checkpoints(self) -> Path:
        """What is needed to continue."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """The result as a Hugging Face checkpoint, written when the run ends."""
        return self.path / "model"

    @property
    def plots(self) -> Path:
        """PNG files."""
        return self.path / "plots"

    def append_metrics(self, record: Mapping[str, Any]) -> None:
        """Append one round's record to `metrics`."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `summary`, whole or not at all."""
        partial = self.summary.with_suffix(".partial")
        partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        os.replace(partial, self.summary)

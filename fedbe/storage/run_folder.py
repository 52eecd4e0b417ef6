"""What a run leaves on disk."""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from fedbe.errors import ConfigError, Problem
from fedbe.storage.files import explained, replacing, replacing_folder

_CONTINUE = "the checkpoints are intact: make room, then continue with --ckpt_path last"
RUNS = Path("runs")
"""Where a run's folder goes that is not said otherwise, in the folder where the command is called."""

_LOCK = ".lock"
_LONGEST_NAME = 200
"""Bytes of a folder's name; most file systems take 255, and numbers are added to it."""
_LOCK_SECONDS = 10.0
"""How long to wait for a folder's last user: processes of a run that was killed notice that within seconds."""


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run; `create` makes it, and never in a place that holds something else.

    Attributes:
        path: The folder.
        begin_again: Whether a run may take the place of one that ended before its first checkpoint.
    """

    path: Path
    begin_again: bool = False

    def create(self, config: Mapping[str, Any]) -> None:
        """Create the folder and write the resolved configuration into it.

        Raises:
            ConfigError: It exists and is not empty, or cannot be created where it is to be.
        """
        problem = self.problem(self.path)
        if problem is not None and not (self.begin_again and self._only_begun):
            raise ConfigError(problem)
        self.metrics.unlink(missing_ok=True)
        self.path.mkdir(parents=True, exist_ok=True)
        # First: a folder that holds anything else and no configuration is not known again as a run's.
        self.config.write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
        for directory in (self.plots, self.checkpoints):
            directory.mkdir(exist_ok=True)

    @contextmanager
    def in_use(self, wait_seconds: float = _LOCK_SECONDS) -> Iterator[None]:
        """Keep other processes from running here until the block ends; a process that dies keeps nobody out.

        Args:
            wait_seconds: How long to wait for another process to end.

        Raises:
            ConfigError: Another process runs here, or the folder cannot be created.
        """
        lock = FileLock(self.path / _LOCK, timeout=wait_seconds)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with suppress(NotImplementedError):  # a file system without locks
                lock.acquire()
        except Timeout as error:
            remedy = "another process is running there: wait for its end, or give another folder"
            raise ConfigError(Problem("output", str(self.path), remedy)) from error
        except OSError as error:
            raise ConfigError(Problem("output", str(self.path), f"cannot be written to: {error}")) from error
        try:
            yield
        finally:
            lock.release()

    @property
    def _only_begun(self) -> bool:
        return (
            self.config.is_file()
            and not self.summary.exists()
            and not any(self.checkpoints.glob("round_*.safetensors"))
        )

    @staticmethod
    def problem(path: Path) -> Problem | None:
        """Return why `path` cannot become a run's folder, or ``None``."""
        if path.is_dir() and any(inside.name != _LOCK for inside in path.iterdir()):
            return Problem("output", str(path), "the folder exists and is not empty: give another, or move it away")
        if path.exists() and not path.is_dir():
            return Problem("output", str(path), "a file stands there: give another folder")
        above = next(parent for parent in path.absolute().parents if parent.exists())
        if not path.exists() and not (above.is_dir() and os.access(above, os.W_OK)):
            return Problem("output", str(path), f"cannot be created: {above} is no folder that can be written to")
        return None

    @staticmethod
    def name_problem(parent: Path, name: str) -> Problem | None:
        """Return why a run of this name would not get a folder of its own inside `parent`, or ``None``."""
        parts = re.split(r"[/\\]", name)
        if (
            any(part in ("", ".", "..") or len(part.encode()) > _LONGEST_NAME for part in parts)
            or not name.isprintable()
        ):
            return Problem("name", name, f"names a folder in {parent}/: give letters, digits, `-` and `_`")
        if not (parent / name).resolve().is_relative_to(parent.resolve()):
            return Problem("name", name, f"leads out of {parent}/ by a link: give another name, or `output`")
        return None

    @staticmethod
    def next_free(parent: Path, name: str) -> Path:
        """Return ``parent/name``, or the first of ``parent/name-2``, ``-3``, … that does not exist."""
        path, number = parent / name, 1
        while path.exists():
            number += 1
            path = parent / f"{name}-{number}"
        return path

    @staticmethod
    def latest(parent: Path, name: str) -> Path | None:
        """Return the one of ``parent/name``, ``parent/name-2``, … that was made last; ``None`` if there is none."""
        path, number = parent / name, 1
        if not path.exists():
            return None
        while (following := parent / f"{name}-{number + 1}").exists():
            path, number = following, number + 1
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

    @contextmanager
    def new_model(self) -> Iterator[Path]:
        """Give a new folder, which takes the place of `model` if the block ends well.

        Raises:
            StorageError: It cannot be written; the run can be continued from its last checkpoint.
        """
        with explained("the model", _CONTINUE), replacing_folder(self.model) as partial:
            partial.rmdir()  # whoever writes it makes it
            yield partial

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `summary`, whole or not at all.

        Raises:
            StorageError: It cannot be written; the run can be continued from its last checkpoint.
        """
        with explained(self.summary.name, _CONTINUE), replacing(self.summary) as partial:
            partial.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")

"""`csv/metrics.csv`: one row a round, and no row twice however often a run is continued."""

from __future__ import annotations

import csv
import io
import os
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch.loggers import Logger
from torch import Tensor

from fedbe.storage.files import explained, replacing

_CONTINUE = "what was written before is intact: make room, then continue with --ckpt_path last"
_STEP = "step"


class CSVLog(Logger):
    """A Lightning logger that goes on in a file which is there, where `lightning.pytorch.loggers.CSVLogger` deletes it.

    The columns are ``step`` and every metric logged so far, by name. The first row of a process takes the place of all
    rows of its step or a later one: those were logged after the checkpoint from which a run is continued.

    Args:
        folder: Where `metrics.csv` and `hparams.yaml` are.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self._columns: list[str] | None = None

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.name

    @property
    def version(self) -> str:
        """Nothing: a folder is one run's."""
        return ""

    @property
    def metrics(self) -> Path:
        """The file of the rows."""
        return self.folder / "metrics.csv"

    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Write the configuration into `hparams.yaml`.

        Raises:
            StorageError: It cannot be written.
        """
        values = dict(vars(params) if isinstance(params, Namespace) else params)
        with explained("hparams.yaml", _CONTINUE):
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.folder / "hparams.yaml") as partial:
                partial.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row; it is on the disk when this returns.

        Raises:
            StorageError: It cannot be written; the rows before it are intact.
        """
        if step is None:
            raise ValueError("`CSVLog` takes rows of a round: give its number as `step`")
        row = {_STEP: str(step), **{name: _text(value) for name, value in metrics.items()}}
        with explained(self.metrics.name, _CONTINUE):
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._columns is None:
                self._write([*(known for known in self._read() if int(known[_STEP]) < step), row])
            elif row.keys() <= set(self._columns):
                self._append(row, self._columns)
            else:
                self._write([*self._read(), row])

    def _read(self) -> list[dict[str, str]]:
        """Return the rows by column, without empty cells, and without half a row at the end."""
        text = self.metrics.read_bytes().decode() if self.metrics.exists() else ""
        whole = io.StringIO(text[: text.rfind("\n") + 1], newline="")
        return [{name: cell for name, cell in row.items() if cell} for row in csv.DictReader(whole)]

    def _write(self, rows: Sequence[Mapping[str, str]]) -> None:
        columns = sorted({name for row in rows for name in row})
        with replacing(self.metrics) as partial:
            partial.write_bytes(_lines([dict(zip(columns, columns, strict=True)), *rows], columns))
        self._columns = columns

    def _append(self, row: Mapping[str, str], columns: Sequence[str]) -> None:
        size = self.metrics.stat().st_size
        try:
            with self.metrics.open("ab") as file:
                file.write(_lines([row], columns))
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            os.truncate(self.metrics, size)
            raise


def _lines(rows: Iterable[Mapping[str, str]], columns: Sequence[str]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns, restval="").writerows(rows)
    return text.getvalue().encode()


def _text(value: Any) -> str:
    return str(value.item() if isinstance(value, Tensor) else value)

"""`metrics.jsonl`: one line a round, and no line twice however often a run is continued."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedbe.errors import ConfigError, Problem


class MetricsFile:
    """Appends records, and can go back to where a checkpoint was written.

    Args:
        path: The file; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size = 0
        self._digest = hashlib.blake2b(digest_size=16)

    @property
    def position(self) -> dict[str, Any]:
        """Where the file ends after the records so far: its size in bytes, and a digest of them."""
        return {"bytes": self._size, "digest": self._digest.hexdigest()}

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one record; it is on the disk when this returns."""
        line = (json.dumps(record) + "\n").encode()
        with self.path.open("ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._size += len(line)
        self._digest.update(line)

    def rewind(self, position: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Drop what was appended after `position`, and return the records before it.

        Raises:
            ConfigError: What stands before it is not what was written.
        """
        content = self.path.read_bytes()[: position["bytes"]] if self.path.exists() else b""
        self._size, self._digest = len(content), hashlib.blake2b(content, digest_size=16)
        if self.position != position:
            remedy = "is not what the checkpoint's run had written: put the file back, or begin a new run"
            raise ConfigError(Problem("ckpt_path", str(self.path), remedy))
        os.truncate(self.path, self._size)
        return [json.loads(line) for line in content.splitlines()]

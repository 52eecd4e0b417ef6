"""`metrics.jsonl`: one line a round, and no line twice however often a run is continued."""

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedbe.errors import ConfigError, Problem
from fedbe.storage.files import explained

_CONTINUE = "what was written before is intact: make room, then continue with --ckpt_path last"


class MetricsFile:
    """Appends records, and can go back to where a checkpoint was written.

    Args:
        path: The file; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size = 0
        self._digest = _digest(b"")

    @property
    def position(self) -> dict[str, Any]:
        """Where the file ends after the records so far: its size in bytes, and a digest of them."""
        return {"bytes": self._size, "digest": self._digest.hexdigest()}

    def append(self, record: Mapping[str, Any]) -> None:
        """Append one record; it is on the disk when this returns.

        Raises:
            StorageError: It cannot be written; the records before it, and the checkpoints, are intact.
        """
        line = (json.dumps(record) + "\n").encode()
        with explained(self.path.name, _CONTINUE):
            try:
                with self.path.open("ab") as file:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                self._cut()
                raise
        self._size += len(line)
        self._digest.update(line)

    def fits(self, position: Mapping[str, Any]) -> bool:
        """Return whether the file begins with the records that were there at `position`."""
        content = self._content(position.get("bytes", -1))
        return position == {"bytes": len(content), "digest": _digest(content).hexdigest()}

    def rewind(self, position: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Drop what was appended after `position`, and return the records before it.

        Raises:
            ConfigError: What stands before it is not what was written.
        """
        content = self._content(position["bytes"])
        self._size, self._digest = len(content), _digest(content)
        if self.position != position:
            remedy = "is not what the checkpoint's run had written: put the file back, or begin a new run"
            raise ConfigError(Problem("ckpt_path", str(self.path), remedy))
        os.truncate(self.path, self._size)
        return [json.loads(line) for line in content.splitlines()]

    def _content(self, size: int) -> bytes:
        return self.path.read_bytes()[: max(0, size)] if self.path.exists() else b""

    def _cut(self) -> None:
        """Take off half a line that was written last."""
        with suppress(OSError):
            os.truncate(self.path, self._size)


def _digest(content: bytes) -> "hashlib.blake2b":
    return hashlib.blake2b(content, digest_size=16)

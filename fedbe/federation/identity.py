"""What tells a run from others: its configuration and its base model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedbe.storage.checkpoint import Checkpoint, check_same_base, check_same_run, checksum, influential


@dataclass(frozen=True)
class Identity:
    """What must be the same for a run to be continued.

    Attributes:
        config: The resolved configuration.
        base: Fingerprint of the base model's weights.
    """

    config: Mapping[str, Any]
    base: str

    @property
    def digest(self) -> str:
        """One digest of everything."""
        return checksum({}, json.dumps([influential(self.config), self.base]))

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse the checkpoint of another run.

        Raises:
            ConfigError: It was written with another configuration or another base model.
        """
        check_same_run(checkpoint, self.config)
        check_same_base(checkpoint, self.base)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of this, to be checked when the run is continued."""
        return {"config": dict(self.config), "base": self.base}

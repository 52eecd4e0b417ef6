"""What tells a run from others: its configuration, its base model and its data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from fedbe.data import FederatedDataModule
from fedbe.storage.checkpoint import Checkpoint, check_same_base, check_same_data, check_same_run, checksum, influential


@dataclass(frozen=True)
class Identity:
    """What must be the same for a run to be continued.

    Attributes:
        config: The resolved configuration.
        base: Fingerprint of the base model's weights.
        samples: The data module.
        with_clients: Whether the clients' data is here, and not on machines of their own.
    """

    config: Mapping[str, Any]
    base: str
    samples: FederatedDataModule
    with_clients: bool

    @cached_property
    def data(self) -> dict[str, str]:
        """Fingerprint of the encoded data, worked out when it is first asked for."""
        return self.samples.fingerprint(self.with_clients)

    @property
    def digest(self) -> str:
        """One digest of everything."""
        return checksum({}, json.dumps([influential(self.config), self.base, self.data]))

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse the checkpoint of another run.

        Raises:
            ConfigError: It was written with another configuration, another base model or other data.
        """
        check_same_run(checkpoint, self.config)
        check_same_base(checkpoint, self.base)
        check_same_data(checkpoint, self.data)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of this, to be checked when the run is continued."""
        return {"config": dict(self.config), "base": self.base, "data": self.data}

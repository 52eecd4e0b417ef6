import logging
import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import pytest
from hypothesis import settings

settings.register_profile("fedbe", deadline=None, derandomize=True)
settings.load_profile("fedbe")


class _Deprecations(logging.Handler):
    """Keeps what a library logs about deprecated calls."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecated" in (message := record.getMessage()):
            self.messages.append(message)


@pytest.fixture(autouse=True)
def no_deprecated_call_is_logged() -> Iterator[None]:
    """Fail tests whose calls transformers logs as deprecated, which it does once in a process, in place of warning."""
    handler = _Deprecations()
    logging.getLogger("transformers").addHandler(handler)
    yield
    logging.getLogger("transformers").removeHandler(handler)
    assert handler.messages == []

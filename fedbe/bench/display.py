"""A run without its display, so that a measurement's own output can be read."""

from fedbe.callbacks import ProgressCallback
from fedbe.federation.callback import FederatedCallback
from fedbe.federation.loop import FederatedLoop


def without_display(loop: FederatedLoop) -> list[FederatedCallback]:
    """Return the run's callbacks but for the one that draws on the terminal."""
    return [callback for callback in loop.callbacks if not isinstance(callback, ProgressCallback)]

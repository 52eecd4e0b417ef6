"""A run as it is measured: without its display, so that the measurement's own output can be read."""

from dataclasses import replace

from fedbe.callbacks import ProgressCallback
from fedbe.federation.callback import FederatedCallback
from fedbe.federation.loop import FederatedLoop


def quiet(loop: FederatedLoop, *more: FederatedCallback) -> FederatedLoop:
    """Return a loop, which was built and not set up, without what draws on the terminal and with further callbacks."""
    shown = [callback for callback in loop.callbacks if not isinstance(callback, ProgressCallback)]
    return replace(loop, callbacks=[*shown, *more])

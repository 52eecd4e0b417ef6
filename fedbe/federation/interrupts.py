"""Ctrl-C and SIGTERM: a run ends where it can be continued, and says how."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from fedbe.errors import Terminated
from fedbe.federation.loop import FederatedLoop
from fedbe.system.notice import say

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def stopping_on_interrupt(loop: FederatedLoop) -> Iterator[None]:
    """At the first Ctrl-C or SIGTERM let the loop end where it can be continued, at the second end it at once.

    Where signals cannot be handled, outside of the main thread, or are ignored, as under ``nohup``, it stays like that.

    Raises:
        KeyboardInterrupt: The loop was ended by Ctrl-C.
        Terminated: The loop was ended by SIGTERM.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if len(received) > 1:
            raise interrupt(number)
        loop.interrupted = True
        unit = "client" if loop.round.kept_outcomes is not None else "round"
        say(f"ends after this {unit}; Ctrl-C again to end at once")

    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, note)
    try:
        yield
    except KeyboardInterrupt as error:
        if loop.folder.config.exists():
            say(f"the run in {loop.folder.path} goes on with --ckpt_path last")
        raise (interrupt(received[0]) if received else error) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def interrupt(number: int) -> KeyboardInterrupt:
    """Return what a signal raises."""
    return Terminated() if number == signal.SIGTERM else KeyboardInterrupt()

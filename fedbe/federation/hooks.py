"""Calls the callbacks of a run, by phase, and keeps their states by key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedbe.errors import ConfigError, Problem
from fedbe.federation.callback import FederatedCallback
from fedbe.federation.view import RunView
from fedbe.messages import FitTask, Outcome, Update


class Hooks:
    """The callbacks of a run, in the order in which they are called: by phase, then as given.

    Args:
        callbacks: In any order.
        view: What they get of the run.

    Raises:
        ConfigError: Two of them keep their state under one key.
    """

    def __init__(self, callbacks: Sequence[FederatedCallback], view: RunView) -> None:
        self.callbacks = sorted(callbacks, key=lambda callback: callback.phase)
        self._view = view
        keys = [callback.state_key for callback in self.callbacks]
        if twice := [key for key in dict.fromkeys(keys) if keys.count(key) > 1]:
            remedy = "two callbacks keep their state under this key: give one of them a `state_key` of its own"
            raise ConfigError(Problem("callbacks", twice[0], remedy))

    def call(self, hook: str, *arguments: Any) -> None:
        """Call one hook on every callback, in order."""
        for callback in self.callbacks:
            getattr(callback, hook)(self._view, *arguments)

    def replaced(self, task: FitTask, outcome: Outcome) -> Any:
        """Return what `on_client_update` leaves of an outcome, or puts in its place."""
        for callback in self.callbacks:
            if isinstance(outcome, Update):
                outcome = callback.on_client_update(self._view, task, outcome) or outcome
        return outcome

    def state_dict(self) -> dict[str, Any]:
        """Return state key → what the callback needs to continue."""
        return {callback.state_key: callback.state_dict() for callback in self.callbacks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`; a callback that is new starts as it is."""
        for callback in self.callbacks:
            known = dict(state).get(callback.state_key)
            if known is not None:
                callback.load_state_dict(known)

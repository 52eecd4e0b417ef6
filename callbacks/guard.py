"""A round that makes the model worse is taken back."""

from collections.abc import Collection, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fedbe.errors import Problem, check_at_least
from fedbe.federation.callback import FederatedCallback
from fedbe.federation.loop import FederatedLoop


class RollbackGuard(FederatedCallback):
    """Puts the global tensors back to where a round began, if it went wrong, and notes why under ``rolled_back``.

    The moments of the server optimizer go back with them; what clients keep, scores and control variates do not.

    Args:
        loss_rise: Most by which the downstream validation loss, in nats, may lie above the lowest so far; ``None`` for
            any. A loss that is no number is always too high. Looked at in rounds that are evaluated.
        norm_ratio: Most that the norm of the global change may be, over the median of the rounds before; ``None``
            for any. Looked at from the fourth round on.
        window: Of how many rounds before.
        patience: Rounds taken back in a row after which the run ends.

    Source: ours.
    """

    def __init__(
        self,
        loss_rise: float | None = 0.5,
        norm_ratio: float | None = 10.0,
        window: int = 10,
        patience: int = 5,
    ) -> None:
        self.loss_rise = loss_rise
        self.norm_ratio = norm_ratio
        self.window = window
        self.patience = patience
        self.lowest: float | None = None
        self.norms: list[float] = []
        self.in_a_row = 0

    def check(self, key: str, metrics: Collection[str] = ()) -> list[Problem]:
        """Return what is wrong with the numbers."""
        return [
            *check_at_least(key, 0, loss_rise=self.loss_rise),
            *check_at_least(key, 1, norm_ratio=self.norm_ratio, window=self.window, patience=self.patience),
        ]

    def on_round_start(self, loop: FederatedLoop) -> None:
        """Remember where the round begins."""
        self._state, self._moments = loop.state, loop.server_optimizer.state_dict()

    def on_aggregate(self, loop: FederatedLoop, new_state: Mapping[str, Tensor]) -> None:
        """Measure how far the global tensors move."""
        changes = [new_state[name].float() - tensor.float() for name, tensor in loop.state.items()]
        self._norm = torch.nn.utils.get_total_norm(changes).item()

    def on_round_end(self, loop: FederatedLoop) -> None:
        """Take the round back if there is a reason to, else learn from it."""
        downstream = loop.record["downstream"]
        loss = None if downstream is None else downstream["loss"]
        reason = self._reason(loss)
        loop.record["rolled_back"] = reason
        if reason is None:
            self.in_a_row = 0
            self.norms = [*self.norms, self._norm][-self.window :]
            self.lowest = loss if self.lowest is None or (loss is not None and loss < self.lowest) else self.lowest
            return
        loop.restore(self._state)
        loop.server_optimizer.load_state_dict(self._moments)
        self.in_a_row += 1
        if self.in_a_row >= self.patience:
            loop.stop(f"{self.patience} rounds in a row were taken back: {reason}")

    def _reason(self, loss: float | None) -> str | None:
        usual = median(self.norms) if len(self.norms) >= 3 else None
        if self.norm_ratio is not None and usual and not self._norm <= self.norm_ratio * usual:
            return f"the global change is {self._norm:.3g} long, {self._norm / usual:.3g} times what is usual"
        if loss is not None and self.loss_rise is not None:
            if loss != loss:
                return "the validation loss is no number"
            if self.lowest is not None and loss > self.lowest + self.loss_rise:
                return f"the validation loss is {loss:.4g}, and was {self.lowest:.4g}"
        return None

    def state_dict(self) -> dict[str, Any]:
        """Return what is usual, and how many rounds were taken back in a row."""
        return {"lowest": self.lowest, "norms": self.norms, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with what is usual."""
        self.lowest, self.norms, self.in_a_row = state["lowest"], list(state["norms"]), state["in_a_row"]

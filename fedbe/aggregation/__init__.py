"""How updates become the next global state."""

from fedbe.aggregation.mean import HolderMean, check_update

__all__ = ["HolderMean", "check_update"]

"""How updates become the next global state."""

from fedbe.aggregation.base import Aggregator, check_update
from fedbe.aggregation.mean import HolderMean

__all__ = ["Aggregator", "HolderMean", "check_update"]

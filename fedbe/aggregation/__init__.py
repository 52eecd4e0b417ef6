"""How updates become the next global state."""

from fedbe.aggregation.base import Aggregator, check_update
from fedbe.aggregation.mean import HolderMean
from fedbe.aggregation.server_optimizers import FedAdagrad, FedAdam, FedAvgM, FedYogi, Mean, ServerOptimizer

__all__ = [
    "Aggregator",
    "FedAdagrad",
    "FedAdam",
    "FedAvgM",
    "FedYogi",
    "HolderMean",
    "Mean",
    "ServerOptimizer",
    "check_update",
]

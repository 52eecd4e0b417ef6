"""How updates become the next global state."""

from fedbe.aggregation.averaging import (
    Averaging,
    Collected,
    CoordinateMedian,
    Krum,
    NormClipping,
    SampleWeighted,
    TrimmedMean,
)
from fedbe.aggregation.base import Aggregator, check_update, check_values
from fedbe.aggregation.mean import HolderMean
from fedbe.aggregation.privacy import PrivateMean
from fedbe.aggregation.server_optimizers import FedAdagrad, FedAdam, FedAvgM, FedYogi, Mean, ServerOptimizer

__all__ = [
    "Aggregator",
    "Averaging",
    "Collected",
    "CoordinateMedian",
    "FedAdagrad",
    "FedAdam",
    "FedAvgM",
    "FedYogi",
    "HolderMean",
    "Krum",
    "Mean",
    "NormClipping",
    "PrivateMean",
    "SampleWeighted",
    "ServerOptimizer",
    "TrimmedMean",
    "check_update",
    "check_values",
]

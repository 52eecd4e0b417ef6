"""What watches a run: measuring, stopping, showing and logging."""

from fedbe.callbacks.checkpoint import CheckpointCallback
from fedbe.callbacks.communication import CommunicationCallback
from fedbe.callbacks.convergence import ConvergenceCallback
from fedbe.callbacks.faults import FaultInjection
from fedbe.callbacks.guard import RollbackGuard
from fedbe.callbacks.logging import LoggingCallback
from fedbe.callbacks.plots import PlotCallback
from fedbe.callbacks.progress import ProgressCallback
from fedbe.callbacks.retention import RetentionCallback
from fedbe.callbacks.stopping import EarlyStopping, KeepBest
from fedbe.federation.record import metric_value
from fedbe.figures.tables import summary_table

__all__ = [
    "CheckpointCallback",
    "CommunicationCallback",
    "ConvergenceCallback",
    "EarlyStopping",
    "FaultInjection",
    "KeepBest",
    "LoggingCallback",
    "PlotCallback",
    "ProgressCallback",
    "RetentionCallback",
    "RollbackGuard",
    "metric_value",
    "summary_table",
]

"""What is measured: the downstream score, general tasks, retention and convergence."""

from fedbe.evaluation.centroid import CentroidTask
from fedbe.evaluation.downstream import DownstreamScore, evaluate_downstream
from fedbe.evaluation.multiple_choice import ContinuationTask, MultipleChoiceTask
from fedbe.evaluation.next_token import NextTokenTask, SampledTextTask
from fedbe.evaluation.retention import delta_ce, retention
from fedbe.evaluation.retrieval import RetrievalTask
from fedbe.evaluation.tasks import GeneralTask, TaskScore, check_tasks

__all__ = [
    "CentroidTask",
    "ContinuationTask",
    "DownstreamScore",
    "GeneralTask",
    "MultipleChoiceTask",
    "NextTokenTask",
    "RetrievalTask",
    "SampledTextTask",
    "TaskScore",
    "check_tasks",
    "delta_ce",
    "evaluate_downstream",
    "retention",
]

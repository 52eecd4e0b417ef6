"""The client's side: local training with its module, schedule and trainer."""

from fedbe.client.memory import ClientMemory, Kept
from fedbe.client.module import ClientModule
from fedbe.client.plan import LocalPlan, OptimizerFactory, prepare_model
from fedbe.client.schedule import Schedule
from fedbe.client.training import LocalTraining

__all__ = [
    "ClientMemory",
    "ClientModule",
    "Kept",
    "LocalPlan",
    "LocalTraining",
    "OptimizerFactory",
    "Schedule",
    "prepare_model",
]

"""One client's training: its module, schedule and trainer."""

from fedbe.client.module import ClientModule, OptimizerFactory
from fedbe.client.schedule import Schedule

__all__ = ["ClientModule", "OptimizerFactory", "Schedule"]

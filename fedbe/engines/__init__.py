"""Where clients run."""

from fedbe.engines.base import Engine
from fedbe.engines.cohort import CohortEngine
from fedbe.engines.forked import ForkedEngine
from fedbe.engines.in_process import InProcessEngine

__all__ = ["CohortEngine", "Engine", "ForkedEngine", "InProcessEngine"]

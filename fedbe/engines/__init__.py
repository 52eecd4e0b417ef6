"""Where clients run."""

from fedbe.engines.base import Engine
from fedbe.engines.forked import ForkedEngine
from fedbe.engines.in_process import InProcessEngine
from fedbe.engines.one_pass.engine import CohortEngine

__all__ = ["CohortEngine", "Engine", "ForkedEngine", "InProcessEngine"]

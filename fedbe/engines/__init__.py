"""Where clients run."""

from fedbe.engines.base import Engine
from fedbe.engines.in_process import InProcessEngine

__all__ = ["Engine", "InProcessEngine"]

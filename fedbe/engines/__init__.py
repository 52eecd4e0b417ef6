"""Where clients run."""

from fedbe.engines.base import Engine
from fedbe.engines.forked import Forked
from fedbe.engines.in_process import InProcess
from fedbe.engines.one_pass.engine import OnePass

__all__ = ["Engine", "Forked", "InProcess", "OnePass"]

"""What is trained, by whom, and how updates become the next state: a file for each algorithm."""

from fedbe.algorithms.base import Algorithm
from fedbe.algorithms.block_expansion import BlockExpansion

__all__ = ["Algorithm", "BlockExpansion"]

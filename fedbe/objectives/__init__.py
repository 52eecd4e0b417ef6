"""Local objectives: what clients minimise, what that takes besides the model's tensors, and what the server adds."""

from fedbe.objectives.anchor import Anchor
from fedbe.objectives.base import LocalObjective, Objective, Plain
from fedbe.objectives.fedprox import FedProx
from fedbe.objectives.scaffold import Scaffold

__all__ = ["Anchor", "FedProx", "LocalObjective", "Objective", "Plain", "Scaffold"]

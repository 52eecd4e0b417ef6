"""Who can afford what: devices, what training costs them, the simulated clock, and who trains which blocks."""

from fedbe.allocation.allocator import Allocation, Allocator, ClientAllocation
from fedbe.allocation.best_sets import CohortCosts
from fedbe.allocation.capabilities import Capabilities
from fedbe.allocation.clock import SimulatedClock
from fedbe.allocation.profiles import DeviceFleet, Fleet, GivenFleet, MeasuredFleet, Profile
from fedbe.allocation.scores import GradientScore, LabelDivergenceScore, LossScore, RandomScore, Score, StaticScore

__all__ = [
    "Allocation",
    "Allocator",
    "Capabilities",
    "ClientAllocation",
    "CohortCosts",
    "DeviceFleet",
    "Fleet",
    "GivenFleet",
    "GradientScore",
    "LabelDivergenceScore",
    "LossScore",
    "MeasuredFleet",
    "Profile",
    "RandomScore",
    "Score",
    "SimulatedClock",
    "StaticScore",
]

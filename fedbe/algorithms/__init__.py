"""What is trained, by whom, and how updates become the next state: a file for each algorithm.

Marks in the docstrings say what a rule rests on: C, confirmed in the paper or its public code; D, derived, so that it
can be checked by algebra; R, our reconstruction, because no public text gives it.
"""

from fedbe.algorithms.base import Algorithm
from fedbe.algorithms.block_expansion import BlockExpansion
from fedbe.algorithms.centralized import Centralized, PooledData
from fedbe.algorithms.fed_talora import FedTaLoRA
from fedbe.algorithms.fedbe import FedBE
from fedbe.algorithms.fedex_lora import FedExLoRA
from fedbe.algorithms.fedit import FedIT
from fedbe.algorithms.fedsa_lora import FedSALoRA
from fedbe.algorithms.ffa_lora import FFALoRA
from fedbe.algorithms.flexlora import FlexLoRA
from fedbe.algorithms.flora import FLoRA
from fedbe.algorithms.full import FedAvg
from fedbe.algorithms.gated import Gated
from fedbe.algorithms.hetlora import HetLoRA
from fedbe.algorithms.local import LocalOnly
from fedbe.algorithms.lora import LoRA
from fedbe.algorithms.slora import SLoRA
from fedbe.algorithms.unfreeze import Unfreeze
from fedbe.algorithms.wrapper import Wrapper

__all__ = [
    "Algorithm",
    "BlockExpansion",
    "Centralized",
    "FFALoRA",
    "FLoRA",
    "FedAvg",
    "FedBE",
    "FedExLoRA",
    "FedIT",
    "FedSALoRA",
    "FedTaLoRA",
    "FlexLoRA",
    "Gated",
    "HetLoRA",
    "LoRA",
    "LocalOnly",
    "PooledData",
    "SLoRA",
    "Unfreeze",
    "Wrapper",
]

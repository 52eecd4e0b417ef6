"""What is trained, by whom, and how updates become the next state: a file for each algorithm.

Marks in the docstrings say what a rule rests on: C, confirmed in the paper or its public code; D, derived, so that it
can be checked by algebra; R, our reconstruction, because no public text gives it.
"""

from fedbe.algorithms.base import Algorithm, Strategy
from fedbe.algorithms.blocks.block_expansion import BlockExpansion
from fedbe.algorithms.blocks.fedbe import FedBE
from fedbe.algorithms.blocks.gated import Gated
from fedbe.algorithms.blocks.unfreeze import Unfreeze
from fedbe.algorithms.controls.centralized import Centralized
from fedbe.algorithms.controls.local import LocalOnly
from fedbe.algorithms.full import FedAvg
from fedbe.algorithms.lora.base import LoRA
from fedbe.algorithms.lora.fed_talora import FedTaLoRA
from fedbe.algorithms.lora.fedex_lora import FedExLoRA
from fedbe.algorithms.lora.fedit import FedIT
from fedbe.algorithms.lora.fedsa_lora import FedSALoRA
from fedbe.algorithms.lora.ffa_lora import FFALoRA
from fedbe.algorithms.lora.flexlora import FlexLoRA
from fedbe.algorithms.lora.flora import FLoRA
from fedbe.algorithms.lora.hetlora import HetLoRA
from fedbe.algorithms.lora.slora import SLoRA
from fedbe.data import PooledData

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
    "Strategy",
    "Unfreeze",
]

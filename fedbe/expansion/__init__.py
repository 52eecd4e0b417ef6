"""Block expansion: where blocks go, how they start as the identity, freeze masks, export."""

from fedbe.expansion.checkpointing import enable_gradient_checkpointing
from fedbe.expansion.expand import (
    Expansion,
    expand_blocks,
    remove_blocks,
    resolve_positions,
    scale_blocks,
    without_blocks,
)
from fedbe.expansion.export import ExportReport, load, read_expansion, rescale, save_model, save_plain
from fedbe.expansion.freezing import (
    base_tensor_names,
    block_parameter_names,
    freeze,
    head_parameter_names,
    set_training_modes,
    stack_parameter_names,
)
from fedbe.expansion.identity import IdentityRule

__all__ = [
    "Expansion",
    "ExportReport",
    "IdentityRule",
    "base_tensor_names",
    "block_parameter_names",
    "enable_gradient_checkpointing",
    "expand_blocks",
    "freeze",
    "head_parameter_names",
    "load",
    "read_expansion",
    "remove_blocks",
    "rescale",
    "resolve_positions",
    "save_model",
    "save_plain",
    "scale_blocks",
    "set_training_modes",
    "stack_parameter_names",
    "without_blocks",
]

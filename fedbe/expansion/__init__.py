"""Block expansion: where blocks go, how they start as the identity, freeze masks, export."""

from fedbe.expansion.expand import (
    Expansion,
    expand_blocks,
    remove_blocks,
    resolve_positions,
    scale_blocks,
    without_blocks,
)
from fedbe.expansion.export import load, read_expansion, rescale, save_model, save_plain
from fedbe.expansion.folder import ExportReport
from fedbe.expansion.gate import (
    find_gate,
    gate_adapters,
    gate_features,
    gate_loss,
    gate_parameter_names,
    install_gate,
    remove_gate,
)
from fedbe.expansion.growth import Plateau, grow
from fedbe.expansion.identity import IdentityRule
from fedbe.expansion.names import base_tensor_names, block_parameter_names
from fedbe.expansion.placement import AdaptivePlacement, Choice, FixedPlacement, Placement, RandomPlacement
from fedbe.expansion.probe import identity_rule, probe_client, probe_gradients
from fedbe.expansion.token_gate import TokenGate
from fedbe.messages import ProbeReport
from fedbe.modeling.checkpointing import enable_gradient_checkpointing
from fedbe.modeling.freezing import freeze, head_parameter_names, set_training_modes, stack_parameter_names

__all__ = [
    "AdaptivePlacement",
    "Choice",
    "Expansion",
    "ExportReport",
    "FixedPlacement",
    "IdentityRule",
    "Placement",
    "Plateau",
    "ProbeReport",
    "RandomPlacement",
    "TokenGate",
    "base_tensor_names",
    "block_parameter_names",
    "enable_gradient_checkpointing",
    "expand_blocks",
    "find_gate",
    "freeze",
    "gate_adapters",
    "gate_features",
    "gate_loss",
    "gate_parameter_names",
    "grow",
    "head_parameter_names",
    "identity_rule",
    "install_gate",
    "load",
    "probe_client",
    "probe_gradients",
    "read_expansion",
    "remove_blocks",
    "remove_gate",
    "rescale",
    "resolve_positions",
    "save_model",
    "save_plain",
    "scale_blocks",
    "set_training_modes",
    "stack_parameter_names",
    "without_blocks",
]

"""Exact parameter names of the inserted blocks, and the base model's names of frozen tensors."""

from transformers import PreTrainedModel

from fedbe.expansion.expand import Expansion
from fedbe.expansion.gate import unregistered
from fedbe.modeling.freezing import names_of


def block_parameter_names(model: PreTrainedModel, expansion: Expansion) -> dict[int, tuple[str, ...]]:
    """Return the exact parameter names of each expanded block, keyed by its ordinal (0 is the lowest).

    Raises:
        ExpansionError: If the model was not expanded like this.
    """
    blocks = expansion.blocks(model)
    return {ordinal: names_of(model, block.parameters()) for ordinal, block in enumerate(blocks)}


def base_tensor_names(model: PreTrainedModel, expansion: Expansion) -> dict[str, str]:
    """Return for each state-dict name of a frozen tensor its name in the base model; a token gate is left out.

    Raises:
        ExpansionError: If the model was not expanded like this.
    """
    expansion.blocks(model)
    expanded = set(expansion.expanded_indices)
    prefix = f"{expansion.blocks_path}."
    names: dict[str, str] = {}
    with unregistered(model):
        present = list(model.state_dict())
    for name in present:
        if not name.startswith(prefix):
            names[name] = name
            continue
        index, rest = name.removeprefix(prefix).split(".", 1)
        if int(index) not in expanded:
            names[name] = f"{prefix}{expansion.position_map[int(index)]}.{rest}"
    return names

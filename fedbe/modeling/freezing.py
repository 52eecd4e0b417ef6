"""Which parameters train: freeze masks, training modes, and names taken from modules."""

from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from fedbe.modeling.architecture import find_blocks, has_task_head
from fedbe.modeling.index import ModelIndex


def stack_parameter_names(model: PreTrainedModel) -> tuple[tuple[str, ...], ...]:
    """Return the exact parameter names of each block of a model, bottom first.

    Raises:
        ExpansionError: If the model has no one stack of like blocks.
    """
    return tuple(names_of(model, block.parameters()) for block in find_blocks(model).blocks)


def head_parameter_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the parameter names of a task head: those outside the base model; none for a language-model head."""
    if not has_task_head(model):
        return ()
    base = {id(parameter) for parameter in model.base_model.parameters()}
    return names_of(model, (parameter for parameter in model.parameters() if id(parameter) not in base))


def freeze(model: nn.Module, trainable_names: Iterable[str]) -> None:
    """Let exactly these parameters train; see `ModelIndex.freeze`, which is quicker where it is done often.

    Raises:
        ExpansionError: If a name is no parameter of the model.
    """
    ModelIndex(model).freeze(trainable_names)


def set_training_modes(model: PreTrainedModel, trainable_names: Iterable[str]) -> None:
    """Put trained modules in training mode and the rest in evaluation mode; see `ModelIndex.set_training_modes`.

    Raises:
        ExpansionError: If a name is no parameter of the model.
    """
    ModelIndex(model).set_training_modes(trainable_names)


def names_of(model: nn.Module, parameters: Iterable[nn.Parameter]) -> tuple[str, ...]:
    """Return the exact names of some of a model's parameters, in the order of the model."""
    wanted = {id(parameter) for parameter in parameters}
    return tuple(name for name, parameter in model.named_parameters() if id(parameter) in wanted)

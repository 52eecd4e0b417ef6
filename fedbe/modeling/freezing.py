"""Which parameters train: freeze masks, training modes, and names taken from modules."""

from collections.abc import Iterable, Mapping, Set

from torch import nn
from transformers import PreTrainedModel

from fedbe.errors import ExpansionError
from fedbe.modeling.architecture import find_blocks
from fedbe.modeling.checkpointing import enable_gradient_checkpointing, hf_checkpointing_enabled


def stack_parameter_names(model: PreTrainedModel) -> tuple[tuple[str, ...], ...]:
    """Return the exact parameter names of each block of a model, bottom first.

    Raises:
        ExpansionError: If the model has no one stack of like blocks.
    """
    return tuple(names_of(model, block.parameters()) for block in find_blocks(model).blocks)


def head_parameter_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the parameter names of a task head: those outside the base model; none for a language-model head."""
    if not _has_task_head(model):
        return ()
    base = {id(parameter) for parameter in model.base_model.parameters()}
    return names_of(model, (parameter for parameter in model.parameters() if id(parameter) not in base))


def freeze(model: nn.Module, trainable_names: Iterable[str]) -> None:
    """Let exactly these parameters train; the others lose their gradients too.

    Raises:
        ExpansionError: If a name is no parameter of the model.
    """
    parameters = dict(model.named_parameters())
    names = _known(model, parameters, trainable_names)
    for name, parameter in parameters.items():
        parameter.requires_grad_(name in names)
        if name not in names:
            parameter.grad = None


def set_training_modes(model: PreTrainedModel, trainable_names: Iterable[str]) -> None:
    """Put what trains in training mode and all else in evaluation mode, so that frozen blocks drop nothing.

    A block or a task head is in training mode as a whole when one of its parameters trains; of the rest (embeddings,
    final norm) the module that owns the parameter. The gradient checkpointing of ``transformers`` works in training
    mode only: where it is on, `enable_gradient_checkpointing` takes its place.

    Raises:
        ExpansionError: If a name is no parameter of the model.
    """
    parameters = dict(model.named_parameters())
    names = _known(model, parameters, trainable_names)
    if hf_checkpointing_enabled(model):
        enable_gradient_checkpointing(model)
    everything = len(names) == len(parameters)
    training = set(model.modules()) if everything else _in_training(model, {id(parameters[name]) for name in names})
    for module in model.modules():  # each before those inside it, which follow it until it is their turn
        if module.training != (module in training):
            module.train(module in training)


def _in_training(model: PreTrainedModel, trained: Set[int]) -> set[nn.Module]:
    """Return the modules that are in training mode when the parameters of these identities train."""
    training: set[nn.Module] = set()
    elsewhere = set(trained)
    for unit in _units(model):
        own = {id(parameter) for module in unit for parameter in module.parameters()}
        elsewhere -= own
        if own & trained:
            training.update(part for module in unit for part in module.modules())
    for module in model.modules() if elsewhere else ():
        if any(id(parameter) in elsewhere for parameter in module.parameters(recurse=False)):
            training.add(module)
    return training


def _units(model: PreTrainedModel) -> list[list[nn.Module]]:
    """Return the groups of modules that train together: each block, and the head with its dropout."""
    blocks = [[block] for block in find_blocks(model).blocks]
    head = [child for child in model.children() if child is not model.base_model]
    return [*blocks, head] if _has_task_head(model) else blocks


def _has_task_head(model: PreTrainedModel) -> bool:
    language_model_head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return model.base_model is not model and language_model_head is None


def _known(model: nn.Module, parameters: Mapping[str, nn.Parameter], names: Iterable[str]) -> set[str]:
    wanted = set(names)
    if unknown := sorted(wanted - parameters.keys()):
        raise ExpansionError(
            f"`trainable_names` holds {unknown[0]!r}, which is no parameter of {type(model).__name__}: take names "
            "from block_parameter_names or named_parameters (a tied parameter has one name there)."
        )
    return wanted


def names_of(model: nn.Module, parameters: Iterable[nn.Parameter]) -> tuple[str, ...]:
    """Return the exact names of some of a model's parameters, in the order of the model."""
    wanted = {id(parameter) for parameter in parameters}
    return tuple(name for name, parameter in model.named_parameters() if id(parameter) in wanted)

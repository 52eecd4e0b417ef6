"""An index of a model by exact parameter name, made once, so that no client of a round walks over the whole model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from fedbe.errors import ExpansionError
from fedbe.modeling.architecture import training_units
from fedbe.modeling.checkpointing import enable_gradient_checkpointing


class ModelIndex:
    """The parameters of a model by exact name, and what must be in training mode when one of them trains.

    Make a new one when the model's structure has changed: after `prepare_model`, after growth. Parameters are looked
    up, never copied: an index stays right when tensors are loaded, trained, frozen or moved to another device.

    Args:
        model: The resident model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def parameters(self, names: Iterable[str]) -> dict[str, nn.Parameter]:
        """Return the parameters of these exact names, in this order; a tied one goes by any of its names.

        Raises:
            AttributeError: There is none of a name.
        """
        return {name: self._parameter(name) for name in names}

    def module(self, name: str) -> nn.Module:
        """Return the module of an exact name.

        Raises:
            AttributeError: There is none.
        """
        # Through the modules' own dictionaries: `get_submodule` takes ten times as long, a walk over the model a
        # hundred times, and what loads and copies tensors has no index that lasts.
        module: nn.Module | None = self.model
        for part in name.split(".") if name else ():
            module = None if module is None else module._modules.get(part)
        return self.model.get_submodule(name) if module is None else module

    def _parameter(self, name: str) -> nn.Parameter:
        path, _, last = name.rpartition(".")
        parameter = self.module(path)._parameters.get(last)
        return self.model.get_parameter(name) if parameter is None else parameter

    def in_order(self, names: Iterable[str]) -> dict[str, nn.Parameter]:
        """Return the parameters of these exact names, in the order of the model.

        Raises:
            ExpansionError: A name is no parameter of the model; a tied one has a single name here.
        """
        wanted = self._known(names)
        return {name: parameter for name, parameter in self._by_name.items() if name in wanted}

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy values into the parameters of these exact names; the parameters stay the same objects."""
        for name, parameter in self.parameters(tensors).items():
            parameter.copy_(tensors[name])

    def copy(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return copies of the parameters of these exact names."""
        return {name: parameter.detach().clone() for name, parameter in self.parameters(names).items()}

    def train_only(self, names: Iterable[str]) -> None:
        """Let exactly these parameters train, with their modules in training mode: `freeze` and `set_training_modes`.

        Raises:
            ExpansionError: A name is no parameter of the model; a tied one has a single name here.
        """
        wanted = set(names)
        self.freeze(wanted)
        self.set_training_modes(wanted)

    def freeze(self, names: Iterable[str]) -> None:
        """Let exactly these parameters train; the others lose their gradients too.

        Raises:
            ExpansionError: A name is no parameter of the model; a tied one has a single name here.
        """
        wanted = self._known(names)
        for name, parameter in self._by_name.items():
            trains = name in wanted
            parameter.requires_grad_(trains)
            if not trains:
                parameter.grad = None

    def set_training_modes(self, names: Iterable[str]) -> None:
        """Put trained modules in training mode and the rest in evaluation mode, so that frozen blocks drop nothing.

        A block or a task head is in training mode as a whole when one of its parameters trains; of the rest
        (embeddings, final norm) the module that owns the parameter. The gradient checkpointing of ``transformers``
        works in training mode only: where it is on, `enable_gradient_checkpointing` takes its place.

        Raises:
            ExpansionError: A name is no parameter of the model; a tied one has a single name here.
        """
        wanted = self._known(names)
        if any(vars(module).get("gradient_checkpointing", False) for module in self._with_a_switch):
            enable_gradient_checkpointing(self.model)  # type: ignore[arg-type]
        training = self._training(wanted)
        for module in self._modules:  # each before those inside it, which follow it until it is their turn
            if module.training != (module in training):
                module.train(module in training)

    def changing_statistics(self, names: Iterable[str]) -> list[str]:
        """Return the batch norms whose running statistics would change while these parameters train: no parameters."""
        training = self._training(self._known(names))
        moving = ((name, module) for name, module in self.model.named_modules() if module in training)
        return [name for name, module in moving if getattr(module, "running_mean", None) is not None]

    def _training(self, names: set[str]) -> set[nn.Module]:
        """Return the modules that are in training mode when these parameters train."""
        if len(names) == len(self._by_name):
            return set(self._modules)
        groups = {id(group): group for name in names for group in self._groups[name]}
        return {module for group in groups.values() for module in group}

    def _known(self, names: Iterable[str]) -> set[str]:
        wanted = set(names)
        if unknown := sorted(wanted - self._by_name.keys()):
            raise ExpansionError(
                f"`trainable_names` holds {unknown[0]!r}, which is no parameter of {type(self.model).__name__}: take "
                "names from block_parameter_names or named_parameters (a tied parameter has one name there)."
            )
        return wanted

    @cached_property
    def _by_name(self) -> dict[str, nn.Parameter]:
        return dict(self.model.named_parameters())

    @cached_property
    def _modules(self) -> list[nn.Module]:
        return list(self.model.modules())

    @cached_property
    def _with_a_switch(self) -> list[nn.Module]:
        # An attribute that a module lacks takes long to miss, and these are asked before each client trains.
        return [module for module in self._modules if hasattr(module, "gradient_checkpointing")]

    @cached_property
    def _groups(self) -> dict[str, list[list[nn.Module]]]:
        """Groups of modules that are in training mode when a parameter trains, by its name."""
        found: dict[int, list[list[nn.Module]]] = {}
        for unit in training_units(self.model):  # type: ignore[arg-type]
            parts = [part for module in unit for part in module.modules()]
            for key in {id(parameter) for module in unit for parameter in module.parameters()}:
                found.setdefault(key, []).append(parts)
        within_units = set(found)
        for module in self._modules:
            for parameter in module.parameters(recurse=False):
                if id(parameter) not in within_units:
                    found.setdefault(id(parameter), []).append([module])
        return {name: found[id(parameter)] for name, parameter in self._by_name.items()}

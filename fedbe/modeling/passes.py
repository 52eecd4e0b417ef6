"""Forward passes of the live model that differ from its own for a while: the one place that changes what it computes.

All of it composes. Whatever replaces a module's forward pass, stops a pass or changes a mode leaves the rest as it was,
also where others enter before it and leave first.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

Pass = Callable[..., Any]
"""A forward pass: arguments as the module gets them, outputs as it gives them."""


class Replacement:
    """A function that runs in place of a module's forward pass, until it is removed.

    Attributes:
        function: Called with the forward pass below it, then with the module's arguments.
    """

    def __init__(self, entry: _Entry, function: Pass) -> None:
        self.function = function
        self._entry = entry

    def remove(self) -> None:
        """Take it out; others that stand above or below it stay. A second time does nothing."""
        self._entry.remove(self)


def replace(module: nn.Module, function: Pass, *, with_hooks: bool = False, innermost: bool = False) -> Replacement:
    """Let a function run in place of a module's forward pass, until it is removed.

    Args:
        module: Any part of a live model, or all of it.
        function: Gets as its first argument the forward pass that would run without it, to call it or not; then the
            module's arguments. It stands above the replacements that are there.
        with_hooks: Replace the whole call of the module: its hooks run inside the forward pass that the function
            gets, and not around the function.
        innermost: Let it stand below all replacements that are there and come, next to the module's own forward pass.
    """
    name = "_compiled_call_impl" if with_hooks else "forward"
    entry = vars(module).get(name)
    if not isinstance(entry, _Entry):
        entry = vars(module)[name] = _Entry(module, name)
    replacement = Replacement(entry, function)
    entry.replacements.insert(0 if innermost else len(entry.replacements), replacement)
    return replacement


@contextmanager
def replaced(
    module: nn.Module, function: Pass, *, with_hooks: bool = False, innermost: bool = False
) -> Iterator[Replacement]:
    """Let a function run in place of a module's forward pass inside the block; see `replace`."""
    replacement = replace(module, function, with_hooks=with_hooks, innermost=innermost)
    try:
        yield replacement
    finally:
        replacement.remove()


def replacements(module: nn.Module) -> tuple[Replacement, ...]:
    """Return what stands in place of a module's forward pass at present, without its hooks, lowest first."""
    entry = vars(module).get("forward")
    return tuple(entry.replacements) if isinstance(entry, _Entry) else ()


@dataclass
class Stopped:
    """Where a pass was ended.

    Attributes:
        reached: Whether the module was reached.
        output: What it gave.
    """

    reached: bool = False
    output: Any = None


@contextmanager
def stop_at(module: nn.Module, *, with_hooks: bool = False, innermost: bool = False) -> Iterator[Stopped]:
    """End the forward pass inside the block, and the block with it, as soon as a module has run.

    Args:
        module: Part of the model that is called in the block.
        with_hooks: End it after the module's hooks; otherwise they do not run.
        innermost: See `replace`.
    """
    stopped = Stopped()

    def run_and_stop(own: Pass, *arguments: Any, **options: Any) -> None:
        stopped.output = own(*arguments, **options)
        stopped.reached = True
        raise _StopPass(stopped)

    with replaced(module, run_and_stop, with_hooks=with_hooks, innermost=innermost):
        try:
            yield stopped
        except _StopPass as stop:
            if stop.stopped is not stopped:
                raise


@contextmanager
def evaluation_mode(model: PreTrainedModel, *, inference: bool = True) -> Iterator[None]:
    """Put a model in evaluation mode inside the block, and every module back into its own mode after it.

    Args:
        model: The model.
        inference: Also go without gradients (`torch.inference_mode`), and without the key-value cache where a call does
            not ask for it.
    """
    use_cache = getattr(model.config, "use_cache", None)
    with modes_kept(model):
        model.train(False)
        if not inference:
            yield
            return
        if use_cache is not None:
            model.config.use_cache = False
        try:
            with torch.inference_mode():
                yield
        finally:
            if use_cache is not None:
                model.config.use_cache = use_cache


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Put every module back into the training mode, after the block, that it was in before."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def freezing_kept(model: nn.Module) -> Iterator[None]:
    """Let exactly those parameters require gradients after the block that did before."""
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)


class _Entry:
    """Stands where PyTorch looks up a module's forward pass, or its call with hooks, and runs what is there instead.

    It belongs to its module: a deep copy of the module has one of its own, which runs the copy's own forward pass.
    (A call with hooks is not copied along.)

    Args:
        module: The module.
        name: The attribute that it stands in.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.replacements: list[Replacement] = []
        self._module, self._name = module, name
        self._before: Pass | None = vars(module).get(name)

    @property
    def __signature__(self) -> inspect.Signature:
        """The arguments of the module's own forward pass, by which callers go."""
        return inspect.signature(self._own)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        """Run the topmost replacement."""
        run = self._own
        for replacement in self.replacements:
            run = partial(replacement.function, run)
        return run(*arguments, **options)

    def remove(self, replacement: Replacement) -> None:
        """Take a replacement out, and this itself with the last one."""
        self.replacements = [other for other in self.replacements if other is not replacement]
        attributes = vars(self._module)
        if self.replacements or attributes.get(self._name) is not self:
            return
        if self._before is None:
            del attributes[self._name]
        else:
            attributes[self._name] = self._before

    @property
    def _own(self) -> Pass:
        """What runs without any replacement."""
        if self._before is not None:
            return self._before
        if self._name == "forward":
            own: Pass = partial(type(self._module).forward, self._module)
        else:
            own = self._module._call_impl
        return own


class _StopPass(Exception):
    """Ends a forward pass of which the rest is not needed."""

    def __init__(self, stopped: Stopped) -> None:
        super().__init__()
        self.stopped = stopped

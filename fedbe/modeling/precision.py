"""The types of weights: what is trained is float32 over a base of another type, and is written in the base's again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

HALF = frozenset({torch.bfloat16, torch.float16})
_WRITTEN = "_fedbe_written_dtype"


def hold_in_float32(model: nn.Module, names: Iterable[str]) -> None:
    """Hold parameters in float32 that computations of a half precision read in that precision, as before.

    The smallest change that bfloat16 can hold is 1/256 of a value: most steps of an optimizer are smaller, and so are
    the changes that a mean over clients comes to. Each module that owns such a parameter casts it, while it runs, to
    the type of its input: outputs stay what they are to the bit, gradients arrive in float32. The adapters of `peft`
    cast their input instead, and compute in float32.

    Args:
        model: The model; the parameters become other objects. Tied ones stay tied.
        names: Exact names; those that are not of half precision are left as they are.
    """
    half = {name: parameter for name, parameter in named(model, names) if parameter.dtype in HALF}
    held = {id(p): nn.Parameter(p.detach().float(), requires_grad=p.requires_grad) for p in half.values()}
    for module in model.modules() if held else ():
        own = {name: p for name, p in module._parameters.items() if id(p) in held}
        for name, parameter in own.items():
            module._parameters[name] = held[id(parameter)]
            module.register_forward_pre_hook(partial(_cast, name, parameter.dtype), with_kwargs=True)  # type: ignore[union-attr]
            module.register_forward_hook(partial(_restore, name), always_call=True)


def named(model: nn.Module, names: Iterable[str]) -> Iterable[tuple[str, nn.Parameter]]:
    """Return the parameters of these exact names; those that there are not are left out."""
    wanted = set(names)
    return [(name, p) for name, p in model.named_parameters(remove_duplicate=False) if name in wanted]


def _cast(
    name: str, dtype: torch.dtype, module: nn.Module, arguments: tuple[Any, ...], options: Mapping[str, Any]
) -> None:
    """Let a module see its parameter in the type of its first input of floating point, or else in `dtype`."""
    given = (x.dtype for x in (*arguments, *options.values()) if isinstance(x, Tensor) and x.is_floating_point())
    # In the module's own attributes it is found before the parameter, which stays where it is.
    vars(module)[name] = module._parameters[name].to(next(given, dtype))  # type: ignore[union-attr]


def _restore(name: str, module: nn.Module, *_: Any) -> None:
    vars(module).pop(name, None)


def held_types(model: nn.Module) -> dict[str, torch.dtype]:
    """Return the parameters held in float32, exact name → the type in which they are read."""
    found: dict[str, torch.dtype] = {}
    for path, module in model.named_modules():
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, partial) and hook.func is _cast:
                name, dtype = hook.args
                found[f"{path}.{name}" if path else name] = dtype
    return found


def written_as(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Note the type of the base's file, where it is another than that of the resident weights."""
    vars(model)[_WRITTEN] = dtype


def save_weights(model: PreTrainedModel, directory: Path, state: Mapping[str, Tensor] | None = None) -> None:
    """Write a model's configuration and weights, in the type of the base's file; the live model stays as it is.

    Args:
        model: The model.
        directory: Where to write.
        state: Tensors that take the place of the model's own.
    """
    held = held_types(model)
    resident = next((dtype for dtype in held.values()), model.dtype)
    target: torch.dtype = vars(model).get(_WRITTEN, resident)
    tensors = {**model.state_dict(), **(state or {})}
    if not held and target == resident:
        type(model).save_pretrained(model, directory, state_dict=tensors)
        return
    cast: dict[tuple[Any, ...], Tensor] = {}
    for name, tensor in tensors.items():
        dtype = held.get(name, tensor.dtype)
        key = (tensor.data_ptr(), tensor.shape, tensor.stride())  # tied tensors stay one
        cast.setdefault(key, tensor.to(target if dtype == resident else dtype))
        tensors[name] = cast[key]
    type(model).save_pretrained(model, directory, state_dict=tensors)
    file = directory / "config.json"
    config = _with_dtype(json.loads(file.read_text()), str(target).removeprefix("torch."))
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _with_dtype(config: Any, dtype: str) -> Any:
    if not isinstance(config, dict):
        return config
    return {key: dtype if key == "dtype" else _with_dtype(value, dtype) for key, value in config.items()}

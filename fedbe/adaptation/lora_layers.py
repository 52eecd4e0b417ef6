"""Adapters in a model: which layers get one, how it is put in, scaled, merged and saved; all of it with `peft`."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from fedbe.data import Batch
from fedbe.errors import ConfigError, ExpansionError, Problem
from fedbe.expansion import ExportReport
from fedbe.modeling.architecture import find_blocks
from fedbe.modeling.index import ModelIndex
from fedbe.modeling.precision import hold_in_float32, save_weights
from fedbe.modeling.verification import difference, observe
from fedbe.seeding import isolated_rng
from fedbe.storage.files import new_folder

ADAPTER = "default"
KEY = "algorithm.init_args"
Targets = Literal["all-linear", "attention"] | list[str] | None


@dataclass(frozen=True)
class Adapter:
    """The exact parameter names of one adapted layer.

    Attributes:
        a: The factor A, shape [rank, in].
        b: The factor B, shape [out, rank].
        weight: The layer's own weight, shape [out, in], or [in, out] where `transposed`.
        transposed: Whether the layer stores its weight the other way round, as GPT-2 does.
    """

    a: str
    b: str
    weight: str
    transposed: bool

    def oriented(self, change: Tensor) -> Tensor:
        """Return a change BA of shape [out, in] in the orientation of the weight."""
        return change.T if self.transposed else change


def target_names(model: PreTrainedModel, targets: Targets, first_block: int = 0, key: str = KEY) -> list[str]:
    """Return the exact names of the linear layers inside the blocks that get an adapter.

    Args:
        model: The base model.
        targets: ``"all-linear"``; ``"attention"``, those inside a module whose class is named so; the last parts of
            names; or ``None`` for what `peft` has for the architecture, else all.
        first_block: The lowest block (from 0) whose layers count.
        key: Dotted key of the arguments in the configuration.

    Raises:
        ConfigError: A name fits no linear layer of the blocks.
    """
    stack = find_blocks(model)
    blocks = list(stack.blocks.named_children())[first_block:]
    layers = {f"{stack.path}.{i}.{name}": module for i, block in blocks for name, module in block.named_modules()}
    linear = [name for name, module in layers.items() if isinstance(module, nn.Linear | Conv1D)]
    if targets is None:
        known = PEFT_TARGETS.get(stack.model_type)
        targets = "all-linear" if known is None else list(known)
    if targets == "all-linear":
        return linear
    if targets == "attention":
        roots = [f"{name}." for name, module in layers.items() if "Attention" in type(module).__name__]
        return _found([name for name in linear if name.startswith(tuple(roots))], targets, linear, key)
    chosen = {target: [n for n in linear if n == target or n.endswith(f".{target}")] for target in targets}
    for target, names in chosen.items():
        _found(names, target, linear, key)
    return [name for name in linear if any(name in names for names in chosen.values())]


def inject(
    model: PreTrainedModel, names: Sequence[str], config: LoraConfig, inputs: Batch, key: str = KEY
) -> tuple[Adapter, ...]:
    """Put adapters into a model, in place, freeze its base, and verify on `inputs` that no output changed.

    Args:
        model: The base model.
        names: Exact names of the linear layers that get an adapter.
        config: Rank, alpha and dropout of the adapters.
        inputs: A real batch.
        key: Dotted key of the arguments in the configuration.

    Returns:
        The adapted layers, in the order of the model.

    Raises:
        ConfigError: The rank is larger than a side of a layer.
        ExpansionError: The outputs changed, or `peft` adapted other layers.
    """
    _check_rank(model, names, config.r, key)
    before = observe(model, [inputs])
    config.target_modules = list(names)
    config.fan_in_fan_out = any(isinstance(model.get_submodule(name), Conv1D) for name in names)
    # `peft` draws A from the global generator; the algorithm draws it again from its own.
    with isolated_rng(0):
        inject_adapter_in_model(config, model, ADAPTER)
    model.requires_grad_(False)
    # New modules are in training mode, whatever the model is in: their dropout would act.
    model.train(model.training)
    adapted = tuple(name for name, _ in lora_layers(model))
    if set(adapted) != set(names):
        raise ExpansionError(f"`peft` adapted {sorted(set(adapted) ^ set(names))[0]!r}, which was not asked for.")
    if reason := difference(before, observe(model, [inputs])):
        raise ExpansionError(f"{type(model).__name__} cannot be adapted with unchanged outputs: {reason}.")
    return tuple(_adapter(name, layer) for name, layer in lora_layers(model))


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Yield the adapted layers with their names, in the order of the model."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            yield name, module


def set_scaling(model: nn.Module, names: Iterable[str], scaling: float) -> None:
    """Let the adapters on the layers of these exact names add s·BA with this s."""
    index = ModelIndex(model)
    for name in names:
        layer: Any = index.module(name)
        layer.scaling[ADAPTER] = scaling


def merged_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model with its adapters merged into the weights by `peft`, and nothing of them left."""
    merged = copy.deepcopy(model)
    # A small change is added to the weights in float32, and rounded once, when they are written.
    names = [f"{name}." for name, _ in lora_layers(merged)]
    hold_in_float32(merged, [name for name, _ in merged.named_parameters() if name.startswith(tuple(names))])
    for name, layer in list(lora_layers(merged)):
        layer.merge(safe_merge=True)
        merged.set_submodule(name, layer.get_base_layer())
    del merged.peft_config
    return merged


def save_merged(
    model: PreTrainedModel, directory: Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> ExportReport:
    """Write a plain checkpoint with the adapters merged in; the live model stays as it is.

    Raises:
        ConfigError: If the directory holds something.
    """
    with new_folder(directory) as partial:
        save_weights(merged_copy(model), partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
    return ExportReport(True, "from_pretrained loads the whole model: the adapters are merged in.", directory)


def save_adapter(
    model: PreTrainedModel, head: Sequence[str], directory: Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> ExportReport:
    """Write a `peft` adapter folder: the factors, and the task head's parameters `head`; not the base.

    Raises:
        ConfigError: If the directory holds something.
    """
    config: Any = copy.copy(model.peft_config[ADAPTER])
    config.modules_to_save = sorted({name.split(".")[0] for name in head}) or None
    config.base_model_name_or_path = model.name_or_path
    config.inference_mode = True
    config.target_modules = [name for name, _ in lora_layers(model)]
    names = [name for name, _ in model.named_parameters() if f".{ADAPTER}." in name]
    tensors = {name: model.get_parameter(name).detach().contiguous().cpu() for name in (*names, *head)}
    with new_folder(directory) as partial:
        files = {f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": tensor for name, tensor in tensors.items()}
        save_file(files, partial / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(partial))
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
    return ExportReport(
        False, "a peft adapter: PeftModel.from_pretrained puts it on the base model.", directory, "peft"
    )


def received_rank(adapters: Sequence[Adapter], received: Mapping[str, Tensor]) -> int | None:
    """Return the rank of the adapters among received tensors, ``None`` where there are none."""
    first = adapters[0]
    if first.a in received:
        return received[first.a].shape[0]
    return received[first.b].shape[1] if first.b in received else None


def _found(names: list[str], target: str, linear: list[str], key: str) -> list[str]:
    if names:
        return names
    known = ", ".join(dict.fromkeys(name.split(".")[-1] for name in linear)) or "none"
    remedy = f"{target!r} fits no linear layer of the blocks; their names end in {known}"
    raise ConfigError(Problem(f"{key}.target_modules", target, remedy))


def _check_rank(model: PreTrainedModel, names: Sequence[str], rank: int, key: str) -> None:
    for name in names:
        smallest = min(model.get_submodule(name).get_parameter("weight").shape)
        if rank > smallest:
            remedy = f"a rank is at most {smallest}, the smaller side of {name}"
            raise ConfigError(Problem(f"{key}.rank", rank, remedy))


def _adapter(name: str, layer: LoraLayer) -> Adapter:
    transposed = isinstance(layer.get_base_layer(), Conv1D)
    a, b = (f"{name}.lora_{factor}.{ADAPTER}.weight" for factor in "AB")
    return Adapter(a, b, f"{name}.base_layer.weight", transposed)


def start_a(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return A as LoRA starts it: uniform in ±1/√in, shape [rank, in]."""
    bound = shape[1] ** -0.5
    return torch.empty(tuple(shape)).uniform_(-bound, bound, generator=generator)

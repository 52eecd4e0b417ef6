"""Finding the list of transformer blocks in a model, and rearranging it with all that counts blocks."""

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from fedbe.errors import ExpansionError
from fedbe.modeling.families import (
    COUNT_NAMES,
    DEPTH_NAMES,
    INDEX_NAMES,
    Family,
    family_named,
    has_stages,
    stack_config,
    stated_depth,
)


@dataclass(frozen=True)
class BlockStack:
    """The list of transformer blocks of a model.

    Attributes:
        model: The model that holds the list.
        path: Dotted path of the list inside the model, for example ``model.layers``.
        model_type: ``model_type`` of the configuration that states the depth (the text part of a nested one).
    """

    model: PreTrainedModel
    path: str
    model_type: str

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, bottom first."""
        blocks = self.model.get_submodule(self.path)
        if not isinstance(blocks, nn.ModuleList):
            raise ExpansionError(f"`{self.path}` of {type(self.model).__name__} is not a list of blocks.")
        return blocks

    @property
    def depth(self) -> int:
        """The number of blocks."""
        return len(self.blocks)

    @property
    def family(self) -> Family:
        """What is known of the model's family."""
        return family_named(self.model_type)

    def configs(self) -> list[PreTrainedConfig]:
        """Return every configuration object that states this stack's depth, each once."""
        stating = [config for config in all_configs(self.model) if config.model_type == self.model_type]
        return [config for config in stating if stated_depth(config) == self.depth]


def all_configs(model: nn.Module) -> list[PreTrainedConfig]:
    """Return the distinct configuration objects held by a model's modules, nested text parts included."""
    held = (getattr(module, "config", None) for module in model.modules())
    configs = [config for config in held if isinstance(config, PreTrainedConfig)]
    return list({id(c): c for config in configs for c in (config, config.get_text_config())}.values())


def takes_images(model: PreTrainedModel) -> bool:
    """Whether a model takes images alone."""
    return model.main_input_name == "pixel_values"


def stack_config_of(model: PreTrainedModel) -> PreTrainedConfig:
    """Return the configuration that describes a model's blocks."""
    return stack_config(model.config, takes_images(model))


def depth_of(model: PreTrainedModel) -> int:
    """Return the number of blocks that a model's configuration states; 0 if it states none."""
    return stated_depth(model.config, takes_images(model)) or 0


def find_blocks(model: PreTrainedModel) -> BlockStack:
    """Return the longest part of a model: its list of like blocks, as many as its configuration states.

    Raises:
        ExpansionError: For an encoder-decoder, a model with cross-attention or with differing blocks, and where
            no such list is found.

    Source: ours.
    """
    config = stack_config_of(model)
    _refuse_unsupported(model, config)
    depth = stated_depth(model.config, takes_images(model))
    lists = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    fitting = [(path, blocks) for path, blocks in lists if len(blocks) == depth and _alike(blocks)]
    if not fitting:
        found = ", ".join(f"{path} ({_kinds(blocks)})" for path, blocks in lists) or "none"
        raise ExpansionError(
            f"{type(model).__name__} has no list of {depth} blocks of one class, as its configuration states; "
            f"lists found: {found}."
        )
    # A vision tower may be as deep as the text part: the owner's configuration decides, then the size.
    path = fitting[0][0]
    if len(fitting) > 1:
        path, _ = max(fitting, key=lambda item: (_owner_matches(model, item[0], config), _size(item[1])))
    return BlockStack(model, path, str(config.model_type))


def innermost(model: PreTrainedModel, path: str) -> nn.Module:
    """Return the model that holds the blocks: the innermost one around them that is called with a batch's inputs."""
    parents = path.split(".")
    around = [model.get_submodule(".".join(parents[:depth])) for depth in range(len(parents))]
    inputs = {"input_ids", "pixel_values"}
    return [module for module in around if inputs & inspect.signature(module.forward).parameters.keys()][-1]


def arrange(
    stack: BlockStack, blocks: Sequence[nn.Module], origins: Sequence[int], labels: Sequence[int] | None = None
) -> None:
    """Put new contents into the list of blocks, in place, along with the configuration and the blocks' indices.

    Args:
        stack: The list; it is the same object afterwards.
        blocks: The new contents, bottom first.
        origins: For each new block the present index whose entry in the per-block lists it takes.
        labels: The index that each block's modules carry at present; ``origins`` if left out.
    """
    family, depth, configs = stack.family, stack.depth, stack.configs()
    if family.spell_out is not None:
        for config in configs:
            family.spell_out(config)
    holders: list[object] = [*configs, *_ancestors(stack)]
    for holder in holders:
        _reindex(holder, family, depth, origins)
    if family.settle is not None:
        for config in configs:
            family.settle(config)
    for index, (block, label) in enumerate(zip(blocks, origins if labels is None else labels, strict=True)):
        _shift_indices(block, family, index - label)
    present = stack.blocks
    del present[:]
    present.extend(blocks)


def _refuse_unsupported(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ExpansionError(f"{name} is an encoder-decoder: only a model with one stack of blocks is expanded.")
    if getattr(config, "add_cross_attention", False):
        raise ExpansionError(f"{name} has cross-attention, which is not covered: set add_cross_attention=False.")
    if getattr(config, "is_heterogeneous", False):
        raise ExpansionError(f"{name} has a configuration per block (`per_layer_config`): not supported.")
    if has_stages(config):
        raise ExpansionError(
            f"{name} cannot be expanded: it is made of stages of different widths, not of like blocks."
        )
    if (obstacle := family_named(str(config.model_type)).obstacle) is not None:
        raise ExpansionError(f"{name} cannot be expanded with unchanged outputs: {obstacle}.")


def refuse_positions(stack: BlockStack, positions: Sequence[int]) -> None:
    """Check that no block is to be inserted where the model itself adds something between two blocks, by their index.

    Raises:
        ExpansionError: If one is.
    """
    fed_blocks = stack.family.fed_blocks
    fed = 0 if fed_blocks is None else max(map(fed_blocks, (stack.model.config, *stack.configs())))
    if positions and min(positions) < fed - 1:
        raise ExpansionError(
            f"`positions` = {list(positions)!r}: {type(stack.model).__name__} adds features of images behind each of "
            f"its {fed} lowest blocks: give positions from {fed - 1} to {stack.depth - 1}."
        )


def _alike(blocks: nn.ModuleList) -> bool:
    return len({type(block) for block in blocks}) == 1 and next(blocks.parameters(), None) is not None


def _kinds(blocks: nn.ModuleList) -> str:
    classes = {type(block).__name__ for block in blocks}
    return f"{len(blocks)}" if len(classes) == 1 else f"{len(blocks)} of {', '.join(sorted(classes))}"


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _owner_matches(model: PreTrainedModel, path: str, config: PreTrainedConfig) -> bool:
    held = (getattr(model.get_submodule(parent), "config", None) for parent in _parents(path))
    configs = [owner for owner in held if isinstance(owner, PreTrainedConfig)]
    return bool(configs) and configs[-1].model_type == config.model_type


def _parents(path: str) -> Iterator[str]:
    """Yield the paths of the modules above a dotted path, outermost first."""
    parts = path.split(".")
    yield from (".".join(parts[:end]) for end in range(len(parts)))


def _ancestors(stack: BlockStack) -> list[nn.Module]:
    return [stack.model.get_submodule(parent) for parent in _parents(stack.path)]


def _reindex(holder: object, family: Family, depth: int, origins: Sequence[int]) -> None:
    """Rebuild the depth and the per-block lists among the attributes of a configuration or a module."""
    for name, value in list(vars(holder).items()):
        if name in (*DEPTH_NAMES, *family.depth_names) and value == depth:
            setattr(holder, name, len(origins))
        elif name in (*COUNT_NAMES, *family.counts) and isinstance(value, int):
            setattr(holder, name, sum(old < value for old in origins))
        elif name in family.last_indices and isinstance(value, int) and value >= 0:
            setattr(holder, name, sum(old <= value for old in origins) - 1)
        elif name in family.block_index_lists and isinstance(value, (list, tuple)):
            setattr(holder, name, [new for new, old in enumerate(origins) if old in value])
        elif ("layer" in name or name in family.per_block_lists) and _has_entries(value, depth):
            setattr(holder, name, type(value)(value[old] for old in origins))


def _has_entries(value: object, depth: int) -> TypeGuard[list[object] | tuple[object, ...]]:
    return isinstance(value, (list, tuple)) and len(value) == depth


def _shift_indices(block: nn.Module, family: Family, offset: int) -> None:
    for module in block.modules():
        for name in (*INDEX_NAMES, *family.index_names):
            if isinstance(index := vars(module).get(name), int):
                setattr(module, name, index + offset)


def training_units(model: PreTrainedModel) -> list[list[nn.Module]]:
    """Return the groups of modules that train together: each block, and a task head with its dropout."""
    blocks = [[block] for block in find_blocks(model).blocks]
    head = [child for child in model.children() if child is not model.base_model]
    return [*blocks, head] if has_task_head(model) else blocks


def has_task_head(model: PreTrainedModel) -> bool:
    """Whether a model has a head for a task around its base model; a language-model head is none."""
    language_model_head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return model.base_model is not model and language_model_head is None


def expressed_by_config(model: PreTrainedModel, stack: BlockStack) -> str | None:
    """Return why the model's configuration alone does not rebuild its blocks, or None where it does.

    A model built from the saved form of the configuration, on the ``meta`` device, is compared with the live one:
    names and shapes of the state, classes of the blocks' modules and their plain attributes (index, window, …).
    Source: ours.
    """
    config = type(model.config).from_dict(model.config.to_dict())
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        rebuilt = type(model)(config)
    live = {name: tensor.shape for name, tensor in model.state_dict().items()}
    bare = {name: tensor.shape for name, tensor in rebuilt.state_dict().items()}
    if differing := sorted(name for name in live.keys() | bare.keys() if live.get(name) != bare.get(name)):
        return f"the configuration does not describe {differing[0]}"
    twins = rebuilt.get_submodule(stack.path).children()
    for index, (block, other) in enumerate(zip(stack.blocks, twins, strict=True)):
        modules = dict(other.named_modules())
        for path, module in block.named_modules():
            if differing := _differing_attributes(module, modules.get(path)):
                where = f"block {index}" + (f".{path}" if path else "")
                return f"`{differing[0]}` of {where} cannot be set by the configuration"
    return None


def _differing_attributes(module: nn.Module, twin: nn.Module | None) -> list[str]:
    if _drops_in_training_only(module) and _drops_in_training_only(twin):
        return []
    if twin is None or type(module) is not type(twin):
        return ["class"]
    ours, theirs = _plain_attributes(module), _plain_attributes(twin)
    return sorted(name for name in ours.keys() & theirs.keys() if ours[name] != theirs[name])


def _drops_in_training_only(module: nn.Module | None) -> bool:
    """Whether a module passes everything on but in training; where its rate is 0 a model may do without it."""
    return isinstance(module, (nn.Identity, nn.Dropout)) or type(module).__name__.endswith(("DropPath", "Dropout"))


def _plain_attributes(module: nn.Module) -> dict[str, object]:
    kinds = (bool, int, float, str, type(None))
    # What matters in training only may have been set by hand; `p` is the rate of a dropout module.
    skipped = {"training", "gradient_checkpointing", "p"}
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, kinds) and not name.startswith("_") and name not in skipped and "dropout" not in name
    }

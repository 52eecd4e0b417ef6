"""Whether two states of a model give the same outputs, to the bit, with and without a key-value cache."""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from fedbe.data import Batch
from fedbe.errors import ExpansionError
from fedbe.modeling.architecture import stack_config_of
from fedbe.modeling.passes import evaluation_mode
from fedbe.seeding import generator

_NOT_COMPARED = frozenset({"cache", "hidden_states", "attentions"})
_LENGTH = 12


def probe_inputs(model: PreTrainedModel) -> list[Batch]:
    """Return random inputs for a model: three sequences, one padded left, one right; or two images.

    Token ids have shape [3, 12]; without a padding token three times [1, 12], since a classifier takes no batches
    then. Pixels have shape [2, channels, height, width].

    Raises:
        ExpansionError: If the model takes neither tokens nor pixels.
    """
    if model.main_input_name == "pixel_values":
        return [_pixels(model)]
    if model.main_input_name != "input_ids":
        raise ExpansionError(f"`inputs` are needed to verify a model that takes `{model.main_input_name}`.")
    config = stack_config_of(model)
    ids = torch.randint(0, config.vocab_size, (3, _LENGTH), generator=generator(0, "verification"))
    mask = torch.ones_like(ids)
    mask[1, : _LENGTH // 3] = 0
    mask[2, -_LENGTH // 3 :] = 0
    if config.pad_token_id is None:
        return [{"input_ids": ids[row, None], "attention_mask": mask[row, None]} for row in range(len(ids))]
    ids = ids.masked_fill(mask == 0, config.pad_token_id)
    return [{"input_ids": ids, "attention_mask": mask}]


def observe(model: PreTrainedModel, batches: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
    """Return every output tensor of a model in evaluation mode, a step that reads the cache included."""
    # Not in inference mode: what a model computes once and keeps, such as a rotary table, is used in training too.
    with evaluation_mode(model, inference=False), _without_memory(model), torch.no_grad():
        return [tensor for batch in batches for tensor in _outputs(model, on_device(model, batch))]


def difference(before: Sequence[Tensor], after: Sequence[Tensor]) -> str | None:
    """Return how two lists of outputs differ, or None if they are equal to the bit."""
    if len(before) != len(after):
        return f"{len(after)} output tensors in place of {len(before)}"
    for old, new in zip(before, after, strict=True):
        if old.isnan().any():
            return "the base model's own outputs are not numbers on these inputs"
        if old.shape != new.shape:
            return f"an output has shape {tuple(new.shape)} in place of {tuple(old.shape)}"
        if not torch.equal(old, new):
            return f"outputs move by up to {(old.float() - new.float()).abs().max().item():.3g}"
    return None


@contextmanager
def _without_memory(model: PreTrainedModel) -> Iterator[None]:
    """Let a model forget inside the block how positions were counted in its last pass, which was of other inputs."""
    kept = [(module, vars(module)["rope_deltas"]) for module in model.modules() if "rope_deltas" in vars(module)]
    for module, _ in kept:
        vars(module)["rope_deltas"] = None
    try:
        yield
    finally:
        for module, deltas in kept:
            module.rope_deltas = deltas


def _pixels(model: PreTrainedModel) -> Batch:
    config = stack_config_of(model)
    size = config.image_size
    height, width = (size, size) if isinstance(size, int) else size
    shape = (2, config.num_channels, height, width)
    return {"pixel_values": torch.randn(shape, generator=generator(0, "verification"))}


def on_device(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Batch:
    """Return a batch where the model is, its real numbers in the model's type."""
    dtype = model.dtype
    return {
        name: tensor.to(model.device, dtype if tensor.is_floating_point() else None) for name, tensor in batch.items()
    }


def _outputs(model: PreTrainedModel, batch: Batch) -> Iterator[Tensor]:
    caching = {"use_cache": True} if "use_cache" in inspect.signature(model.forward).parameters else {}
    output = model(**batch, **caching, return_dict=True)
    yield from _tensors(output)
    cache = output.get("cache")
    if not isinstance(cache, Cache) or "input_ids" not in batch:
        return
    step: Batch = {"input_ids": batch["input_ids"][:, -1:]}
    if "attention_mask" in batch:
        mask = batch["attention_mask"]
        step["attention_mask"] = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
    yield from _tensors(model(**step, cache=cache, use_cache=True, return_dict=True))


def _tensors(output: Mapping[str, object]) -> list[Tensor]:
    compared = (value for name, value in output.items() if name not in _NOT_COMPARED)
    return [value for value in compared if isinstance(value, Tensor)]

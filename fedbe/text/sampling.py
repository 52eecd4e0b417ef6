"""Text sampled from a causal language model."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedbe.modeling.passes import evaluation_mode


def sample_sequences(
    model: PreTrainedModel,
    begin: int,
    count: int,
    length: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    batch_size: int = 32,
) -> Tensor:
    """Return sequences sampled from a model, token by token. Shape ``[count, length]``, on the CPU.

    Args:
        model: A causal language model; its training modes are left as they are.
        begin: The first token of each sequence.
        count: Number of sequences.
        length: Tokens of a sequence, the first one included; an end token does not stop it.
        generator: The only source of chance, on the CPU.
        temperature: Divides the logits.
        batch_size: Sequences sampled at a time.
    """
    starts = torch.full((count, 1), begin)
    with evaluation_mode(model):
        parts = [_continue(model, part, length, temperature, generator) for part in torch.split(starts, batch_size)]
    return torch.cat(parts)


def _continue(
    model: PreTrainedModel, start: Tensor, length: int, temperature: float, generator: torch.Generator
) -> Tensor:
    tokens, cache = [start.to(model.device)], None
    while len(tokens) < length:
        output = model(input_ids=tokens[-1], cache=cache, use_cache=True)
        cache = output.cache
        tokens.append(draw(output.logits[:, -1].float() / temperature, generator))
    return torch.cat(tokens, dim=1).cpu()


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return one index per row, drawn from the softmax of its logits. Shape ``[b, v]`` → ``[b, 1]``.

    One uniform number per row is looked up in the cumulative distribution, so that a CPU generator serves
    every device.
    """
    cumulative = logits.softmax(-1).cumsum(-1)  # [b, v]
    uniform = torch.rand(len(logits), 1, generator=generator).to(logits.device)
    index = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    return index.clamp(max=logits.shape[-1] - 1)

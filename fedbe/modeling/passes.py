"""Forward passes of the live model that leave it as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel


@contextmanager
def evaluation_mode(model: PreTrainedModel) -> Iterator[None]:
    """Switch dropout, gradients and the key-value cache off inside the block, and back after it."""
    training = {module: module.training for module in model.modules()}
    use_cache = getattr(model.config, "use_cache", None)
    model.train(False)
    if use_cache is not None:
        model.config.use_cache = False
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode
        if use_cache is not None:
            model.config.use_cache = use_cache


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Put a model in evaluation mode inside the block, and every module back into its own after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.train(False)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training

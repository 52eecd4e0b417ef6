"""Gradient checkpointing that does not depend on the training mode of a block."""

from collections.abc import Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, PreTrainedModel

from fedbe.modeling.architecture import find_blocks
from fedbe.modeling.passes import Pass, Replacement, replace, replacements


def enable_gradient_checkpointing(model: PreTrainedModel) -> None:
    """Recompute the blocks' activations in the backward pass, from the lowest trained block up.

    ``transformers`` checkpoints a block only in training mode, in which a frozen block would apply its dropout, and
    it makes the embeddings require gradients, which sends the backward pass through every frozen block. Here a block
    is checkpointed whenever a gradient passes through it, in either mode; its own switch is turned off. Key-value
    caches are dropped meanwhile, as ``transformers`` does: recomputation would write them twice.

    Source: ours, on ``torch.utils.checkpoint`` without reentrance.
    """
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            setattr(module, "gradient_checkpointing", False)  # noqa: B010
    if getattr(model, "_require_grads_hooks", None):
        model.disable_input_require_grads()  # type: ignore[no-untyped-call]
    for block in find_blocks(model).blocks:
        if not _checkpointing(block):
            replace(block, CheckpointedForward(block))


def disable_gradient_checkpointing(model: nn.Module) -> None:
    """Keep the blocks' activations again, those of blocks copied in the meantime too."""
    for module in model.modules():
        for replacement in _checkpointing(module):
            replacement.remove()


def checkpoints_gradients(modules: Iterable[nn.Module]) -> bool:
    """Whether one of these modules checkpoints: by `enable_gradient_checkpointing` or by ``transformers`` itself."""
    return any(_checkpointing(m) or vars(m).get("gradient_checkpointing", False) for m in modules)


def _checkpointing(module: nn.Module) -> list[Replacement]:
    return [found for found in replacements(module) if isinstance(found.function, CheckpointedForward)]


class CheckpointedForward:
    """The forward pass of one block under checkpointing; an object, so that a copied block gets its own.

    Args:
        block: The block.
    """

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, own: Pass, *args: object, **kwargs: object) -> object:
        """Run the block, checkpointed if a gradient will pass through it."""
        if not self._needs_gradient((*args, *kwargs.values())):
            return own(*args, **kwargs)
        args = tuple(_without_cache(value) for value in args)
        kwargs = {name: _without_cache(value) for name, value in kwargs.items()}
        if "use_cache" in kwargs:
            kwargs["use_cache"] = False
        return checkpoint(partial(own, **kwargs), *args, use_reentrant=False)

    def _needs_gradient(self, values: tuple[object, ...]) -> bool:
        if not torch.is_grad_enabled():
            return False
        passed = any(isinstance(value, Tensor) and value.requires_grad for value in values)
        return passed or any(parameter.requires_grad for parameter in self.block.parameters())


def _without_cache(value: object) -> object:
    return None if isinstance(value, Cache) else value

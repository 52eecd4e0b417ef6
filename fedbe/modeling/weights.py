"""Whether a checkpoint's weights are those of the model that its configuration describes: no fewer, and no more."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

_COMPUTED = re.compile(r"(^|\.)(masked_bias|inv_freq|position_ids)$")
"""Names of what earlier versions of transformers wrote to checkpoints, and a model computes by itself."""
_PREDICTOR = re.compile(r"(.*\.\d+\.)(eh_proj|enorm|hnorm|shared_head)\.")
"""What a block has that only predicts further tokens, and that models leave out."""


def weights_fault(model: PreTrainedModel, loading: Mapping[str, Any], new_head: bool) -> str | None:
    """Return why a model is not the one in its checkpoint's files, in one sentence; ``None`` where it is.

    Weights of parts that the model does not have (another task's head, a vision tower) are no fault. Those of further
    blocks are, and those that a module of the model lacks.

    Args:
        model: As loaded; its weights may be on the ``meta`` device.
        loading: What `from_pretrained` returns with ``output_loading_info=True``.
        new_head: Whether the head, all that stands outside of the modules with blocks, may be missing from the files.
    """
    body = tuple(f"{name}." for name, module in model.named_children() if _lists(module))
    lacking = {*loading["missing_keys"], *(name for name, *_ in loading["mismatched_keys"])}
    if new_head:
        lacking = {name for name in lacking if name.startswith(body)}
    if lacking:
        return (
            f"its files have no weights that fit {_first_of(lacking)}, which its configuration describes: they would "
            "be random, and frozen"
        )
    unexpected = _without_predictors(loading["unexpected_keys"])
    # A base model's own files leave out what it is called inside of a model with a head.
    forms: dict[str, tuple[str, ...]] = {name: (name, f"{model.base_model_prefix}.{name}") for name in unexpected}
    if new_head:
        forms = {name: tuple(form for form in both if form.startswith(body)) for name, both in forms.items()}
    if left := {name for name, both in forms.items() if any(_belongs(model, form) for form in both)}:
        return f"its files have weights for {_first_of(left)}, which its configuration leaves out: they would be lost"
    return None


@contextmanager
def quietly() -> Iterator[None]:
    """Let transformers load weights inside the block without a report or a progress bar."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _belongs(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor that a model has no place for is one of a module or of a list of blocks that it has."""
    if _COMPUTED.search(name) or name in dict(model.named_buffers()):
        return False
    *path, _ = name.split(".")
    module: nn.Module = model
    for depth, part in enumerate(path):
        child = module._modules.get(part)
        if isinstance(module, nn.ModuleList) and part.isdigit() and child is None:
            return True
        if child is None:
            return _inside_of_block(model, path[:depth])
        module = child
    return module is not model and module is not model.base_model


def _inside_of_block(model: nn.Module, path: list[str]) -> bool:
    parents = (model.get_submodule(".".join(path[:end])) for end in range(len(path)))
    return any(isinstance(parent, nn.ModuleList) for parent in parents)


def _without_predictors(names: Collection[str]) -> list[str]:
    """Return names without those of blocks that only predicted further tokens in pre-training."""
    ahead = tuple(found[1] for found in map(_PREDICTOR.match, names) if found)
    return [name for name in names if not name.startswith(ahead)]


def _lists(module: nn.Module) -> bool:
    return any(isinstance(part, nn.ModuleList) for part in module.modules())


def _in_order(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _first_of(names: Collection[str]) -> str:
    first, *others = sorted(names, key=_in_order)
    return f"{first} and {len(others)} more" if others else first

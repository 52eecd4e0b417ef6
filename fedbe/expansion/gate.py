"""A gate on what was added to a model, token by token: open on the clients' domains, shut elsewhere."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import softplus
from transformers import PreTrainedModel

from fedbe.errors import ExpansionError
from fedbe.expansion.expand import Expansion
from fedbe.expansion.token_gate import TokenGate, first_output
from fedbe.modeling.architecture import find_blocks, stack_config_of
from fedbe.modeling.passes import evaluation_mode, stop_at
from fedbe.modeling.verification import probe_inputs

MODULE_NAME = "token_gate"


def install_gate(model: PreTrainedModel, expansion: Expansion | None, gate: TokenGate | None = None) -> TokenGate:
    """Put a gate on the expanded blocks of a model, in place, and return it.

    It becomes the submodule ``token_gate`` of the model's base model, always in float32. Blocks come and go without it:
    `remove_gate` first, and install the same gate afterwards.

    Args:
        model: The expanded model.
        expansion: What was inserted; None for a model whose adapters are to be gated with `gate_adapters`.
        gate: An existing one; a new one on base block 0 if left out.

    Raises:
        ExpansionError: If there is a gate already, an expanded block does not lie above the block that the gate sees,
            its outputs are not [batch, sequence, hidden], or the model was not expanded like this.
    """
    if find_gate(model) is not None:
        raise ExpansionError(f"{type(model).__name__} has a gate already: take it out with remove_gate first.")
    width = stack_config_of(model).hidden_size
    gate = TokenGate(width) if gate is None else gate
    if len(gate.weight) != 2 * width:
        raise ExpansionError(f"The gate is for a width of {len(gate.weight) // 2}, the model's is {width}.")
    gated = [] if expansion is None else expansion.blocks(model)
    stack = find_blocks(model)
    lowest = stack.depth - 1 if expansion is None else expansion.positions[0]
    if not 0 <= gate.block <= lowest:
        remedy = f"give one from 0 to {lowest}: all that is gated must lie above it"
        raise ExpansionError(f"`block` = {gate.block}, the block whose output the gate sees: {remedy}.")
    seen = stack.blocks[gate.block]  # no expanded block lies below, so its index is that in the base model
    gate.causal = _is_causal(model, seen)
    gate.to(next(seen.parameters()).device).train(model.training)
    gate.attach(model.base_model, seen, gated, stack.depth)
    model.base_model.add_module(MODULE_NAME, gate)
    return gate


def gate_adapters(model: PreTrainedModel, gate: TokenGate, layers: Iterable[str]) -> None:
    """Put an installed gate on LoRA layers: what each adapter adds is multiplied by the token's g.

    Args:
        model: A model with `peft` adapters and this gate.
        gate: What `install_gate` returned.
        layers: Exact names of the adapted layers, all of them inside blocks above the one that the gate sees.

    Raises:
        ExpansionError: If a layer has no adapter or does not lie above: then the gate could not shut it off, and the
            features would change in training. No layer is gated in that case.
    """
    path = find_blocks(model).path
    found: list[LoraLayer] = []
    for name in layers:
        layer: object = model.get_submodule(name)
        if not isinstance(layer, LoraLayer):
            raise ExpansionError(f"`{name}` has no adapter to gate.")
        index = name.removeprefix(f"{path}.").split(".")[0]
        if not name.startswith(f"{path}.") or int(index) <= gate.block:
            remedy = f"adapt layers inside the blocks above block {gate.block}, whose output the gate sees"
            raise ExpansionError(f"The adapter of `{name}` cannot be gated: {remedy}.")
        found.append(layer)
    for adapted in found:
        gate.attach_adapter(adapted)


def remove_gate(model: PreTrainedModel) -> TokenGate:
    """Take the gate out of a model, in place, and return it: blocks and adapters are open again.

    Raises:
        ExpansionError: If there is none.
    """
    gate = _installed(model)
    gate.detach()
    delattr(model.base_model, MODULE_NAME)
    return gate


def find_gate(model: PreTrainedModel) -> TokenGate | None:
    """Return the gate of a model, or None."""
    gate = getattr(model.base_model, MODULE_NAME, None)
    return gate if isinstance(gate, TokenGate) else None


def refuse_gate(model: PreTrainedModel, newcomer: str) -> None:
    """Check that a model has no gate.

    Args:
        model: The model.
        newcomer: What is about to be inserted.

    Raises:
        ExpansionError: If it has one.
    """
    if find_gate(model) is not None:
        name = type(model).__name__
        raise ExpansionError(f"{name} has a gate, which would miss {newcomer}: take it out meanwhile.")


def gate_parameter_names(model: PreTrainedModel) -> tuple[str, ...]:
    """Return the exact parameter names of a model's gate, none where there is no gate."""
    gate = find_gate(model)
    own = set() if gate is None else {id(parameter) for parameter in gate.parameters()}
    return tuple(name for name, parameter in model.named_parameters() if id(parameter) in own)


@contextmanager
def unregistered(model: PreTrainedModel) -> Iterator[TokenGate | None]:
    """Yield a model's gate, or None; meanwhile its tensors are none of the model's, so that it saves as without it."""
    gate = find_gate(model)
    if gate is not None:
        delattr(model.base_model, MODULE_NAME)
    try:
        yield gate
    finally:
        if gate is not None:
            model.base_model.add_module(MODULE_NAME, gate)


def gate_features(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Return what the gate sees in a batch: [tokens, 2h], float32, without padding.

    Only the blocks up to the one it sees are run, without gradients, in the training modes they are in.

    Raises:
        ExpansionError: If the model has no gate, or the attention mask is not [batch, sequence].
    """
    gate = _installed(model)
    with torch.no_grad(), gate.stopping():
        model(**batch)
    return gate.features


def gate_loss(gate: TokenGate, positive: Tensor, negative: Tensor, openness: float = 0.5) -> Tensor:
    """Return the cross-entropy of open against shut, in nats.

    Args:
        gate: The gate; gradients reach its weight and bias only.
        positive: Features [tokens, 2h] of text on which it should open.
        negative: Features [tokens, 2h] of text on which it should stay shut.
        openness: Weight of the former, from 0 to 1; the latter has the rest.

    Source: ours.
    """
    return openness * softplus(-gate(positive)).mean() + (1 - openness) * softplus(gate(negative)).mean()


def _is_causal(model: PreTrainedModel, seen: nn.Module) -> bool:
    """Whether what a block makes of a token depends on earlier ones only: as its attention states, or by a trial."""
    if model.main_input_name != "input_ids":
        return False
    ids, other = (_changed_at_end(model, by) for by in (0, 1))
    first, second = _output_of(model, seen, ids), _output_of(model, seen, other)
    if first.shape[:2] != ids.shape:
        shape, name = tuple(first.shape), type(model).__name__
        raise ExpansionError(
            f"A block of {name} gives {shape} for tokens {tuple(ids.shape)}: it cannot be gated by token."
        )
    stated = [module.is_causal for module in seen.modules() if isinstance(getattr(module, "is_causal", None), bool)]
    # Experts round differently with other tokens beside.
    noise = 4 * torch.finfo(first.dtype).eps * first.abs().max()
    return all(stated) if stated else bool((first - second)[:, :-1].abs().max() <= noise)


def _changed_at_end(model: PreTrainedModel, by: int) -> Tensor:
    ids = probe_inputs(model)[0]["input_ids"][:1].clone()
    ids[:, -1] = (ids[:, -1] + by) % stack_config_of(model).vocab_size
    return ids.to(model.device)


def _output_of(model: PreTrainedModel, seen: nn.Module, ids: Tensor) -> Tensor:
    with evaluation_mode(model, inference=False), torch.no_grad(), stop_at(seen) as stopped:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return first_output(stopped.output)


def _installed(model: PreTrainedModel) -> TokenGate:
    gate = find_gate(model)
    if gate is None:
        raise ExpansionError(f"{type(model).__name__} has no gate: put one in with install_gate.")
    return gate

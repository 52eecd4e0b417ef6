"""How a copied block starts as the identity: one rule per family of architectures."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedbe.errors import ExpansionError
from fedbe.modeling.families import Family, family_named, known_families

GATE_NAME = "residual_gate"


@dataclass(frozen=True)
class IdentityRule:
    """Which parameters of a block decide what it adds to the residual stream, and at which value it adds nothing.

    A parameter θ listed here acts in proportion to θ + shift. θ = -shift is the identity, and the dial a turns θ into
    a·(θ + shift) - shift.

    Attributes:
        kind: ``zero-writers`` (projections into the residual stream), ``norm-scale`` (the norm or layer scale
            behind them) or ``residual-gate`` (a scalar g in x + g·(Block(x) - x)).
        targets: Paths inside a block, of modules (all their parameters) or of parameters. Where blocks differ, those of
            all kinds: of these a block has some.
        shift: 1 where the norm multiplies by 1 + θ (Gemma), otherwise 0. Next to -1, bfloat16 moves in steps of
            1/256: train such scales in float32.

    Source: LLaMA-Pro (arXiv 2401.02415, section 3.2) for pre-norm writers; the other kinds ours.
    """

    kind: str
    targets: tuple[str, ...]
    shift: float = 0.0

    @property
    def gated(self) -> bool:
        """Whether the block needs a gate, which no plain checkpoint can hold."""
        return self.kind == "residual-gate"


# Post-norm blocks end in LN(x + …), so that a zero output is not the identity: the whole block is gated. So are blocks
# of which nobody has said what writes into the residual stream.
GATE = IdentityRule("residual-gate", (GATE_NAME,))


def candidate_rules(model_type: str, blocks: Sequence[nn.Module]) -> tuple[IdentityRule, ...]:
    """Return the rules to try on the blocks of a family, in order; for an unknown one all whose targets they have.

    Norm rules come first: zeroed writers in front of a norm pass for the identity too, with huge gradients. Of unknown
    blocks that differ all that any known rule calls a writer is tried last. The gate fits where no other rule does.
    """
    if rules := rules_of(family_named(model_type)):
        return tuple(dict.fromkeys((*rules, GATE)))
    known = dict.fromkeys(rule for family in known_families() for rule in rules_of(family) if not rule.gated)
    fitting = [rule for rule in known if all(any(_resolve(b, target) for b in blocks) for target in rule.targets)]
    ordered = sorted(fitting, key=lambda rule: (rule.kind, -len(rule.targets)))
    writers = dict.fromkeys(target for rule in known if rule.kind == "zero-writers" for target in rule.targets)
    present = tuple(target for target in writers if any(_resolve(block, target) for block in blocks))
    union = [IdentityRule("zero-writers", present)] if present else []
    return tuple(dict.fromkeys((*ordered, *union, GATE)))


def rules_of(family: Family) -> tuple[IdentityRule, ...]:
    """Return the rules that a family's description makes, in the order in which to try them; none if it says nothing.

    The gradient through a norm of a zero output is of order 1/√ε, so that behind a norm its scale is zeroed instead of
    the writers in front of it. Of several rules the first that verifies is taken: OPT models are pre- or post-norm.
    """
    rules = []
    if family.output_norms:
        rules.append(IdentityRule("norm-scale", family.output_norms, family.norm_offset))
    if family.writers:
        rules.append(IdentityRule("zero-writers", family.writers))
    if family.post_norm:
        rules.append(GATE)
    return tuple(rules)


def target_parameters(rule: IdentityRule, block: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a block that its rule names: of the targets those that this block has.

    Raises:
        ExpansionError: If the block has none of them.
    """
    parameters = [parameter for target in rule.targets for parameter in _resolve(block, target)]
    if not parameters:
        raise ExpansionError(f"a {type(block).__name__} has no parameters at {', '.join(rule.targets)}")
    return parameters


def make_identity(rule: IdentityRule, block: nn.Module) -> None:
    """Turn a copied block into the identity, in place.

    Raises:
        ExpansionError: If the block lacks the rule's targets.
    """
    if rule.gated:
        _add_gate(block)
    with torch.no_grad():
        for parameter in target_parameters(rule, block):
            parameter.fill_(-rule.shift)


@contextmanager
def others_moved(rule: IdentityRule, copies: Sequence[nn.Module], sources: Sequence[nn.Module]) -> Iterator[None]:
    """Move what a rule does not name of identity blocks inside the block, and put it back after it.

    Blocks that stay the identity then are so by their rule, and not because something else happens to be zero yet.

    Args:
        rule: The rule.
        copies: Identity blocks, not trained yet.
        sources: For each the block that it was copied from.
    """
    pairs = [pair for copy, source in zip(copies, sources, strict=True) for pair in _others(rule, copy, source)]
    with torch.no_grad():
        for moved, _ in pairs:
            # Numbers that look random: a constant would vanish in a norm.
            steps = torch.arange(moved.numel(), device=moved.device, dtype=torch.float32).sin_().view_as(moved)
            moved.add_(steps.mul_(0.05).to(moved.dtype))
    try:
        yield
    finally:
        with torch.no_grad():
            for moved, source in pairs:
                moved.copy_(source)


def dialled(values: Tensor, shift: float, dial: float) -> Tensor:
    """Return a·(θ + shift) - shift, exactly θ for a = 1 and exactly -shift for a = 0, in θ's dtype.

    Args:
        values: θ, any shape.
        shift: The rule's shift.
        dial: The factor a on the blocks' outputs.
    """
    if dial == 1:
        return values.clone()
    if dial == 0:
        return torch.full_like(values, -shift)
    return (dial * (values.float() + shift) - shift).to(values.dtype)


def apply_residual_gate(
    module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object], output: object
) -> object:
    """Return x + g·(Block(x) - x) in place of Block(x): a forward hook; x is [batch, sequence, hidden].

    Source: ours (the identity of a post-norm block).
    """
    hidden = args[0] if args else kwargs["hidden_states"]
    first = output[0] if isinstance(output, (tuple, list)) else output
    gate = getattr(module, GATE_NAME)
    if not isinstance(hidden, Tensor) or not isinstance(first, Tensor):
        raise ExpansionError(f"{type(module).__name__} does not map hidden states to such: it cannot be gated.")
    gated = hidden + gate * (first - hidden)
    return type(output)((gated, *output[1:])) if isinstance(output, (tuple, list)) else gated


def _add_gate(block: nn.Module) -> None:
    if hasattr(block, GATE_NAME):
        raise ExpansionError("The model has gated blocks already: expand its base model, all positions at once.")
    like = next(parameter for parameter in block.parameters() if parameter.is_floating_point())
    block.register_parameter(GATE_NAME, nn.Parameter(torch.zeros((), dtype=like.dtype, device=like.device)))
    # First among the hooks, so that those recording hidden states see the gated output.
    block.register_forward_hook(apply_residual_gate, prepend=True, with_kwargs=True)


def _resolve(block: nn.Module, target: str) -> list[nn.Parameter]:
    *path, name = target.split(".")
    try:
        found = getattr(block.get_submodule(".".join(path)), name, None)
    except AttributeError:
        return []
    if isinstance(found, nn.Parameter):
        return [found]
    return list(found.parameters()) if isinstance(found, nn.Module) else []


def _others(rule: IdentityRule, copy: nn.Module, source: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Return the parameters of a copied block that its rule does not name, each with that which it was copied from."""
    named, originals = {id(target) for target in target_parameters(rule, copy)}, dict(source.named_parameters())
    return [
        (parameter, originals[name])
        for name, parameter in copy.named_parameters()
        if id(parameter) not in named and parameter.is_floating_point()
    ]

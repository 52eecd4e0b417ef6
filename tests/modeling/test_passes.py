"""Whatever changes what a live model computes leaves everything else as it was, in any order."""

import copy
import inspect
from collections.abc import Callable
from contextlib import ExitStack
from itertools import permutations

import pytest
import torch
from families import batch, perturb, tiny
from torch import nn

from fedbe.engines.one_pass.forward import OnePass, OnePassError
from fedbe.errors import ExpansionError
from fedbe.expansion import (
    block_parameter_names,
    expand_blocks,
    find_gate,
    freeze,
    gate_features,
    grow,
    install_gate,
    remove_gate,
)
from fedbe.expansion.probe import identity_blocks
from fedbe.modeling.architecture import find_blocks
from fedbe.modeling.checkpointing import (
    checkpoints_gradients,
    disable_gradient_checkpointing,
    enable_gradient_checkpointing,
)
from fedbe.modeling.passes import evaluation_mode, replace, replaced, replacements, stop_at
from fedbe.prefix import Prefix, Store
from fedbe.seeding import isolated_rng

Leave = Callable[[], None]


class Times(nn.Module):
    """Multiplies by a number, and counts how often it does."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.ran = factor, 0

    def forward(self, value: float) -> float:
        self.ran += 1
        return self.factor * value


def plus(number: float) -> Callable[..., float]:
    return lambda own, value: own(value) + number


def times(number: float) -> Callable[..., float]:
    return lambda own, value: own(value) * number


# --- one module ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_hooks", [False, True])
@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_replacements_are_a_stack_from_which_any_can_be_taken(order, with_hooks):
    module, before = Times(2), dict(vars(Times(2)))
    functions = [plus(1), times(10), plus(100)]
    left = [replace(module, function, with_hooks=with_hooks) for function in functions]
    assert module(3) == 170
    present = [0, 1, 2]
    for index in order:
        left[index].remove()
        left[index].remove()
        present.remove(index)
        expected = 6
        for other in present:
            expected = functions[other](lambda value, so_far=expected: so_far, 3)
        assert module(3) == expected
    assert vars(module).keys() == before.keys()


def test_the_innermost_one_stands_below_those_that_are_there_and_come():
    module = Times(2)
    with replaced(module, times(10)), replaced(module, plus(1), innermost=True), replaced(module, plus(100)):
        assert module(3) == 170


@pytest.mark.parametrize("with_hooks", [False, True])
def test_hooks_run_around_a_replaced_pass_or_inside_of_a_replaced_call(with_hooks):
    module = Times(2)
    module.register_forward_hook(lambda module, inputs, output: -output)
    with replaced(module, plus(1), with_hooks=with_hooks):
        assert module(3) == (-5 if with_hooks else -7)
    assert module(3) == -6


def test_a_pass_that_somebody_else_has_set_is_what_runs_below_and_what_is_put_back():
    module = Times(2)
    module.forward = lambda value: value + 0.5
    own = module.forward
    with replaced(module, plus(1)):
        assert module(3) == 4.5
        theirs = module.forward
        module.forward = lambda value: theirs(value) * 2  # set by somebody while ours is there, and kept
    assert module(3) == 7
    module.forward = own
    with replaced(module, plus(1)):
        pass
    assert module.forward is own


def test_callers_see_the_arguments_of_the_pass_that_was_replaced():
    module = Times(2)
    expected = inspect.signature(module.forward)
    with replaced(module, plus(1)):
        assert inspect.signature(module.forward) == expected


def test_a_copy_runs_its_own_pass_and_keeps_it_when_the_original_is_itself_again():
    module = Times(2)
    module.child = Times(3)
    replacement = replace(module, plus(1))
    twin = copy.deepcopy(module)
    twin.factor = 5
    assert (twin(3), module(3)) == (16, 7) and (twin.ran, module.ran) == (1, 1)
    replacement.remove()
    assert (twin(3), module(3)) == (16, 6)
    (found,) = replacements(twin)
    found.remove()
    assert twin(3) == 15 and "forward" not in vars(twin)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Times(2), Times(3)

    def forward(self, value: float) -> float:
        return self.second(self.first(value))


def test_a_pass_ends_at_a_module_with_its_hooks_or_without():
    model = Two()
    model.first.register_forward_hook(lambda module, inputs, output: -output)
    with stop_at(model.first) as stopped:
        model(1)
    assert stopped.reached and stopped.output == 2 and model.second.ran == 0
    with stop_at(model.first, with_hooks=True) as stopped:
        model(1)
    assert stopped.output == -2 and model(1) == -6


def test_a_stop_inside_another_ends_its_own_pass_only():
    model = Two()
    with stop_at(model.second) as outer:
        with stop_at(model.first) as inner:
            model(1)
        model(10)
    assert (inner.output, outer.output) == (2, 60)
    with stop_at(model.first) as outer, stop_at(model.second) as inner:
        model(1)
    assert outer.reached and not inner.reached
    with stop_at(model.first) as unreached:
        pass
    assert not unreached.reached


def test_what_is_raised_by_others_is_not_swallowed_and_leaves_nothing_behind():
    model = Two()
    with pytest.raises(KeyError), stop_at(model.first):
        raise KeyError
    assert model(1) == 6 and not replacements(model.first)


@pytest.mark.parametrize("inference", [True, False])
def test_evaluation_leaves_every_module_in_its_own_mode(inference):
    model = tiny("llama")
    model.model.layers[1].train()
    modes = [module.training for module in model.modules()]
    with pytest.raises(KeyError), evaluation_mode(model, inference=inference):
        assert not any(module.training for module in model.modules())
        assert torch.is_inference_mode_enabled() == inference and model.config.use_cache != inference
        raise KeyError
    assert [module.training for module in model.modules()] == modes and model.config.use_cache


# --- mechanisms in pairs ---------------------------------------------------------------------------------------------


class Model:
    """A model with two expanded blocks, of which the upper one trains."""

    def __init__(self) -> None:
        self.model = tiny("llama").requires_grad_(False)
        self.expansion = expand_blocks(self.model, [1, 2])
        perturb((p for block in self.expansion.blocks(self.model) for p in block.named_parameters()), 0.1)
        self.names = block_parameter_names(self.model, self.expansion)[1]
        freeze(self.model, self.names)
        self.blocks = list(find_blocks(self.model).blocks)
        self.ran: list[int] = []
        for index, block in enumerate(self.blocks):
            block.mlp.act_fn = copy.deepcopy(block.mlp.act_fn)
            block.mlp.act_fn.register_forward_hook(lambda *_, index=index: self.ran.append(index))
        self.batch = batch(self.model)
        self.batch["attention_mask"] = self.batch["attention_mask"].sort(1, descending=True).values

    def checkpointing(self) -> Leave:
        enable_gradient_checkpointing(self.model)
        return lambda: disable_gradient_checkpointing(self.model)

    def prefix(self) -> Leave:
        return Prefix(self.model, 1, Store(2**20)).remove

    def gate(self) -> Leave:
        install_gate(self.model, self.expansion)
        return lambda: remove_gate(self.model) and None

    def one_pass(self) -> Leave:
        return self._entered(OnePass(self.model, self.names).installed())

    def probe(self) -> Leave:
        return self._entered(identity_blocks(self.model, self.expansion.rule))

    def growth(self) -> Leave:
        self.expansion, _ = grow(self.model, self.expansion, 3)
        return lambda: None

    @staticmethod
    def _entered(context) -> Leave:
        stack = ExitStack()
        stack.enter_context(context)
        return stack.close

    def effect(self) -> tuple[torch.Tensor, list[torch.Tensor], list[int]]:
        """Outputs, gradients of all that requires some, and which of the first blocks ran, once all is known."""
        for _ in range(2):
            self.ran.clear()
            self.model.zero_grad(set_to_none=True)
            with isolated_rng(0):
                output = self.model(**self.batch, use_cache=False).logits
                output.square().mean().backward()
        gradients = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        return output.detach(), gradients, sorted(self.ran)

    def marks(self) -> list[object]:
        """All that may be changed by hand in a live model."""
        own = ("forward", "_compiled_call_impl", "training")
        found: list[object] = [tuple(str(vars(m).get(name)) for name in own) for m in self.blocks]
        found += [dict(module._modules) for module in self.model.modules() if module is not find_gate(self.model)]
        found += [list(m._forward_hooks.values()) + list(m._forward_pre_hooks.values()) for m in self.model.modules()]
        found += [[parameter.requires_grad for parameter in self.model.parameters()]]
        found += [self.model.config.to_dict(), [block.self_attn.layer_idx for block in self.blocks]]
        return found


NAMES = ("checkpointing", "prefix", "gate", "one_pass", "probe", "growth")
# What cannot be there together is refused, and the model stays as it is.
REFUSED = {
    ("checkpointing", "one_pass"): OnePassError,
    ("gate", "probe"): ExpansionError,
    ("gate", "growth"): ExpansionError,
    ("probe", "growth"): ExpansionError,
    ("probe", "gate"): ExpansionError,
}


def same(first: tuple, second: tuple) -> bool:
    tensors = zip((first[0], *first[1]), (second[0], *second[1]), strict=True)
    return first[2] == second[2] and all(torch.equal(a, b) for a, b in tensors)


def alone(name: str) -> tuple:
    """What a model computes in which one thing is in force."""
    made = Model()
    leave = getattr(made, name)()
    effect = made.effect()
    leave()
    return effect


def test_each_alone_does_something_and_then_nothing_is_left_of_it():
    plain = Model().effect()
    for name in ("checkpointing", "prefix", "gate"):
        assert not same(alone(name), plain), name
    for name in NAMES[:-1]:
        made = Model()
        before = made.marks()
        leave = getattr(made, name)()
        made.effect()
        leave()
        assert made.marks() == before and same(made.effect(), plain), name


@pytest.mark.parametrize("nested", [True, False], ids=["first in, last out", "first in, first out"])
@pytest.mark.parametrize(("first", "second"), list(permutations(NAMES, 2)))
def test_each_leaves_the_other_as_it_was(first, second, nested):
    made, plain = Model(), Model().effect()
    before = made.marks()
    leave_first = getattr(made, first)()
    if error := REFUSED.get((first, second)):
        between, effect = made.marks(), made.effect()
        with pytest.raises(error):
            getattr(made, second)()
        assert made.marks() == between and same(made.effect(), effect)
        leave_first()
        assert made.marks() == before and same(made.effect(), plain)
        return
    leave_second = getattr(made, second)()
    made.effect()
    if "growth" in (first, second):  # nothing takes a block out again, so that what it computes decides
        leave_second()
        leave_first()
        assert torch.equal(made.effect()[0], plain[0])
        return
    leave, stays = (leave_second, first) if nested else (leave_first, second)
    leave()
    assert same(made.effect(), alone(stays))
    (leave_first if nested else leave_second)()
    assert made.marks() == before and same(made.effect(), plain)


def test_a_prefix_leaves_checkpointing_on_while_it_is_used_and_afterwards():
    made = Model()
    enable_gradient_checkpointing(made.model)
    own = [vars(block)["forward"] for block in made.blocks]
    prefix = Prefix(made.model, 2, Store(2**20))
    made.effect()
    assert prefix.store.hits > 0
    assert [vars(block)["forward"] for block in made.blocks] == own
    prefix.remove()
    assert [vars(block)["forward"] for block in made.blocks] == own and checkpoints_gradients(made.blocks[:1])
    freeze(made.model, [name for name, _ in made.model.named_parameters()])
    assert made.effect()[2] == sorted([*range(6), *range(6)])


def test_a_gate_sees_the_padding_of_the_batch_when_sequences_are_new_to_the_prefix():
    made, plain = Model(), Model()
    for each in (made, plain):
        install_gate(each.model, each.expansion)
        perturb(find_gate(each.model).named_parameters(), 0.01)
    Prefix(made.model, 1, Store(2**20))
    with torch.no_grad():
        expected = plain.model(**plain.batch, use_cache=False).logits
        found = made.model(**made.batch, use_cache=False).logits
    real = plain.batch["attention_mask"].bool()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(find_gate(made.model).features, find_gate(plain.model).features, rtol=1e-3, atol=1e-4)


def test_the_features_of_a_batch_that_is_new_to_the_prefix_are_those_of_all_its_sequences():
    made, plain = Model(), Model()
    for each in (made, plain):
        install_gate(each.model, each.expansion)
    Prefix(made.model, 1, Store(2**20))
    options = {**made.batch, "use_cache": False}
    expected = gate_features(plain.model, options)
    for _ in range(2):
        torch.testing.assert_close(gate_features(made.model, options), expected, rtol=1e-3, atol=1e-4)


def test_a_prefix_lets_blocks_run_that_have_come_in_below():
    made = Model()
    Prefix(made.model, 2, Store(2**20))
    made.effect()
    with identity_blocks(made.model, made.expansion.rule) as writers:
        made.model(**made.batch, use_cache=False).logits.square().mean().backward()
        assert all(writer.grad is not None and writer.grad.abs().max() > 0 for own in writers for writer in own)
    made.effect()
    assert 0 not in made.ran
    grow(made.model, made.expansion, 0)
    made.effect()
    assert 0 in made.ran

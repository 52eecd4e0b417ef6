"""Several adaptations of one model: each gets its own, and together they are one."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy import tiny_llama

from fedbe.adaptation.adapters import Adapters
from fedbe.adaptation.base import Adaptation
from fedbe.adaptation.blocks import Blocks
from fedbe.adaptation.existing_blocks import ExistingBlocks
from fedbe.adaptation.gate import Gate
from fedbe.adaptation.placed_blocks import PlacedBlocks
from fedbe.adaptation.stack import Stack, composed
from fedbe.errors import ConfigError, ExpansionError, Facts
from fedbe.expansion import ExportReport
from fedbe.expansion.gate import find_gate
from fedbe.messages import FitTask
from fedbe.modeling.tensors import copy_tensors
from fedbe.traits import ALL, Trait

IDS = {"input_ids": torch.arange(12)[None]}


def logits(model):
    with torch.inference_mode():
        return model.eval()(**IDS).logits.clone()


def small_gate(block=0):
    return Gate(block, sequences=4, sequence_length=8)


def prepared(adaptation, structure=None, model=None):
    model = model or tiny_llama()
    adaptation.observe_base(model)
    adaptation.prepare(model, IDS, structure)
    return model


def at(*positions):
    return {"positions": list(positions)}


class Recording(Adaptation):
    """Trains one parameter, keeps one, and notes what it is called with."""

    def __init__(self, name, kept=""):
        self.name, self.kept, self.calls = name, kept, []

    def prepare(self, model, inputs, structure=None):
        self.calls.append(("prepare", structure))

    @property
    def trainable_names(self):
        return (self.name, self.kept) if self.kept else (self.name,)

    @property
    def state_names(self):
        return (self.name,)

    def units(self):
        return {f"unit of {self.name}": self.trainable_names}

    def begin(self, model, task, kept):
        self.calls.append(("begin", sorted(task.received), task.trainable_names, sorted(kept)))

    def finish(self, model, task, kept):
        self.calls.append(("finish", sorted(task.received), task.trainable_names, sorted(kept)))
        own = {name: torch.ones(1) for name in task.trainable_names}
        return {n: t for n, t in own.items() if n != self.kept}, {n: t for n, t in own.items() if n == self.kept}

    def added_loss(self, model, task):
        return lambda: torch.tensor(float(len(self.name)))

    def watched(self, trainable_names):
        return {f"unit of {self.name}": (self.name,)} if self.name in trainable_names else {}

    def export(self, model, directory, tokenizer):
        return ExportReport(True, f"{self.name}.", directory)

    def exported_beside(self, model, write):
        report = write()
        return replace(report, reason=f"{report.reason} Not {self.name}.")


def test_parts_are_called_with_their_own_tensors_and_come_together():
    a, b = Recording("a", kept="own a"), Recording("bb", kept="own bb")
    stack = Stack([a, b])
    received = {name: torch.zeros(1) for name in ("a", "bb", "of neither")}
    task = FitTask("client", 0, 0, received, ("bb", "own bb", "a", "own a"))
    kept = {"own a": torch.zeros(1), "own bb": torch.zeros(1)}
    stack.begin(None, task, kept)
    sent, stays = stack.finish(None, task, kept)
    assert sent.keys() == {"a", "bb"} and stays.keys() == {"own a", "own bb"}
    for part, name in ((a, "a"), (b, "bb")):
        seen = (sorted([name, "of neither"]), (name, f"own {name}"), [f"own {name}"])
        assert part.calls == [("begin", *seen), ("finish", *seen)]
    assert stack.trainable_names == ("a", "own a", "bb", "own bb") and stack.state_names == ("a", "bb")
    assert stack.units() == {"unit of a": ("a", "own a"), "unit of bb": ("bb", "own bb")}
    assert stack.watched(("bb",)) == {"unit of bb": ("bb",)}
    assert stack.added_loss(None, task)().item() == 3.0 and Stack([a]).added_loss(None, task)().item() == 1.0
    assert Stack([Blocks()]).added_loss(None, task) is None
    assert stack.export(None, "folder", None) == ExportReport(True, "a. Not bb.", "folder")


def test_the_dial_of_each_part_turns_its_own():
    model, stack = tiny_llama(), Stack([Blocks([1]), small_gate()])
    prepared(stack, model=model)
    start = copy_tensors(model, stack.state_names)
    state = {name: tensor + 1 for name, tensor in start.items()}
    turned = stack.dial(start, state, 0.0)
    assert list(turned) == list(state)
    gate = set(stack.parts[1].trainable_names)
    assert gate and all(torch.equal(turned[name], state[name]) for name in gate)
    assert any(not torch.equal(turned[name], state[name]) for name in state)
    assert not gate & set(stack.dialled_names) and stack.dialled_names == stack.parts[0].dialled_names


def test_seed_and_tokenizer_reach_every_part_before_it_looks_at_the_base():
    class Looking(Recording):
        def observe_base(self, model):
            self.calls.append((self.seed, self.tokenizer))

        def probe(self, model, client_id, batches):
            self.calls.append((self.seed, self.tokenizer, client_id))

    a, b = Looking("a"), Looking("b")
    stack = Stack([a, Stack([b])])
    stack.seed, stack.tokenizer = 7, "a tokenizer"
    stack.probe(None, "client", iter(()))
    stack.observe_base(None)
    assert a.calls == [(7, "a tokenizer", "client"), (7, "a tokenizer")] and b.calls == [(7, "a tokenizer")]
    assert list(stack.parts) == [a, b] and list(a.beside) == [b] and list(b.beside) == [a]


def test_what_parts_need_and_offer_holds_for_the_stack():
    stack = Stack([Blocks(), small_gate()])
    assert stack.needs == {Trait.UNCHANGED_BASE, Trait.GLOBAL_MODEL} and stack.offers == ALL
    assert Stack([ExistingBlocks(), small_gate()]).offers == ALL - {Trait.UNCHANGED_BASE}


def test_mistakes_of_all_parts_are_found_and_one_that_is_there_twice():
    twice = Stack([Blocks(9), Stack([Blocks(1)]), Gate(block=5)])
    assert [problem.key for problem in twice.check("k", Facts(depth=3))] == ["k", "k.positions", "k.block"]


GATED = {
    "blocks": lambda: PlacedBlocks(),
    "a gate": lambda: Stack([PlacedBlocks(), small_gate()]),
}


@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize("start, end", [((1,), (0, 1)), ((1,), (0, 1, 1, 2)), ((0, 2), (0, 0, 1, 2, 2)), ((0,), (0,))])
def test_growth_comes_to_what_a_fresh_model_of_that_structure_is_and_no_output_changes(kind, start, end):
    grown, fresh = GATED[kind](), GATED[kind]()
    model = prepared(grown, at(*start))
    before, parameters = logits(model), {name: id(p) for name, p in model.named_parameters()}
    renamed = grown.grow(model, at(*end), IDS)
    other = prepared(fresh, at(*end))
    assert grown.structure() == fresh.structure() and grown.structure().items() >= at(*end).items()
    assert torch.equal(logits(model), before) and torch.equal(logits(other), before)
    assert grown.units() == fresh.units() and grown.trainable_names == fresh.trainable_names
    assert grown.watched(grown.trainable_names) == fresh.watched(fresh.trainable_names)
    state, expected = (copy_tensors(m, grown.state_names) for m in (model, other))
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    after = {id(p): name for name, p in model.named_parameters()}
    moved = {old: after[identity] for old, identity in parameters.items() if after[identity] != old}
    assert renamed == moved and bool(moved) == (start != end)
    assert (find_gate(model) is not None) == (kind == "a gate")


def test_a_block_that_goes_in_is_gated_from_then_on():
    stack = Stack([PlacedBlocks(), small_gate()])
    model = prepared(stack, at(1))
    base = logits(tiny_llama())
    stack.grow(model, at(1, 2), IDS)
    with torch.no_grad():
        for name in stack.parts[0].trainable_names:
            model.get_parameter(name).add_(0.1)
    assert not torch.equal(logits(model), base)
    find_gate(model).mode = "shut"
    assert torch.equal(logits(model), base)


def test_growth_that_cannot_be_leaves_the_gate_in_place():
    stack = Stack([PlacedBlocks(), small_gate()])
    model = prepared(stack, at(0, 2))
    for wrong in (at(2), at(0, 1), {"positions": [0, 2], "storeys": 3}):
        with pytest.raises(ValueError, match=r"cannot become blocks at|no part of the stack has a 'storeys'"):
            stack.grow(model, wrong, IDS)
        assert find_gate(model) is not None and stack.structure().items() >= at(0, 2).items()
    assert stack.grow(model, at(0, 2), IDS) == {}


def test_parameters_of_a_part_that_another_would_move_are_named():
    stack = Stack([PlacedBlocks(), Adapters(rank=2)])
    model = prepared(stack, at(2))
    with pytest.raises(ValueError, match=r"Adapters trains .*, which PlacedBlocks has moved"):
        stack.grow(model, at(0, 2), IDS)


def test_blocks_that_are_placed_need_a_place():
    with pytest.raises(ValueError, match="the server's choice"):
        prepared(PlacedBlocks())


@pytest.mark.parametrize("others", [[], [Recording("a")]])
def test_a_gate_needs_something_to_be_on(others):
    with pytest.raises(ConfigError, match="nothing to gate"):
        prepared(Stack([*others, small_gate()]))


def test_a_gate_is_on_blocks_and_adapters_at_once():
    stack = Stack([Blocks([2]), Adapters(rank=2, first_block=1), small_gate()])
    model = prepared(stack)
    base = logits(model)
    with torch.no_grad():
        for name in stack.trainable_names:
            if "token_gate" not in name:
                model.get_parameter(name).add_(0.1)
    moved = logits(model)
    find_gate(model).mode = "shut"
    assert not torch.equal(moved, base) and torch.equal(logits(model), base)


def test_a_gate_that_was_not_taken_out_is_not_put_back_and_none_is_exported_alone():
    gate = small_gate()
    with pytest.raises(RuntimeError, match="`detach`"):
        gate.attach(tiny_llama())
    with pytest.raises(ExpansionError, match="no model"):
        gate.export(tiny_llama(), "folder", None)


names = st.permutations(list("abcdef"))


@given(names, names)
def test_two_renamings_come_to_one(first, second):
    """Over the same names: each moves every name to another, and the two of them one after the other to a third."""
    one = {old: new for old, new in zip("abcdef", first, strict=True) if old != new}
    two = {old: new for old, new in zip("abcdef", second, strict=True) if old != new}
    both = composed(one, two)
    for old in "abcdef":
        assert both.get(old, old) == two.get(one.get(old, old), one.get(old, old))


def test_a_name_that_is_new_after_the_first_renaming_is_none_of_the_old_ones():
    assert composed({"a": "b"}, {"a": "c", "b": "d"}) == {"a": "d"}

"""What every algorithm's dial does: nothing of what was learned at 0, all of it at 1, a part in between."""

import pytest
import torch
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from lora_tools import METHODS, build, distance, effective
from toy import tiny_llama
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from fedbe.adaptation.base import interpolated
from fedbe.algorithms import BlockExpansion, Centralized, FedAvg, FedIT, FedSALoRA, Gated, LocalOnly, Unfreeze
from fedbe.expansion import scale_blocks
from fedbe.modeling.tensors import copy_tensors, load_tensors
from fedbe.traits import Trait

DIAL = {Trait.GLOBAL_MODEL, Trait.AGGREGATION}
IDS = torch.arange(12)[None]
OTHERS = {
    "FedAvg": FedAvg,
    "Unfreeze": lambda: Unfreeze([1]),
    "BlockExpansion": lambda: BlockExpansion([0, 1]),
    "Centralized": lambda: Centralized(Unfreeze([1])),
    "Gated": lambda: Gated(BlockExpansion([0, 1]), sequences=4, sequence_length=8),
    "Gated adapters": lambda: Gated(FedIT(rank=2, first_block=1), sequences=4, sequence_length=8),
}
LORA = {method.__name__: lambda method=method: build(method) for method in METHODS if method is not FedSALoRA}
every_algorithm = pytest.mark.parametrize("name", [*OTHERS, *LORA])


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits.clone()


def trained(adaptation, model, inputs=None):
    """Prepare, and move every global tensor as training might."""
    adaptation.observe_base(model)
    adaptation.prepare(model, inputs or {"input_ids": IDS})
    start = copy_tensors(model, adaptation.state_names)
    own = torch.Generator().manual_seed(0)
    state = {name: tensor + 0.1 * torch.randn(tensor.shape, generator=own) for name, tensor in start.items()}
    load_tensors(model, state)
    return start, state


@every_algorithm
def test_zero_is_the_base_model_and_one_the_trained_one_to_the_bit(name):
    model = tiny_llama(layers=2)
    base, algorithm = logits(model), (OTHERS | LORA)[name]()
    adaptation = algorithm.adaptation
    start, state = trained(adaptation, model)
    full = logits(model)
    copies = [{n: t.clone() for n, t in tensors.items()} for tensors in (start, state)]
    assert algorithm.offers >= DIAL and set(adaptation.dialled_names) <= set(adaptation.state_names)
    for factor in (0.5, 0, 1):
        tensors = adaptation.dial(start, state, factor)
        assert tensors.keys() == state.keys()
        load_tensors(model, tensors)
        seen = logits(model)
        assert (torch.equal(seen, base), torch.equal(seen, full)) == (factor == 0, factor == 1)
    for kept, tensors in zip(copies, (start, state), strict=True):
        assert all(torch.equal(kept[n], tensors[n]) for n in kept)


@pytest.mark.parametrize("name", LORA)
@pytest.mark.parametrize("factor", [0.3, 0.8])
def test_the_weights_that_adapters_amount_to_lie_on_the_line_from_the_base_model_s(name, factor):
    model, adapters = tiny_llama(layers=2), LORA[name]().adaptation
    base = {n: t.clone() for n, t in model.state_dict().items()}
    start, state = trained(adapters, model)
    end = effective(model)
    load_tensors(model, adapters.dial(start, state, factor))
    line = {n: base[n] + factor * (end[n] - base[n]) for n in base}
    assert distance(base, end) > 0.01 and distance(effective(model), line) < 1e-6


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert"])
def test_of_expanded_blocks_it_scales_what_they_write(family):
    model, blocks = FAMILIES[family]().eval(), BlockExpansion([1, 3]).adaptation
    start, state = trained(blocks, model)
    scale_blocks(model, blocks.expansion, 0.3)
    expected = copy_tensors(model, blocks.state_names)
    moved = blocks.dial(start, state, 0.3)
    assert moved.keys() == expected.keys() and all(torch.equal(moved[n], expected[n]) for n in moved)


@pytest.mark.parametrize("make", [FedAvg, lambda: Unfreeze([1]), lambda: BlockExpansion([1]), lambda: build(FedIT)])
def test_a_new_task_head_stays_as_trained(make):
    config = DistilBertConfig(vocab_size=16, dim=16, hidden_dim=24, n_layers=2, n_heads=2, num_labels=3)
    model, adaptation = DistilBertForSequenceClassification(config).eval(), make().adaptation
    start, state = trained(adaptation, model)
    none = adaptation.dial(start, state, 0.0)
    head = {name for name in state if name.startswith(("classifier", "pre_classifier"))}
    assert len(head) == 4 and all(torch.equal(none[name], state[name]) for name in head)
    assert any(not torch.equal(none[name], state[name]) for name in state)


@pytest.mark.parametrize("algorithm", [LocalOnly(FedAvg()), FedSALoRA(), Centralized(FedSALoRA())])
def test_without_a_global_model_there_is_no_dial(algorithm):
    assert not algorithm.offers >= DIAL


@given(st.lists(st.tuples(st.floats(-9, 9, width=16), st.floats(-9, 9, width=16)), min_size=1), st.floats(0, 1))
def test_an_interpolated_value_lies_between_its_ends_in_their_dtype(pairs, factor):
    for dtype in (torch.float32, torch.bfloat16):
        start, end = torch.tensor(pairs).to(dtype).unbind(1)
        assert torch.equal(interpolated(start, end, 0), start) and torch.equal(interpolated(start, end, 1), end)
        seen = interpolated(start, end, factor)
        slack = 1e-5
        low, high = torch.minimum(start, end).float() - slack, torch.maximum(start, end).float() + slack
        assert seen.dtype == dtype and bool((low <= seen.float()).all() and (seen.float() <= high).all())

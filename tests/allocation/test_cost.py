from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode
from toy import VOCABULARY, tiny_llama
from transformers import BertConfig, BertForSequenceClassification

from fedbe.algorithms import FedIT
from fedbe.allocation.cost import Calibration, Cost, CostModel, seconds, state_bytes_per_parameter
from fedbe.allocation.profiles import Profile
from fedbe.errors import ExpansionError
from fedbe.expansion import expand_blocks, freeze, head_parameter_names, set_training_modes, stack_parameter_names
from fedbe.modeling.base_model import forward_options
from fedbe.modeling.checkpointing import enable_gradient_checkpointing

SAMPLES, TOKENS = 4, 12
HIDDEN, INNER = 16, 24
PROFILE = Profile(1e9, 1e6, 1e3, 2e3)


def tokens(samples=SAMPLES):
    ids = (torch.arange(samples * TOKENS).reshape(samples, TOKENS) * 7) % VOCABULARY
    return {"input_ids": ids, "labels": ids}


def llama(layers=3, tied=False):
    model = tiny_llama(layers)
    model.set_attn_implementation("eager")
    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model


def adapted():
    model = llama(2)
    FedIT(rank=2, target_modules="all-linear").adaptation.prepare(model, tokens(2))
    return model


def bert():
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=2,
        num_labels=3, attn_implementation="eager",
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def batch(kind):
    ids = tokens()
    return ids | {"labels": torch.tensor([0, 1, 2, 0])} if kind == "bert" else ids


MODELS = {"llama": llama, "tied": lambda: llama(tied=True), "bert": bert, "lora": adapted}


@cache
def counted(kind):
    model = MODELS[kind]()
    names = [name for name, _ in model.named_parameters()]
    if kind == "lora":
        names = [name for name in names if "lora_" in name]
    return model, tuple(names), CostModel.of(model, batch(kind), torch.optim.AdamW, names)


class Observed:
    """A real pass through the whole model: FLOPs in each direction and the bytes that autograd saves."""

    def __init__(self, model, inputs, names):
        freeze(model, names)
        set_training_modes(model, names)
        own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
        saved = {}

        def note(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with FlopCounterMode(display=False) as counter, saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model(**inputs, **forward_options(model)).loss
            self.forward = counter.get_total_flops()
            loss.backward()
        self.backward = counter.get_total_flops() - self.forward
        self.saved = sum(saved.values())
        freeze(model, ())
        model.eval()


def activations(costs, names, samples=SAMPLES):
    return costs.cost(names, samples).memory_bytes - costs.weight_bytes - sum(costs.trained_bytes[n] for n in names)


@pytest.mark.parametrize("chosen", [[2], [1], [0, 2], [0, 1, 2]])
def test_flops_of_a_llama_are_those_counted_by_hand(chosen):
    model, _, costs = counted("llama")
    linear = 2 * TOKENS * (4 * HIDDEN**2 + 3 * HIDDEN * INNER)
    attention = 2 * 2 * TOKENS**2 * HIDDEN
    head = 2 * TOKENS * HIDDEN * VOCABULARY
    names = [name for block in chosen for name in stack_parameter_names(model)[block]]
    cost = costs.cost(names, SAMPLES, steps=5)
    assert cost.forward_flops == 5 * SAMPLES * (3 * (linear + attention) + head)
    above = 2 - chosen[0]
    # The norm below q, k and v trains too, so that the lowest block costs as much as those above it.
    passed = head + (above + 1) * (linear + 2 * attention)
    assert cost.backward_flops == 5 * SAMPLES * (passed + len(chosen) * linear)


@pytest.mark.parametrize("kind", MODELS)
def test_a_real_pass_has_the_predicted_flops_and_saves_the_predicted_bytes(kind):
    model, names, costs = counted(kind)
    for lowest in range(len(stack_parameter_names(model))):
        inside = stack_parameter_names(model)[lowest]
        chosen = [name for name in inside if name in names]
        real = Observed(model, batch(kind), chosen)
        cost = costs.cost(chosen, SAMPLES)
        assert (cost.forward_flops, cost.backward_flops) == (real.forward, real.backward)
        # Masks and positions are counted whether they are saved or not.
        assert real.saved <= activations(costs, chosen) <= real.saved + costs.counts.shared_bytes


def test_a_real_pass_agrees_where_everything_trains_and_the_embedding_is_tied():
    model, names, costs = counted("tied")
    real = Observed(model, batch("tied"), names)
    cost = costs.cost(names, SAMPLES)
    assert (cost.forward_flops, cost.backward_flops) == (real.forward, real.backward)
    assert real.saved <= activations(costs, names) <= real.saved + costs.counts.shared_bytes
    assert costs.places["model.embed_tokens.weight"] == (0, 4)


@given(st.data())
@pytest.mark.parametrize("kind", MODELS)
def test_adding_a_name_never_lowers_any_number(kind, data):
    _, names, costs = counted(kind)
    few = data.draw(st.sets(st.sampled_from(names), max_size=6))
    more = few | data.draw(st.sets(st.sampled_from(names), max_size=3))
    a, b = costs.cost(few, 2, steps=3), costs.cost(more, 2, steps=3)
    assert a.forward_flops == b.forward_flops
    assert a.backward_flops <= b.backward_flops
    assert a.memory_bytes <= b.memory_bytes
    assert (a.backward_flops > 0) == bool(few)


@given(st.sets(st.integers(0, 3), min_size=1), st.integers(1, 7))
def test_units_in_additive_form_cost_what_their_names_cost(chosen, steps):
    model, _, costs = counted("llama")
    units = dict(enumerate(stack_parameter_names(model)))
    units[3] = ("lm_head.weight",)
    table = costs.units({f"unit-{index}": unit for index, unit in reversed(units.items())}, samples_per_step=2)
    assert table.names == ("unit-0", "unit-1", "unit-2", "unit-3") and table.parts == (1, 2, 3, 4)
    indices = sorted(chosen)
    trained = [name for index in indices for name in units[index]]
    cost = costs.cost(trained, 2, steps)
    assert table.memory_low[indices[0]] + table.memory_train[indices].sum() == pytest.approx(cost.memory_bytes)
    calibration = Calibration(2.0, 3.0, 0.5)
    low, train = table.seconds(PROFILE, steps, bytes_down=100, calibration=calibration)
    up = 4 * sum(model.get_parameter(name).numel() for name in trained)
    expected = seconds(cost, PROFILE, 100, up, calibration)
    assert low[indices[0]] + train[indices].sum() == pytest.approx(expected)
    assert (np.diff(low) <= 0).all()


def test_an_expanded_block_costs_nothing_below_the_lowest_that_trains():
    model = llama()
    expansion = expand_blocks(model, [0, 2], inputs=tokens(2))
    low, high = (stack_parameter_names(model)[index] for index in expansion.expanded_indices)
    costs = CostModel.of(model, tokens(), torch.optim.SGD, (*low, *high))
    assert activations(costs, high) < activations(costs, low) < activations(costs, (*low, *high))
    assert costs.cost(low, 1).backward_flops > 2 * costs.cost(high, 1).backward_flops
    with pytest.raises(KeyError, match=r"layers\.0\."):
        costs.cost(["model.layers.0.mlp.up_proj.weight"], 1)


def test_names_are_exact():
    with pytest.raises(ExpansionError, match=r"layers\.1"):
        CostModel.of(llama(), tokens(), 0.0, ["model.layers.1"])


def test_memory_is_weights_gradients_state_and_activations():
    model, _, costs = counted("llama")
    weights = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert costs.cost((), 1).memory_bytes - 4 * weights - buffers == pytest.approx(costs.counts.shared_bytes / SAMPLES)
    norm = "model.norm.weight"
    assert costs.trained_bytes[norm] == (4 + 8) * HIDDEN
    assert activations(costs, [norm], 8) == pytest.approx(2 * activations(costs, [norm], 4))


def test_adapters_cost_less_than_the_layers_they_adapt():
    _, names, costs = counted("lora")
    whole = counted("llama")[2].cost(stack_parameter_names(llama(3))[0], 1)
    lowest = [name for name in names if ".layers.0." in name]
    assert 0 < costs.cost(lowest, 1).backward_flops < whole.backward_flops
    # The gradient of A [2, 16] is a product of [2, tokens] and [tokens, 16].
    a = next(name for name in names if "layers.0.self_attn.q_proj.lora_A" in name)
    both = costs.cost([a, lowest[1]], 1).backward_flops - costs.cost([lowest[1]], 1).backward_flops
    assert both == 2 * 2 * TOKENS * HIDDEN


def test_a_new_head_trains_without_a_gradient_in_the_blocks():
    model = bert()
    head = [name for name in head_parameter_names(model) if name.startswith("classifier.")]
    costs = CostModel.of(model, batch("bert"), 0.0, head)
    real = Observed(model, batch("bert"), head)
    assert costs.cost(head, SAMPLES).backward_flops == real.backward
    assert {costs.places[name] for name in head} == {(3,)}


def test_checkpointed_blocks_save_less_and_compute_more():
    plain, checkpointed = llama(), llama()
    enable_gradient_checkpointing(checkpointed)
    names = [name for block in stack_parameter_names(plain) for name in block]
    a, b = (CostModel.of(model, tokens(), 0.0, names).cost(names, 4) for model in (plain, checkpointed))
    assert b.memory_bytes < a.memory_bytes and b.backward_flops > a.backward_flops


def test_counting_leaves_the_model_as_it_was():
    model = llama()
    model.get_parameter("model.norm.weight").requires_grad_(True)
    model.model.layers[1].train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    CostModel.of(model, tokens(), torch.optim.AdamW)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["model.norm.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert model.model.layers[1].training and not model.model.layers[0].training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("optimizer", "dtype", "expected"),
    [
        (torch.optim.SGD, torch.float32, 0),
        (lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9), torch.float32, 4),
        (torch.optim.AdamW, torch.float32, 8),
        (torch.optim.AdamW, torch.bfloat16, 4),
        (3.5, torch.float32, 3.5),
    ],
)
def test_optimizer_state_is_measured(optimizer, dtype, expected):
    assert state_bytes_per_parameter(optimizer, dtype) == expected


def test_seconds_are_flops_over_speed_plus_bytes_over_bandwidth():
    cost = Cost(2e6, 3e6, 0, steps=4)
    assert seconds(cost, PROFILE, bytes_down=1000, bytes_up=500) == pytest.approx(5 + 0.5 + 0.5)
    calibration = Calibration.of(cost, PROFILE, forward_seconds=1, backward_seconds=6, other_seconds=2)
    assert seconds(cost, PROFILE, calibration=calibration) == pytest.approx(9)

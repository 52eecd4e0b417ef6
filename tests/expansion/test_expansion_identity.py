"""The contract of identity, family by family: outputs, cache, gradients at step 0, the dial, the way back."""

import copy

import pytest
import torch
from families import FAMILIES, GATED, GENERATIVE, logits, loss, perturb, tiny
from torch import nn
from transformers import PreTrainedModel

from fedbe.expansion import (
    Expansion,
    block_parameter_names,
    expand_blocks,
    freeze,
    remove_blocks,
    scale_blocks,
    without_blocks,
)
from fedbe.expansion.identity import apply_residual_gate, target_parameters

POSITIONS = [0, 2, 2]
KINDS = {
    **dict.fromkeys(GATED, "residual-gate"),
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4", "glm4", "dinov2"), "norm-scale"),
}


def expanded(family: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Expansion]:
    model = tiny(family, dtype)
    return model, expand_blocks(model, POSITIONS)


def perturb_blocks(model: PreTrainedModel, expansion: Expansion) -> None:
    perturb((pair for block in expansion.blocks(model) for pair in block.named_parameters()), 0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_are_equal_to_the_bit(family: str, dtype: torch.dtype) -> None:
    model = tiny(family, dtype)
    before = logits(model)
    expansion = expand_blocks(model, POSITIONS)
    assert torch.equal(logits(model), before)
    assert expansion.rule.kind == KINDS.get(family, "zero-writers")
    assert model.config.get_text_config().num_hidden_layers == 7


@pytest.mark.parametrize("family", GENERATIVE)
def test_generated_tokens_equal_the_base_models(family: str) -> None:
    model = tiny(family)
    prompt = torch.tensor([[0, 0, 5, 9, 11, 7, 30], [3, 4, 5, 6, 7, 8, 9]])
    arguments = {"attention_mask": (prompt != 0).long(), "max_new_tokens": 8, "do_sample": False}
    before = model.generate(prompt, **arguments)
    expansion = expand_blocks(model, POSITIONS)
    assert torch.equal(model.generate(prompt, **arguments), before)
    # Once the blocks have learned something, the cache must still agree with a run without it.
    perturb_blocks(model, expansion)
    cached = model.generate(prompt, **arguments)
    assert torch.equal(model.generate(prompt, **arguments, use_cache=False), cached)
    assert not torch.equal(cached, before)


@pytest.mark.parametrize("family", FAMILIES)
def test_first_gradient_reaches_the_writers_only(family: str) -> None:
    model, expansion = expanded(family)
    names = block_parameter_names(model, expansion)
    freeze(model, (name for block in names.values() for name in block))
    loss(model).backward()  # type: ignore[no-untyped-call]
    for block in expansion.blocks(model):
        targets = target_parameters(expansion.rule, block)
        for target in targets:
            assert target.grad is not None and target.grad.isfinite().all() and target.grad.abs().max() > 0
            assert target.grad.abs().max() < 1e3
        others = {id(p) for p in block.parameters()} - {id(p) for p in targets}
        assert all(p.grad is None or not p.grad.any() for p in block.parameters() if id(p) in others)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_dial_zero_is_exactly_the_base_model(family: str) -> None:
    model, expansion = expanded(family)
    base = logits(model)
    perturb_blocks(model, expansion)
    learned = logits(model)
    assert not torch.equal(learned, base)
    scale_blocks(model, expansion, 1.0)
    assert torch.equal(logits(model), learned)
    half = copy.deepcopy(model)
    scale_blocks(half, expansion, 0.5)
    distance = (logits(half) - base).norm()
    assert 0 < distance < (learned - base).norm()
    scale_blocks(model, expansion, 0.0)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("family", ["llama", "olmo2", "gemma2", "bert"])
def test_dial_scales_what_a_parameter_adds(family: str) -> None:
    model, expansion = expanded(family)
    perturb_blocks(model, expansion)
    blocks = expansion.blocks(model)
    before = [p.detach().clone() for block in blocks for p in target_parameters(expansion.rule, block)]
    scale_blocks(model, expansion, 0.25)
    after = [p.detach() for block in blocks for p in target_parameters(expansion.rule, block)]
    shift = 1.0 if family == "gemma2" else 0.0
    for old, new in zip(before, after, strict=True):
        torch.testing.assert_close(new + shift, 0.25 * (old + shift))


@pytest.mark.parametrize("family", FAMILIES)
def test_removing_the_blocks_restores_the_base_model(family: str) -> None:
    model = tiny(family)
    base, config = {name: tensor.clone() for name, tensor in model.state_dict().items()}, model.config.to_dict()
    before = logits(model)
    expansion = expand_blocks(model, POSITIONS)
    perturb_blocks(model, expansion)
    learned = logits(model)
    with without_blocks(model, expansion):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), learned)
    remove_blocks(model, expansion)
    state = model.state_dict()
    assert state.keys() == base.keys() and all(torch.equal(state[name], base[name]) for name in base)
    restored = model.config.to_dict()
    # GPT-Neo's compressed list comes back in another spelling of the same.
    assert {k: v for k, v in restored.items() if k != "attention_types"} == {
        k: v for k, v in config.items() if k != "attention_types"
    }


def test_blocks_left_out_by_an_exception_come_back() -> None:
    model, expansion = expanded("llama")
    with pytest.raises(KeyError), without_blocks(model, expansion):
        raise KeyError
    assert len(expansion.blocks(model)) == 3
    indices = [block.self_attn.layer_idx for block in model.model.layers]
    assert indices == list(range(7))


class Keyworded(nn.Module):
    def forward(self, *, hidden_states: torch.Tensor, extra: int = 3) -> tuple[torch.Tensor, int]:
        return 2 * hidden_states, extra


@pytest.mark.parametrize("gate", [0.0, 0.5])
def test_gate_takes_the_hidden_state_by_keyword_and_keeps_other_outputs(gate: float) -> None:
    block = Keyworded()
    block.residual_gate = nn.Parameter(torch.tensor(gate))
    block.register_forward_hook(apply_residual_gate, with_kwargs=True)
    hidden = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    output, extra = copy.deepcopy(block)(hidden_states=hidden)
    torch.testing.assert_close(output, (1 + gate) * hidden)
    assert extra == 3


def test_recorded_hidden_states_are_the_gated_ones() -> None:
    model = tiny("bert")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        base = model(ids, output_hidden_states=True).hidden_states
        expand_blocks(model, [1])
        hidden = model(ids, output_hidden_states=True).hidden_states
    assert len(hidden) == 6
    assert torch.equal(hidden[3], base[2]) and torch.equal(hidden[3], hidden[2])


def test_tied_embeddings_stay_tied() -> None:
    model, _ = expanded("llama_tied")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_base_weights_are_not_copied() -> None:
    model = tiny("llama")
    pointers = [block.mlp.up_proj.weight.data_ptr() for block in model.model.layers]
    expansion = expand_blocks(model, POSITIONS)
    kept = [i for i in range(7) if i not in expansion.expanded_indices]
    assert [model.model.layers[i].mlp.up_proj.weight.data_ptr() for i in kept] == pointers
    copies = {block.mlp.up_proj.weight.data_ptr() for block in expansion.blocks(model)}
    assert len(copies | set(pointers)) == 7


def test_gated_block_survives_a_deep_copy() -> None:
    model, expansion = expanded("bert")
    perturb_blocks(model, expansion)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))
    scale_blocks(twin, expansion, 0.0)
    assert not torch.equal(logits(twin), logits(model))

"""Families beyond those of the other tests: identity at blocks of every kind, or a refusal; the gate with a cache."""

import pytest
import torch
from families import FAMILIES, MATRIX, batch, logits, perturb, tiny
from test_gate import gate_of, gated, generate, prompt

from fedbe.errors import ExpansionError
from fedbe.expansion import expand_blocks, scale_blocks

REFUSED = {
    "albert": "share their weights",
    "funnel": "no list of 4 blocks",
    "gemma3n": "embedding of its own",
    "gemma4": "configuration per block",
    "jamba": "of JambaAttentionDecoderLayer, JambaMambaDecoderLayer",
    "minimax": "follows from the index",
    "qwen3_vl": "give positions from 1 to 3",
    "swin": "cannot be expanded",
    "t5": "encoder-decoder",
}
EXPANDED = sorted(MATRIX.keys() - FAMILIES.keys() - REFUSED.keys())


@pytest.mark.parametrize("family", EXPANDED)
def test_identity_holds_at_blocks_of_every_kind_and_dial_zero_is_the_base(family):
    model = tiny(family)
    before = logits(model)
    expansion = expand_blocks(model, [0, 1, 2, 3])
    assert torch.equal(logits(model), before)
    perturb((pair for block in expansion.blocks(model) for pair in block.named_parameters()), 0.1)
    assert not torch.equal(logits(model), before)
    scale_blocks(model, expansion, 0.0)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_expanded_is_refused_with_the_reason(family):
    with pytest.raises(ExpansionError, match=REFUSED[family]):
        expand_blocks(tiny(family), [0])


def test_no_block_goes_between_those_that_images_are_added_behind():
    model = tiny("qwen3_vl")
    assert expand_blocks(model, [1, 3]).positions == (1, 3)


def test_a_writer_that_happens_to_be_zero_is_no_identity(monkeypatch):
    from fedbe.modeling import families
    from fedbe.modeling.families import Family, register_family

    monkeypatch.setattr(families, "_registered", dict(families._registered))
    register_family(Family(("gpt_oss",), writers=("self_attn.o_proj", "mlp.experts.down_proj")))
    model = tiny("gpt_oss")
    for name, parameter in model.named_parameters():
        if name.endswith("down_proj_bias"):
            parameter.data.zero_()
    assert expand_blocks(model, [1]).rule.kind == "residual-gate"


@pytest.mark.parametrize("mode", ["soft", "hard"])
@pytest.mark.parametrize("family", ["qwen3.5", "qwen3_next", "lfm2", "bamba", "nemotron_h", "mamba"])
def test_the_gate_goes_with_the_cache_of_blocks_without_attention(family, mode):
    model, _ = gated(family, scale=0.7)
    gate_of(model).mode = mode
    cached = generate(model, prompt())
    assert torch.equal(cached, generate(model, prompt(), use_cache=False))
    gate_of(model).mode = "open"
    assert not torch.equal(cached, generate(model, prompt()))


@pytest.mark.parametrize("family, causal", [("fnet", False), ("convbert", False), ("mpnet", False), ("bloom", True)])
def test_whether_blocks_look_ahead_is_found_out(family, causal):
    model, _ = gated(family)
    assert gate_of(model).causal == causal


def test_hidden_states_of_another_order_are_not_gated():
    with pytest.raises(ExpansionError, match="cannot be gated by token"):
        gated("xlnet")


def test_a_model_that_has_just_generated_is_expanded():
    model = tiny("qwen2_vl")
    model.generate(**{name: tensor[:2] for name, tensor in batch(model).items()}, max_new_tokens=2)
    assert expand_blocks(model, [1]).positions == (1,)

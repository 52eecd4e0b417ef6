"""Positions, the describing object, configurations, and what is refused."""

import json
from typing import Any

import pytest
import torch
import transformers as hf
from families import FAMILIES, logits, perturb, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from fedbe.errors import ExpansionError
from fedbe.expansion import Expansion, IdentityRule, expand_blocks, resolve_positions, scale_blocks
from fedbe.modeling.architecture import expressed_by_config, find_blocks
from fedbe.modeling.verification import observe, probe_inputs

RULE = IdentityRule("zero-writers", ("self_attn.o_proj", "mlp.down_proj"))


def describe(depth: int, positions: list[int]) -> Expansion:
    return Expansion("llama", "model.layers", depth, tuple(sorted(positions)), RULE)


@given(st.integers(1, 40).flatmap(lambda d: st.tuples(st.just(d), st.lists(st.integers(0, d - 1), min_size=1))))
def test_expanded_blocks_sit_directly_above_their_base_block(case: tuple[int, list[int]]) -> None:
    depth, positions = case
    expansion = describe(depth, positions)
    assert len(expansion.position_map) == expansion.depth == depth + len(positions)
    kept = [i for i in range(expansion.depth) if i not in expansion.expanded_indices]
    assert [expansion.position_map[i] for i in kept] == list(range(depth))
    assert [expansion.position_map[i] for i in expansion.expanded_indices] == sorted(positions)
    assert all(expansion.position_map[i - 1] == expansion.position_map[i] for i in expansion.expanded_indices)
    assert Expansion.from_dict(json.loads(json.dumps(expansion.to_dict()))) == expansion


@settings(max_examples=20)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=5))
def test_any_positions_keep_the_outputs(positions: list[int]) -> None:
    model = tiny("smollm3")
    before = logits(model)
    expansion = expand_blocks(model, positions)
    assert torch.equal(logits(model), before)
    assert expressed_by_config(model, find_blocks(model)) is None
    assert model.config.no_rope_layers == [(1, 0, 1, 1)[base] for base in expansion.position_map]


@given(st.integers(1, 60).flatmap(lambda depth: st.tuples(st.just(depth), st.integers(1, depth))))
def test_a_number_is_spread_over_groups_of_nearly_equal_size(case: tuple[int, int]) -> None:
    depth, number = case
    positions = resolve_positions(number, depth)
    sizes = [upper - lower for lower, upper in zip((-1, *positions), positions, strict=False)]
    assert len(positions) == number and positions[-1] == depth - 1
    assert max(sizes) - min(sizes) <= 1


def test_eight_blocks_of_thirty_two_follow_the_published_layout() -> None:
    assert resolve_positions(8, 32) == (3, 7, 11, 15, 19, 23, 27, 31)


@pytest.mark.parametrize("positions", [[4], [-1], [], 0, 5, -2, True, [True], [0, 1.5], "01", 2.0, None])
def test_impossible_positions_are_refused_with_value_and_range(positions: Any) -> None:
    model = tiny("llama")
    with pytest.raises(ExpansionError, match="`positions` = ") as caught:
        expand_blocks(model, positions)
    assert repr(positions) in str(caught.value)
    assert len(model.model.layers) == 4


@pytest.mark.parametrize("dial", [-0.1, float("nan"), float("inf"), True, "1"])
def test_impossible_dial_is_refused(dial: Any) -> None:
    model = tiny("llama")
    expansion = expand_blocks(model, 1)
    with pytest.raises(ExpansionError, match="`dial` = "):
        scale_blocks(model, expansion, dial)


@pytest.mark.parametrize("family", FAMILIES)
def test_described_expansion_rebuilds_the_model_from_a_fresh_base(family: str) -> None:
    model = tiny(family)
    expansion = expand_blocks(model, [3, 1, 1])
    perturb((pair for block in expansion.blocks(model) for pair in block.named_parameters()), 0.1)
    fresh = tiny(family)
    base = logits(fresh)
    Expansion.from_dict(json.loads(json.dumps(expansion.to_dict()))).apply(fresh)
    assert torch.equal(logits(fresh), base)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), logits(model))
    assert fresh.config.to_dict() == model.config.to_dict()


def test_expansion_of_another_model_is_refused() -> None:
    expansion = describe(4, [0])
    with pytest.raises(ExpansionError, match="of a llama model, not of gpt2"):
        expansion.apply(tiny("gpt2"))
    with pytest.raises(ExpansionError, match="has 4 blocks, the expansion needs 6"):
        describe(6, [0]).apply(tiny("llama"))
    with pytest.raises(ExpansionError, match="has 4 blocks, the expansion needs 5"):
        expansion.blocks(tiny("llama"))


@pytest.mark.parametrize("change", [{"positions": [9]}, {"rule": None}, {"colour": 1}, {"positions": 3}])
def test_description_with_impossible_values_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ExpansionError):
        Expansion.from_dict({**describe(4, [0]).to_dict(), **change})


@pytest.mark.parametrize("family", ["qwen2", "gemma2", "gemma3_text", "smollm3", "olmo3", "cohere2"])
def test_kinds_of_attention_move_with_their_blocks(family: str) -> None:
    model = tiny(family)
    kinds = list(model.config.layer_types)
    expansion = expand_blocks(model, [0, 1, 3])
    assert model.config.layer_types == [kinds[base] for base in expansion.position_map]
    assert [block.self_attn.layer_idx for block in model.model.layers] == list(range(7))


def test_gpt_neo_kinds_of_attention_survive_the_saved_form() -> None:
    model = tiny("gpt_neo")
    expand_blocks(model, [0, 0])
    reloaded = type(model.config).from_dict(model.config.to_dict())
    assert reloaded.attention_layers == ["global", "global", "global", "local", "global", "local"]


def test_lists_that_only_happen_to_be_as_long_as_the_depth_stay() -> None:
    model = tiny("llama")
    model.config.eos_token_id = [1, 5, 6, 7]
    expand_blocks(model, 2)
    assert model.config.eos_token_id == [1, 5, 6, 7]


def test_dense_blocks_of_a_mixture_keep_their_place() -> None:
    model = tiny("qwen2_moe")
    model.config.mlp_only_layers = [1, 3]
    others = IdentityRule("zero-writers", ("attn.c_proj", "mlp.c_proj"))
    with pytest.raises(ExpansionError, match=r"no parameters at attn\.c_proj, mlp\.c_proj"):
        Expansion("qwen2_moe", "model.layers", 4, (0, 2), others).apply(model)
    expand_blocks(model, [0, 2])
    assert model.config.mlp_only_layers == [2, 5]


def test_copied_blocks_share_the_configuration() -> None:
    model = tiny("gemma2")
    expand_blocks(model, [1])
    assert all(block.self_attn.config is model.config for block in model.model.layers)


def test_nested_text_part_is_expanded_and_not_the_vision_tower() -> None:
    text = tiny("gemma3_text").config.to_dict()
    vision = {"hidden_size": 32, "intermediate_size": 200, "num_attention_heads": 4, "num_hidden_layers": 4}
    config = hf.Gemma3Config(text_config=text, vision_config={**vision, "image_size": 8, "patch_size": 4})
    model = hf.Gemma3ForConditionalGeneration(config).eval()
    expansion = expand_blocks(model, [1])
    assert "vision" not in expansion.blocks_path
    assert model.config.text_config.num_hidden_layers == 5 and len(model.config.text_config.layer_types) == 5
    assert model.config.vision_config.num_hidden_layers == 4


def test_encoder_decoder_and_cross_attention_are_refused() -> None:
    sizes = {"vocab_size": 20, "d_model": 8, "d_ff": 8, "d_kv": 4, "num_heads": 2, "num_layers": 2}
    with pytest.raises(ExpansionError, match="encoder-decoder"):
        expand_blocks(hf.T5ForConditionalGeneration(hf.T5Config(**sizes)), 1)
    config = hf.GPT2Config(vocab_size=20, n_embd=8, n_head=2, n_layer=2, add_cross_attention=True)
    with pytest.raises(ExpansionError, match="cross-attention"):
        expand_blocks(hf.GPT2LMHeadModel(config), 1)


def test_outputs_that_are_not_numbers_are_refused_and_the_model_restored() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ExpansionError, match="not numbers"):
        expand_blocks(model, 2)
    assert len(model.model.layers) == model.config.num_hidden_layers == 4


def test_own_inputs_are_what_is_compared() -> None:
    model = tiny("llama")
    assert expand_blocks(model, 2, inputs={"input_ids": torch.tensor([[3, 4, 5]])}).positions == (1, 3)
    with pytest.raises(IndexError):
        expand_blocks(model, 2, inputs={"input_ids": torch.tensor([[4000]])})
    assert len(model.model.layers) == 6


def test_verification_includes_a_step_that_reads_the_cache() -> None:
    model = tiny("qwen2")
    inputs = probe_inputs(model)
    whole, step = observe(model, inputs)
    assert whole.shape[:2] == (3, 12) and step.shape[:2] == (3, 1)
    continued = torch.cat([inputs[0]["input_ids"], inputs[0]["input_ids"][:, -1:]], dim=1)
    mask = torch.cat([inputs[0]["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1)
    with torch.no_grad():
        expected = model(continued, attention_mask=mask, use_cache=False).logits[:, -1:]
    torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-4)
    assert len(observe(tiny("bert"), probe_inputs(tiny("bert")))) == 1


def test_model_without_padding_token_is_verified_row_by_row() -> None:
    model = tiny("llama_classifier")
    model.config.pad_token_id = None
    assert [batch["input_ids"].shape for batch in probe_inputs(model)] == [(1, 12)] * 3
    assert expand_blocks(model, 2).positions == (1, 3)


def test_model_of_other_inputs_needs_some_to_be_verified_on() -> None:
    model = tiny("llama")
    model.main_input_name = "input_features"
    with pytest.raises(ExpansionError, match="`inputs` are needed"):
        expand_blocks(model, 2)


def test_modes_of_the_modules_survive_verification() -> None:
    model = tiny("llama").train()
    model.model.layers[2].eval()
    expand_blocks(model, [2])
    assert [block.training for block in model.model.layers] == [True, True, False, False, True]


class ToyConfig(PreTrainedConfig):
    model_type = "toy_blocks"

    def __init__(self, kind: str = "writers", **values: Any) -> None:
        super().__init__(**values)
        self.kind, self.num_hidden_layers, self.vocab_size, self.pad_token_id = kind, 3, 20, 0


class ToyBlock(nn.Module):
    """A block of an architecture that no table knows, in four kinds."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        self.self_attn.o_proj, self.mlp.down_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        if kind == "norms":
            self.post_attention_layernorm, self.post_feedforward_layernorm = nn.RMSNorm(8), nn.RMSNorm(8)

    def forward(self, hidden: Tensor, index: int) -> Tensor:
        if self.kind == "index":  # the block's place decides what it does
            return self.norm(hidden) * (index + 1)
        attended, written = self.self_attn.o_proj(hidden), self.mlp.down_proj(hidden.tanh())
        if self.kind == "norms":
            attended = self.post_attention_layernorm(attended)
            written = self.post_feedforward_layernorm(written)
        output: Tensor = hidden + attended + written
        return self.norm(output) if self.kind == "post-norm" else output


class ToyModel(PreTrainedModel):
    config_class = ToyConfig
    main_input_name = "input_ids"

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(config.vocab_size, 8)
        self.stack = nn.ModuleList(ToyBlock(config.kind) for _ in range(config.num_hidden_layers))
        self.num_layers = config.num_hidden_layers
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor, return_dict: bool = True) -> BaseModelOutput:
        hidden = self.embedding(input_ids)
        for index in range(self.num_layers):
            hidden = self.stack[index](hidden, index)
        return BaseModelOutput(last_hidden_state=hidden)


@pytest.mark.parametrize(
    ("kind", "rule"),
    [("writers", "zero-writers"), ("norms", "norm-scale"), ("post-norm", "residual-gate")],
)
def test_unknown_architecture_is_tried_by_the_known_rules(kind: str, rule: str) -> None:
    model = ToyModel(ToyConfig(kind))
    perturb(model.named_parameters(), 0.2)
    assert expand_blocks(model, [0, 2]).rule.kind == rule
    assert len(model.stack) == model.num_layers == model.config.num_hidden_layers == 5


def test_unknown_architecture_that_fails_is_refused_with_the_reasons() -> None:
    model = ToyModel(ToyConfig("index"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ExpansionError, match=r"ToyModel cannot be expanded.*residual-gate.*outputs move by"):
        expand_blocks(model, [0])
    after = model.state_dict()
    assert before.keys() == after.keys() and model.config.num_hidden_layers == 3


def test_model_without_a_fitting_list_is_refused_with_what_was_found() -> None:
    model = ToyModel(ToyConfig())
    model.config.num_hidden_layers = 8
    with pytest.raises(ExpansionError, match=r"no list of 8 blocks.*stack \(3\)"):
        expand_blocks(model, 1)

"""The token gate: exact at both ends, the same with and without a cache, trained on its own features, saved, loaded."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from families import FAMILIES, GENERATIVE, PAD, VOCABULARY, batch, logits, perturb, tiny
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, StaticCache

from fedbe.adaptation.lora_layers import inject
from fedbe.errors import ExpansionError
from fedbe.expansion import (
    Expansion,
    TokenGate,
    base_tensor_names,
    enable_gradient_checkpointing,
    expand_blocks,
    find_gate,
    freeze,
    gate_adapters,
    gate_features,
    gate_loss,
    gate_parameter_names,
    head_parameter_names,
    install_gate,
    load,
    remove_gate,
    rescale,
    save_model,
    set_training_modes,
    without_blocks,
)
from fedbe.expansion.running_mean import mean_so_far
from fedbe.seeding import generator

CACHING = ("llama", "mistral", "gemma2", "gpt2", "bloom", "falcon", "opt_post_norm", "mixtral")
POSITIONS = [0, 2, 2]


def spread(gate: TokenGate, features: Tensor) -> None:
    """Give a gate random weights under which half of these tokens are open, some fully and some hardly."""
    gate.standardise(features)
    with torch.no_grad():
        gate.weight.copy_(torch.randn(gate.weight.shape, generator=generator(4)) / 20)
        threshold = gate(features).quantile(0.45)  # between two tokens
        gate.bias.fill_(1)
        gate.bias.copy_(-threshold / (gate(features).quantile(0.45) - threshold))


def gated(
    family: str, dtype: torch.dtype = torch.float32, block: int = 0, scale: float = 0.1
) -> tuple[PreTrainedModel, Expansion]:
    """Return an expanded model whose blocks have moved, with a gate that is half open on `batch`."""
    model = tiny(family, dtype)
    expansion = expand_blocks(model, [max(position, block) for position in POSITIONS])
    perturb((pair for module in expansion.blocks(model) for pair in module.named_parameters()), scale)
    gate = install_gate(model, expansion, TokenGate(32, block))
    spread(gate, gate_features(model, batch(model)))
    return model, expansion


def gate_of(model: PreTrainedModel) -> TokenGate:
    gate = find_gate(model)
    assert gate is not None
    return gate


def reference_features(model: PreTrainedModel, inputs: dict[str, Tensor], block: int = 0) -> Tensor:
    """The features by hand, from the hidden states that the model itself reports: a token and its prefix at a time."""
    mask = inputs.get("attention_mask")
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states[block + 1]
    mask = torch.ones(states.shape[:2]) if mask is None else mask
    causal, rows = gate_of(model).causal, []
    for row, kept in zip(states, mask.bool(), strict=True):
        real = row[kept]
        rows += [torch.cat([real[t], real[: t + 1 if causal else len(real)].mean(0)]) for t in range(len(real))]
    return torch.stack(rows)


# Exactness


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_shut_is_the_base_and_open_the_expanded_model_to_the_bit(family: str, dtype: torch.dtype) -> None:
    base = logits(tiny(family, dtype))
    model, _ = gated(family, dtype)
    gate = gate_of(model)
    found = {}
    for mode in ("shut", "open", "soft", "hard"):
        gate.mode = mode
        found[mode] = logits(model)
    remove_gate(model)
    expanded = logits(model)
    assert torch.equal(found["shut"], base) and torch.equal(found["open"], expanded)
    for mode in ("soft", "hard"):
        assert not torch.equal(found[mode], base) and not torch.equal(found[mode], expanded)
    assert not torch.equal(base, expanded)


@pytest.mark.parametrize("mode", ["soft", "hard"])
@pytest.mark.parametrize("bias, end", [(-1e4, "shut"), (1e4, "open")])
def test_saturated_gate_is_exact_as_well(mode: str, bias: float, end: str) -> None:
    model, _ = gated("llama", torch.bfloat16)
    gate = gate_of(model)
    gate.bias.data.fill_(bias)
    gate.mode = mode
    found = logits(model)
    gate.mode = end
    assert torch.equal(found, logits(model))


def test_a_token_of_a_shut_gate_passes_the_blocks_unchanged() -> None:
    model, expansion = gated("llama")
    gate = gate_of(model)
    gate.mode = "hard"
    index = expansion.expanded_indices[0]
    with torch.no_grad():
        states = model(**batch(model), output_hidden_states=True).hidden_states
    below, above = states[index], states[index + 1]
    shut = gate.opening == 0
    assert 0 < shut.sum() < shut.numel()
    assert torch.equal(above[shut], below[shut])
    assert (above[~shut] != below[~shut]).any(dim=-1).all()


def test_training_mode_is_open_and_gradients_reach_the_blocks() -> None:
    model, expansion = gated("llama")
    gate_of(model).mode = "shut"
    names = [name for name, _ in model.named_parameters() if name in gate_parameter_names(model)]
    set_training_modes(model, names)
    assert gate_of(model).training and not model.training
    inputs = batch(model)
    trained = model(**inputs).logits
    remove_gate(model)
    assert torch.equal(trained, model(**inputs).logits)
    assert expansion.blocks(model)[0].training is False


# Features and training


@pytest.mark.parametrize("family, block", [("llama", 0), ("gpt2", 1), ("bloom", 2), ("bert", 0), ("distilbert", 1)])
def test_features_are_a_tokens_own_and_the_mean_so_far(family: str, block: int) -> None:
    model, _ = gated(family, block=block)
    inputs = batch(model)
    expected = reference_features(model, inputs, block)
    assert gate_of(model).causal == (family not in ("bert", "distilbert"))
    torch.testing.assert_close(gate_features(model, inputs), expected)
    model(**inputs)
    torch.testing.assert_close(gate_of(model).features, expected)


@pytest.mark.parametrize("family", ["llama", "bert", "vit", "dinov2"])
def test_openings_are_the_logistic_function_of_the_features(family: str) -> None:
    model, _ = gated(family)
    inputs, gate = batch(model), gate_of(model)
    features = reference_features(model, inputs)
    logits(model)
    mask = inputs.get("attention_mask", torch.ones_like(gate.opening)).bool()
    torch.testing.assert_close(gate.opening[mask], gate(features).sigmoid(), atol=1e-4, rtol=1e-4)
    gate.mode = "hard"
    logits(model)
    assert torch.equal(gate.opening[mask], (gate(features) > 0).float())


def test_only_the_blocks_below_are_run_for_features() -> None:
    model, expansion = gated("llama", block=1)
    ran = []
    for index, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda *_, index=index: ran.append(index))
    expected = logits(model)
    ran.clear()
    gate_features(model, batch(model))
    assert ran == [0] and torch.equal(logits(model), expected)
    assert expansion.expanded_indices[0] == 2


@given(st.integers(1, 3), st.integers(1, 7), st.booleans(), st.integers(0, 10**6))
def test_mean_so_far_is_that_of_the_tokens_so_far(rows: int, length: int, causal: bool, seed: int) -> None:
    values = torch.randn(rows, length, 2, generator=generator(seed))
    mask = torch.rand(rows, length, generator=generator(seed, "mask")) < 0.7
    found = mean_so_far(values.masked_fill(~mask[..., None], torch.nan), mask, causal)
    for row in range(rows):
        for end in range(length):
            real = values[row, : end + 1 if causal else length][mask[row, : end + 1 if causal else length]]
            expected = real.mean(0) if len(real) else torch.zeros(2)
            torch.testing.assert_close(found[row, end], expected)


def test_standardised_features_have_mean_zero_and_deviation_one_but_where_they_hardly_move() -> None:
    gate = TokenGate(2)
    features = torch.randn(1000, 4, generator=generator(0)) * torch.tensor([3.0, 1.0, 0.5, 1e-9]) + 7
    gate.standardise(features)
    standard = (features - gate.mean) / gate.scale
    gate.weight.data.normal_(generator=generator(1))
    gate.bias.data.fill_(0.3)
    torch.testing.assert_close(
        gate(features), 4096 / 4 * (standard @ gate.weight + 2 * gate.bias), rtol=1e-4, atol=1e-2
    )
    assert torch.allclose(standard.mean(0), torch.zeros(4), atol=1e-4)
    assert torch.allclose(standard.std(0)[:3], torch.ones(3), atol=1e-2) and standard.std(0)[3] < 1e-3


@pytest.mark.parametrize("openness", [0.5, 0.8])
def test_loss_is_balanced_cross_entropy_and_reaches_the_gate_only(openness: float) -> None:
    model, _ = gated("llama")
    gate, inputs = gate_of(model), batch(model)
    positive = gate_features(model, inputs)
    negative = positive[:5] + 1
    logit = torch.cat([gate(positive), gate(negative)])
    target = torch.cat([torch.ones(len(positive)), torch.zeros(5)])
    weight = torch.cat([torch.full((len(positive),), openness / len(positive)), torch.full((5,), (1 - openness) / 5)])
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logit, target, weight, reduction="sum")
    found = gate_loss(gate, positive, negative, openness)
    torch.testing.assert_close(found, expected)
    found.backward()
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(gate_parameter_names(model))


def test_gate_learns_in_a_forward_hook_beside_the_model() -> None:
    # Two kinds of text: low and high token ids. The client's pass gives the positive features by the way.
    model, _ = gated("llama")
    gate = gate_of(model)
    low = torch.randint(3, 20, (8, 14), generator=generator(5))
    high = torch.randint(28, VOCABULARY, (8, 14), generator=generator(6))
    negative = gate_features(model, {"input_ids": high})
    gate.standardise(negative)
    gate.weight.data.zero_()
    gate.bias.data.zero_()

    def add_gate_loss(module: torch.nn.Module, arguments: Any, output: Any) -> None:
        output.loss = output.loss + gate_loss(gate, gate.features, negative)

    names = [*gate_parameter_names(model), *(name for name, _ in model.named_parameters() if ".layers.1." in name)]
    freeze(model, names)
    set_training_modes(model, names)
    hook = model.register_forward_hook(add_gate_loss)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        model(input_ids=low, labels=low).loss.backward()
        optimizer.step()
    hook.remove()
    model.eval()
    gate.mode = "hard"
    openings = []
    for ids in (low, high):
        with torch.no_grad():
            model(input_ids=ids)
        openings.append(gate.opening.mean())
    assert openings[0] > 0.9 and openings[1] < 0.1


# Names and structure


def test_parameters_have_fixed_names_and_belong_to_no_head_and_no_base() -> None:
    model, expansion = gated("bert")
    assert gate_parameter_names(model) == ("bert.token_gate.weight", "bert.token_gate.bias")
    assert not set(gate_parameter_names(model)) & set(head_parameter_names(model))
    assert not any("token_gate" in name for name in base_tensor_names(model, expansion))
    assert {gate_of(gated("bert", torch.bfloat16)[0]).weight.dtype} == {torch.float32}


def test_removed_gate_leaves_nothing_and_goes_back_in() -> None:
    model, expansion = gated("llama")
    expected, names = logits(model), set(model.state_dict())
    gate = remove_gate(model)
    assert find_gate(model) is None and not any("token_gate" in name for name in model.state_dict())
    assert not any(block._forward_hooks for block in model.model.layers)
    install_gate(model, expansion, gate)
    assert torch.equal(logits(model), expected) and set(model.state_dict()) == names


def test_copy_of_a_model_has_a_gate_of_its_own() -> None:
    model, _ = gated("llama")
    expected = logits(model)
    model.get_parameter("lm_head.weight").requires_grad_(True)
    model(**batch(model))  # a pass with gradients is under way
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), expected)
    gate_of(twin).mode = "shut"
    assert torch.equal(logits(model), expected) and not torch.equal(logits(twin), expected)
    remove_gate(twin)
    assert torch.equal(logits(model), expected)


def test_gate_does_not_touch_the_base_model_within() -> None:
    base = logits(tiny("llama"))
    model, expansion = gated("llama")
    with without_blocks(model, expansion):
        assert torch.equal(logits(model), base)


@pytest.mark.parametrize("block", [1, 4, -1])
def test_expanded_block_below_what_the_gate_sees_is_refused(block: int) -> None:
    model = tiny("llama")
    expansion = expand_blocks(model, [0, 3])
    with pytest.raises(ExpansionError, match=f"`block` = {block}.* from 0 to 0: all that is gated must lie above"):
        install_gate(model, expansion, TokenGate(32, block))
    assert find_gate(model) is None and not model.model.layers[0]._forward_hooks


def test_mistakes_are_named() -> None:
    model, expansion = gated("llama")
    with pytest.raises(ExpansionError, match="has a gate already"):
        install_gate(model, expansion)
    with pytest.raises(ExpansionError, match="one of open, shut, soft, hard"):
        gate_of(model).mode = "ajar"
    gate = remove_gate(model)
    with pytest.raises(ExpansionError, match="has seen no tokens"):
        _ = gate.features
    for function in (remove_gate, lambda model: gate_features(model, batch(model))):
        with pytest.raises(ExpansionError, match="has no gate"):
            function(model)
    with pytest.raises(ExpansionError, match=r"width of 8, the model's is 32"):
        install_gate(model, expansion, TokenGate(8))
    gate = install_gate(model, expansion)
    ids = batch(model)["input_ids"]
    with pytest.raises(ExpansionError, match=r"`attention_mask` as \[batch, sequence\]"):
        model(input_ids=ids, attention_mask=torch.ones(3, 1, 14, 14, dtype=torch.bool))


# Generation with a cache


def prompt(rows: int = 2) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (rows, 6), generator=generator(7))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], **options: object) -> Tensor:
    return model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=PAD, **options)


@pytest.mark.parametrize("mode", ["soft", "hard"])
@pytest.mark.parametrize("family", CACHING)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_the_same_with_and_without_a_cache(family: str, mode: str, beams: int) -> None:
    assert family in GENERATIVE
    model, _ = gated(family, scale=0.7)
    gate_of(model).mode = mode
    cached = generate(model, prompt(), num_beams=beams)
    assert torch.equal(cached, generate(model, prompt(), num_beams=beams, use_cache=False))
    # It is the gate's generation: otherwise this would say nothing about the cache.
    gate_of(model).mode = "open"
    assert not torch.equal(cached, generate(model, prompt(), num_beams=beams))


@pytest.mark.parametrize("beams", [1, 3])
def test_left_padded_row_generates_what_it_does_alone(beams: int) -> None:
    model, _ = gated("llama")
    gate_of(model).mode = "hard"
    together = generate(model, prompt(), num_beams=beams)
    for row, start in ((0, 3), (1, 0)):
        alone = {"input_ids": prompt()["input_ids"][row : row + 1, start:]}
        assert torch.equal(together[row, start:], generate(model, alone, num_beams=beams)[0])


@pytest.mark.parametrize("family", CACHING)
def test_token_by_token_has_the_openings_of_one_pass(family: str) -> None:
    model, _ = gated(family)
    gate, inputs = gate_of(model), batch(model)
    inputs = {name: tensor[:2] for name, tensor in inputs.items()}  # whole, and padded on the left
    with torch.no_grad():
        expected = model(**inputs).logits
        openings = gate.opening
        cache = DynamicCache()  # makes its layers one by one
        for start, end in ((0, 5), (5, 6), (6, 9), (9, 14)):
            out = model(
                input_ids=inputs["input_ids"][:, start:end],
                attention_mask=inputs["attention_mask"][:, :end],
                cache=cache,
                use_cache=True,
            )
            torch.testing.assert_close(gate.opening[0], openings[0, start:end], atol=1e-4, rtol=1e-4)
            kept = inputs["attention_mask"][1, start:end].bool()
            torch.testing.assert_close(gate.opening[1][kept], openings[1, start:end][kept], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.logits[0], expected[0, 9:], atol=1e-3, rtol=1e-3)


def test_cache_can_be_cropped_reordered_repeated_and_selected() -> None:
    model, _ = gated("llama")
    gate, ids = gate_of(model), batch(model)["input_ids"]
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).cache
        cache.crop(-4)
        cache.reorder_cache(torch.tensor([2, 0, 1]))
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([0, 2, 5]))
        rows = ids[[2, 0, 1]]
        model(input_ids=rows[:, 10:], cache=cache, use_cache=True)
        found = gate.opening
        model(input_ids=rows)
    torch.testing.assert_close(found, gate.opening[:, 10:])


def test_prompt_lookup_generates_the_same() -> None:
    model, _ = gated("llama")
    gate_of(model).mode = "hard"
    inputs = {"input_ids": torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])}
    assert torch.equal(generate(model, inputs, prompt_lookup_num_tokens=3), generate(model, inputs))


def test_model_may_stop_and_go_on_with_its_cache() -> None:
    model, _ = gated("llama")
    inputs = {"input_ids": prompt()["input_ids"][1:]}
    whole = generate(model, inputs)
    first = model.generate(**inputs, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    rest = model.generate(first.sequences, cache=first.cache, max_new_tokens=7, do_sample=False, pad_token_id=PAD)
    assert torch.equal(rest, whole)


def test_cache_that_the_gate_has_not_seen_is_refused() -> None:
    model, _ = gated("llama")
    gate, ids = gate_of(model), batch(model)["input_ids"]
    gate.mode = "open"
    cache = model(input_ids=ids, use_cache=True).cache
    gate.mode = "soft"
    with pytest.raises(ExpansionError, match="begin with an empty cache"):
        model(input_ids=ids[:, :1], cache=cache, use_cache=True)


def test_a_mask_that_does_not_say_what_is_padding_is_refused() -> None:
    model, _ = gated("llama")
    ids = prompt()["input_ids"]
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril().expand(len(ids), 1, -1, -1)
    with pytest.raises(ExpansionError, match="generate with the default cache"):
        model(input_ids=ids, attention_mask=causal)


def test_static_cache_holds_the_sums_and_generation_with_one_is_right_or_refused() -> None:
    model, _ = gated("llama")
    gate, ids = gate_of(model), batch(model)["input_ids"]
    cache = StaticCache(config=model.config, max_cache_len=20)
    with torch.no_grad():
        model(input_ids=ids)
        expected = gate.opening
        model(input_ids=ids[:, :9], cache=cache)
        model(input_ids=ids[:, 9:], cache=cache)
    torch.testing.assert_close(gate.opening, expected[:, 9:])
    try:
        generated = generate(model, prompt(), cache_implementation="static")
    except ExpansionError as error:  # transformers gave the model another mask than that of the padding
        assert "generate with the default cache" in str(error)
    else:
        assert torch.equal(generated, generate(model, prompt()))


def test_gradient_checkpointing_changes_nothing() -> None:
    model, _ = gated("llama")
    inputs, names = batch(model), [n for n, _ in model.named_parameters() if ".layers.1." in n]
    freeze(model, names)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(**inputs, use_cache=False).logits.float().square().mean().backward()
        gradients.append([model.get_parameter(name).grad.clone() for name in names])
        enable_gradient_checkpointing(model)
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))
    assert any(gradient.any() for gradient in gradients[0])


# Files


@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "bert", "opt_post_norm", "vit"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gated_model_is_saved_and_loaded(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, expansion = gated(family, dtype)
    gate_of(model).mode = "hard"
    expected = logits(model)
    report = save_model(model, expansion, tmp_path / "model")
    assert "without it the blocks are open to all tokens (g = 1)" in report.reason
    assert torch.equal(logits(model), expected)
    loaded = load(tmp_path / "model")
    assert torch.equal(logits(loaded), expected)
    assert gate_of(loaded).to_dict() == {"hidden_size": 32, "block": 0, "mode": "hard"}
    for name, tensor in gate_of(model).state_dict().items():
        assert torch.equal(gate_of(loaded).state_dict()[name], tensor)
    if family in GENERATIVE:
        assert torch.equal(generate(loaded, prompt()), generate(model, prompt()))


def test_plain_loading_is_the_expanded_model_with_the_gate_open(tmp_path: Path) -> None:
    model, expansion = gated("llama")
    report = save_model(model, expansion, tmp_path / "model")
    gate_of(model).mode = "open"
    assert report.plain
    plain, notes = hf.AutoModelForCausalLM.from_pretrained(report.directory, output_loading_info=True)
    assert torch.equal(logits(plain), logits(model))
    assert notes["unexpected_keys"] == {"only_fedbe_load_puts_in.token_gate"} and not notes["missing_keys"]


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_gate_survives_a_new_dial_and_dial_zero_is_the_base(family: str, tmp_path: Path) -> None:
    model, expansion = gated(family)
    save_model(model, expansion, tmp_path / "model")
    rescale(tmp_path / "model", tmp_path / "half", 0.5)
    save_model(model, expansion, tmp_path / "direct", dial=0.5)
    assert torch.equal(logits(load(tmp_path / "half")), logits(load(tmp_path / "direct")))
    assert find_gate(load(tmp_path / "half")) is not None
    rescale(tmp_path / "model", tmp_path / "zero", 0)
    assert torch.equal(logits(load(tmp_path / "zero")), logits(tiny(family)))


def test_model_without_a_gate_says_so(tmp_path: Path) -> None:
    model, expansion = gated("llama")
    remove_gate(model)
    report = save_model(model, expansion, tmp_path / "model")
    assert "gate" not in report.reason and not (tmp_path / "model" / "token_gate.safetensors").exists()
    assert json.loads((tmp_path / "model" / "fedbe.json").read_text())["gate"] is None
    assert find_gate(load(tmp_path / "model")) is None


# Adapters


def adapted(family: str, layers: list[str]) -> PreTrainedModel:
    model = tiny(family)
    inject(model, layers, LoraConfig(r=2, lora_alpha=4), batch(model))
    perturb(((name, p) for name, p in model.named_parameters() if ".lora_" in name), 0.3)
    return model


LAYERS = {
    "llama": [f"model.layers.{i}.{name}" for i in (1, 3) for name in ("self_attn.q_proj", "mlp.down_proj")],
    "gpt2": [f"transformer.h.{i}.{name}" for i in (1, 2) for name in ("attn.c_attn", "mlp.c_fc")],
    "bert": [f"bert.encoder.layer.{i}.output.dense" for i in (1, 3)],
}


@pytest.mark.parametrize("family", sorted(LAYERS))
def test_gated_adapters_are_exact_at_both_ends(family: str) -> None:
    base = logits(tiny(family))
    model = adapted(family, LAYERS[family])
    plain = logits(model)
    gate = install_gate(model, None)
    gate_adapters(model, gate, LAYERS[family])
    spread(gate, gate_features(model, batch(model)))
    found = {}
    for mode in ("open", "shut", "soft"):
        gate.mode = mode
        found[mode] = logits(model)
    assert torch.equal(found["open"], plain) and torch.equal(found["shut"], base)
    assert not torch.equal(found["soft"], plain) and not torch.equal(found["soft"], base)
    remove_gate(model)
    assert torch.equal(logits(model), plain)


def test_adapters_product_is_multiplied_by_each_tokens_opening() -> None:
    name = "model.layers.3.mlp.down_proj"
    model = adapted("llama", [name])
    gate = install_gate(model, None)
    gate_adapters(model, gate, [name])
    spread(gate, gate_features(model, batch(model)))
    seen = {}
    layer = model.get_submodule(name)
    layer.register_forward_hook(lambda module, args, output: seen.update(x=args[0], y=output))
    logits(model)
    adapter = 2.0 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight @ seen["x"][..., None]
    expected = layer.base_layer(seen["x"]) + gate.opening[..., None] * adapter[..., 0]
    torch.testing.assert_close(seen["y"], expected)


def test_adapted_model_generates_the_same_with_and_without_a_cache() -> None:
    model = adapted("llama", LAYERS["llama"])
    gate = install_gate(model, None)
    gate_adapters(model, gate, LAYERS["llama"])
    spread(gate, gate_features(model, batch(model)))
    assert torch.equal(generate(model, prompt()), generate(model, prompt(), use_cache=False))


def test_adapter_that_the_gate_cannot_shut_off_is_refused() -> None:
    low = "model.layers.0.mlp.down_proj"
    model = adapted("llama", [*LAYERS["llama"], low])
    gate = install_gate(model, None)
    with pytest.raises(ExpansionError, match=r"layers\.0\.mlp\.down_proj` cannot be gated.* above block 0"):
        gate_adapters(model, gate, [*LAYERS["llama"], low])
    assert not any(module._forward_hooks for name, module in model.named_modules() if "lora_B" in name)
    with pytest.raises(ExpansionError, match="has no adapter to gate"):
        gate_adapters(model, gate, ["model.layers.2.mlp.down_proj"])

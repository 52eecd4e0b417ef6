"""Names, freeze masks, training modes and gradient checkpointing."""

import copy
from collections.abc import Iterator

import pytest
import torch
import transformers as hf
from families import FAMILIES, batch, logits, loss, perturb, tiny
from transformers import PreTrainedModel

from fedbe.errors import ExpansionError
from fedbe.expansion import (
    Expansion,
    base_tensor_names,
    block_parameter_names,
    enable_gradient_checkpointing,
    expand_blocks,
    freeze,
    head_parameter_names,
    set_training_modes,
)
from fedbe.seeding import isolated_rng

DROPPING = ["llama", "phi3", "stablelm", "gpt2", "gpt_neox", "falcon", "bloom", "opt", "bert", "distilbert", "vit"]


def prepared(family: str, position: int = 1) -> tuple[PreTrainedModel, Expansion, tuple[str, ...]]:
    """Return a model whose only trained block sits above one position and already does something."""
    model = tiny(family)
    expansion = expand_blocks(model, [position])
    perturb((pair for block in expansion.blocks(model) for pair in block.named_parameters()), 0.1)
    names = block_parameter_names(model, expansion)[0]
    freeze(model, names)
    return model, expansion, names


def gradients(model: PreTrainedModel) -> Iterator[torch.Tensor]:
    model.zero_grad()
    with isolated_rng(5):
        loss(model).backward()  # type: ignore[no-untyped-call]
    return (p.grad.clone() for p in model.parameters() if p.grad is not None)


def test_block_two_is_not_confused_with_block_twenty() -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 24}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=16, num_key_value_heads=2, pad_token_id=0, **sizes))
    expansion = expand_blocks(model, [1, 18])
    assert expansion.expanded_indices == (2, 20)
    names = block_parameter_names(model, expansion)
    assert all(name.startswith("model.layers.2.") for name in names[0])
    assert all(name.startswith("model.layers.20.") for name in names[1])
    freeze(model, names[0])
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 9 and tuple(trainable) == names[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_names_are_exactly_those_of_the_inserted_blocks(family: str) -> None:
    model = tiny(family)
    base = set(dict(tiny(family).named_parameters()))
    expansion = expand_blocks(model, [0, 2])
    names = [name for block in block_parameter_names(model, expansion).values() for name in block]
    assert len(set(names)) == len(names)
    mapped = base_tensor_names(model, expansion)
    rest = set(dict(model.named_parameters())) - set(names)
    assert {mapped[name] for name in rest} == base
    gated = expansion.rule.gated
    assert sum(name.endswith("residual_gate") for name in names) == (2 if gated else 0)


def test_frozen_tensors_map_to_the_tensors_of_the_base() -> None:
    base, model = tiny("gpt2").state_dict(), tiny("gpt2")
    expansion = expand_blocks(model, [0, 0, 3])
    perturb((pair for block in expansion.blocks(model) for pair in block.named_parameters()), 0.1)
    mapped, state = base_tensor_names(model, expansion), model.state_dict()
    assert set(mapped.values()) == set(base)
    assert all(torch.equal(state[name], base[origin]) for name, origin in mapped.items())


@pytest.mark.parametrize(
    ("family", "head"),
    [
        ("bert", {"classifier.weight", "classifier.bias"}),
        ("distilbert", {f"{m}.{p}" for m in ("pre_classifier", "classifier") for p in ("weight", "bias")}),
        ("llama_classifier", {"score.weight"}),
        ("vit", {"classifier.weight", "classifier.bias"}),
        ("llama", set()),
        ("llama_tied", set()),
        ("bert_masked", set()),
    ],
)
def test_head_is_what_lies_outside_the_base_model(family: str, head: set[str]) -> None:
    assert set(head_parameter_names(tiny(family))) == head


def test_base_model_alone_has_no_head() -> None:
    assert head_parameter_names(tiny("bert").base_model) == ()


def test_freezing_drops_gradients_and_refuses_unknown_names() -> None:
    model, _, names = prepared("llama")
    loss(model).backward()  # type: ignore[no-untyped-call]
    freeze(model, ["model.norm.weight"])
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["model.norm.weight"]
    for function in (freeze, set_training_modes):
        with pytest.raises(ExpansionError, match=r"`trainable_names` holds 'model\.layers\.99\.x'"):
            function(model, [*names, "model.layers.99.x"])


@pytest.mark.parametrize("checkpointing", ["none", "ours", "transformers"])
@pytest.mark.parametrize("family", DROPPING)
def test_frozen_blocks_apply_no_dropout(family: str, checkpointing: str) -> None:
    model, expansion, names = prepared(family)
    expected = logits(model)
    if checkpointing == "ours":
        enable_gradient_checkpointing(model)
    elif checkpointing == "transformers":
        model.activation_checkpointing_enable()
    set_training_modes(model, names)
    trained = expansion.blocks(model)[0]
    assert all(module.training for module in trained.modules())
    with isolated_rng(1):
        assert not torch.equal(outputs_with_grad(model), expected)
    trained.eval()
    with isolated_rng(1):
        assert torch.equal(outputs_with_grad(model), expected)


def outputs_with_grad(model: PreTrainedModel) -> torch.Tensor:
    output: torch.Tensor = model(**batch(model)).logits
    assert output.requires_grad
    return output


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_under_checkpointing_are_the_same(family: str) -> None:
    model, _, names = prepared(family)
    model.config.use_cache = False  # a cache changes the layout of keys in memory, and with it the last bits
    set_training_modes(model, names)
    plain = list(gradients(model))
    enable_gradient_checkpointing(model)
    checkpointed = list(gradients(model))
    assert len(plain) == len(names) == len(checkpointed)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(plain, checkpointed, strict=True))


@pytest.mark.parametrize("switched_on_by", ["ours", "transformers"])
@pytest.mark.parametrize("family", ["opt", "gpt2", "bert"])
def test_blocks_are_recomputed_from_the_lowest_trained_one_up(family: str, switched_on_by: str) -> None:
    model, expansion, names = prepared(family, position=1)
    if switched_on_by == "ours":
        enable_gradient_checkpointing(model)
    else:
        model.activation_checkpointing_enable()
    set_training_modes(model, names)
    calls = dict.fromkeys(range(5), 0)

    def counter(index: int) -> None:
        norm = next(m for m in blocks[index].modules() if isinstance(m, torch.nn.LayerNorm))
        norm.register_forward_hook(lambda *_: calls.update({index: calls[index] + 1}))

    blocks = model.get_submodule(expansion.blocks_path)
    for index in range(5):
        counter(index)
    loss(model).backward()  # type: ignore[no-untyped-call]
    assert calls == {0: 1, 1: 1, 2: 2, 3: 2, 4: 2}


def test_copies_of_a_checkpointed_model_run_their_own_blocks() -> None:
    model, expansion, names = prepared("llama")
    enable_gradient_checkpointing(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        expansion.blocks(twin)[0].mlp.down_proj.weight.zero_()
    set_training_modes(model, names)
    set_training_modes(twin, names)
    first = list(gradients(model))
    second = list(gradients(twin))
    assert len(first) == len(second) == len(names)
    assert not torch.equal(logits(twin), logits(model))


def test_expanding_after_checkpointing_gives_the_copies_their_own_forward() -> None:
    model = tiny("llama")
    enable_gradient_checkpointing(model)
    before = logits(model)
    expansion = expand_blocks(model, [1])
    perturb((pair for block in expansion.blocks(model) for pair in block.named_parameters()), 0.1)
    assert not torch.equal(logits(model), before)


def test_head_trains_with_its_dropout_and_the_rest_rests() -> None:
    model, expansion, names = prepared("bert")
    set_training_modes(model, (*names, *head_parameter_names(model)))
    training = {name for name, module in model.named_modules() if module.training}
    block = f"{expansion.blocks_path}.2"
    assert {"dropout", "classifier", block} <= training
    assert all(name in {"dropout", "classifier"} or name.startswith(block) for name in training)


def test_single_module_outside_the_blocks_trains_alone() -> None:
    model = tiny("gpt2")
    set_training_modes(model, ["transformer.ln_f.weight"])
    assert [name for name, module in model.named_modules() if module.training] == ["transformer.ln_f"]


def test_full_fine_tuning_trains_every_module() -> None:
    model = tiny("gpt2")
    set_training_modes(model, dict(model.named_parameters()))
    assert all(module.training for module in model.modules())

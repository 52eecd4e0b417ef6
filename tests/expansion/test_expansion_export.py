"""What is saved, and whether it loads with and without this project."""

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from families import FAMILIES, GATED, logits, perturb, tiny
from transformers import PreTrainedModel

from fedbe.errors import ConfigError, ExpansionError
from fedbe.expansion import Expansion, expand_blocks, head_parameter_names, load, read_expansion, rescale, save_model


def learned(family: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, Expansion, torch.Tensor]:
    """Return an expanded model whose blocks have moved, and the base model's logits."""
    model = tiny(family, dtype)
    base = logits(model)
    expansion = expand_blocks(model, [0, 2, 2])
    perturb((pair for block in expansion.blocks(model) for pair in block.named_parameters()), 0.1)
    return model, expansion, base


def plainly_loaded(directory: Path) -> PreTrainedModel:
    name = json.loads((directory / "fedbe.json").read_text())["auto_class"]
    assert name.startswith("AutoModel")
    model: PreTrainedModel = getattr(hf, name).from_pretrained(directory)
    return model


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - GATED))
def test_plain_checkpoint_loads_without_the_project(family: str, tmp_path: Path) -> None:
    model, expansion, base = learned(family)
    expected, state = logits(model), {n: t.clone() for n, t in model.state_dict().items()}
    report = save_model(model, expansion, tmp_path / "model")
    assert report.plain, report.reason
    loaded = plainly_loaded(report.directory)
    assert torch.equal(logits(loaded), expected) and not torch.equal(expected, base)
    assert loaded.config.get_text_config().num_hidden_layers == 7
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert read_expansion(report.directory) == expansion
    assert not (report.directory / "expanded_blocks.safetensors").exists()


@pytest.mark.parametrize("family", sorted(GATED))
def test_gated_model_loads_through_the_project_and_plainly_as_its_base(family: str, tmp_path: Path) -> None:
    model, expansion, base = learned(family)
    expected = logits(model)
    report = save_model(model, expansion, tmp_path / "model")
    assert not report.plain and "residual gate" in report.reason and "fedbe.load" in report.reason
    assert torch.equal(logits(load(report.directory)), expected)
    assert torch.equal(logits(plainly_loaded(report.directory)), base)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("family", ["llama", "olmo2", "gemma2", "mixtral", "gpt2", "bert", "vit"])
def test_dial_zero_export_is_the_base_model(family: str, tmp_path: Path) -> None:
    model, expansion, base = learned(family)
    expected = logits(model)
    save_model(model, expansion, tmp_path / "zero", dial=0)
    assert torch.equal(logits(load(tmp_path / "zero")), base)
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("family", ["llama_tied", "gemma2", "mixtral", "bert"])
def test_rescaled_export_equals_scaling_in_memory(family: str, tmp_path: Path) -> None:
    model, expansion, _ = learned(family)
    save_model(model, expansion, tmp_path / "model")
    save_model(model, expansion, tmp_path / "direct", dial=0.8)
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    report = rescale(tmp_path / "model", tmp_path / "rescaled", 0.8)
    result = logits(load(tmp_path / "rescaled"))
    assert torch.equal(result, logits(load(tmp_path / "direct")))
    assert not torch.equal(result, logits(model))
    assert (report.directory / "tokenizer.json").read_text() == "{}"
    with pytest.raises(ConfigError, match=r"scaled by 0\.8 already"):
        rescale(tmp_path / "rescaled", tmp_path / "again", 0.5)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_dtype_is_that_of_the_checkpoint_unless_asked_for(family: str, tmp_path: Path) -> None:
    model, expansion, _ = learned(family, torch.bfloat16)
    save_model(model, expansion, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(logits(loaded), logits(model))
    assert {p.dtype for p in load(tmp_path / "model", torch.float32).parameters()} == {torch.float32}


@pytest.mark.parametrize("family", ["bert", "llama_classifier"])
def test_trained_head_is_saved(family: str, tmp_path: Path) -> None:
    model, expansion, _ = learned(family)
    head = set(head_parameter_names(model))
    perturb(((n, p) for n, p in model.named_parameters() if n in head), 0.5)
    save_model(model, expansion, tmp_path / "model")
    assert torch.equal(logits(load(tmp_path / "model")), logits(model))


def test_plain_loading_that_would_change_the_outputs_is_noticed(tmp_path: Path) -> None:
    # This GPT-2 divides attention by the index of the block: a rebuilt block would divide by its new index.
    config = hf.GPT2Config(vocab_size=48, n_embd=32, n_head=4, n_layer=4, pad_token_id=0)
    config.scale_attn_by_inverse_layer_idx = True
    model = hf.GPT2LMHeadModel(config)
    perturb(model.named_parameters(), 0.2)
    expansion = expand_blocks(model, [0])
    perturb((pair for block in expansion.blocks(model) for pair in block.named_parameters()), 0.1)
    report = save_model(model, expansion, tmp_path / "model")
    assert not report.plain and "`scaling` of block 1.attn" in report.reason
    assert torch.equal(logits(load(tmp_path / "model")), logits(model))


def test_dropout_set_by_hand_does_not_stand_in_the_way(tmp_path: Path) -> None:
    model, expansion, _ = learned("opt")
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.3
    assert save_model(model, expansion, tmp_path / "model").plain


def test_generation_settings_and_tokenizer_go_along(tmp_path: Path) -> None:
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=_tokenizer(), pad_token="<pad>")
    model, expansion, _ = learned("llama_tied")
    model.generation_config.max_new_tokens = 17
    save_model(model, expansion, tmp_path / "model", tokenizer)
    rescale(tmp_path / "model", tmp_path / "half", 0.5)
    for folder in ("model", "half"):
        loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / folder)
        assert loaded.generation_config.max_new_tokens == 17
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert hf.AutoTokenizer.from_pretrained(tmp_path / folder)("a b")["input_ids"] == [1, 2]


def _tokenizer() -> object:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "a": 1, "b": 2}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def test_full_target_is_left_alone(tmp_path: Path) -> None:
    model, expansion, _ = learned("llama")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("keep")
    with pytest.raises(ConfigError, match=r"directory = .*full.*new or empty folder"):
        save_model(model, expansion, tmp_path / "full")
    assert [file.name for file in (tmp_path / "full").iterdir()] == ["precious.txt"]
    (tmp_path / "empty").mkdir()
    assert save_model(model, expansion, tmp_path / "empty").plain


def test_bad_dial_and_missing_model_are_reported_before_anything_is_written(tmp_path: Path) -> None:
    model, expansion, _ = learned("llama")
    with pytest.raises(ExpansionError, match="`dial` = -1"):
        save_model(model, expansion, tmp_path / "model", dial=-1)
    for function in (load, read_expansion, lambda path: rescale(path, tmp_path / "to", 1.0)):
        with pytest.raises(ConfigError, match=r"fedbe\.json"):
            function(tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []


def test_blocks_of_another_expansion_are_refused(tmp_path: Path) -> None:
    model, expansion, _ = learned("bert")
    save_model(model, expansion, tmp_path / "model")
    description = json.loads((tmp_path / "model" / "fedbe.json").read_text())
    description["expansion"]["positions"] = [0, 1, 2]
    (tmp_path / "model" / "fedbe.json").write_text(json.dumps(description))
    with pytest.raises(ExpansionError, match="belongs to another expansion"):
        load(tmp_path / "model")

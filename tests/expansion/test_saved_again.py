"""A loaded model saved by transformers' own method is all there; what plain transformers leaves out says so."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
import transformers as hf
from families import logits, perturb, tiny
from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from fedbe.errors import ConfigError
from fedbe.expansion import (
    Expansion,
    TokenGate,
    expand_blocks,
    find_gate,
    install_gate,
    load,
    read_expansion,
    remove_blocks,
    remove_gate,
    rescale,
    save_model,
)
from fedbe.modeling.weights import weights_fault


def learned(family: str, gate: bool) -> tuple[PreTrainedModel, Expansion]:
    """Return an expanded model whose blocks have moved, behind a gate that tells tokens apart, or without."""
    model = tiny(family)
    expansion = expand_blocks(model, [0, 2])
    perturb((pair for block in expansion.blocks(model) for pair in block.named_parameters()), 0.1)
    if gate:
        unit: TokenGate = install_gate(model, expansion)
        perturb(unit.named_parameters(), 0.05)
    return model, expansion


KINDS = [
    ("llama_tied", False),
    ("llama", True),
    ("mixtral", True),
    ("roberta", False),
    ("roberta", True),
    ("vit", True),
]


@pytest.mark.parametrize(("family", "gate"), KINDS)
@pytest.mark.parametrize("dial", [1.0, 0.5])
def test_a_loaded_model_saves_all_of_itself(family: str, gate: bool, dial: float, tmp_path: Path) -> None:
    save_model(*learned(family, gate), tmp_path / "model", dial=dial)
    loaded = load(tmp_path / "model")
    expected = logits(loaded)
    loaded.save_pretrained(tmp_path / "saved", max_shard_size="40KB")
    again = load(tmp_path / "saved")
    assert torch.equal(logits(again), expected) and torch.equal(logits(loaded), expected)
    assert (find_gate(again) is not None) == gate
    described = [json.loads((tmp_path / name / "fedbe.json").read_text()) for name in ("model", "saved")]
    assert described[0] == described[1] and described[0]["dial"] == dial
    assert (tmp_path / "saved" / "README.md").read_text() == (tmp_path / "model" / "README.md").read_text()
    again.save_pretrained(tmp_path / "third")
    assert torch.equal(logits(load(tmp_path / "third")), expected)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_saves_itself_and_not_the_original(duplicate, tmp_path: Path) -> None:
    save_model(*learned("llama", False), tmp_path / "model")
    loaded = load(tmp_path / "model")
    other = duplicate(loaded)
    perturb(other.named_parameters(), 0.1)
    other.save_pretrained(tmp_path / "other")
    assert torch.equal(logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "other")), logits(other))
    assert not torch.equal(logits(other), logits(loaded))


def test_a_dial_that_was_turned_before_is_still_known(tmp_path: Path) -> None:
    save_model(*learned("llama", True), tmp_path / "model", dial=0.5)
    save_model(load(tmp_path / "model"), read_expansion(tmp_path / "model"), tmp_path / "again")
    assert json.loads((tmp_path / "again" / "fedbe.json").read_text())["dial"] == 0.5
    with pytest.raises(ConfigError, match=r"scaled by 0\.5 already"):
        rescale(tmp_path / "again", tmp_path / "third", 0.5)


def test_what_was_taken_out_of_a_loaded_model_stays_out(tmp_path: Path) -> None:
    model, expansion = learned("llama", True)
    save_model(model, expansion, tmp_path / "model")
    loaded = load(tmp_path / "model")
    remove_gate(loaded)
    expected = logits(loaded)
    loaded.save_pretrained(tmp_path / "open")
    plain, notes = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "open", output_loading_info=True)
    assert torch.equal(logits(plain), expected) and not notes["unexpected_keys"]
    remove_blocks(loaded, expansion)
    loaded.save_pretrained(tmp_path / "base")
    assert torch.equal(logits(hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")), logits(tiny("llama")))
    assert not (tmp_path / "base" / "fedbe.json").exists()


def test_it_is_not_sent_to_the_hub_without_its_parts(tmp_path: Path) -> None:
    save_model(*learned("llama", True), tmp_path / "model")
    with pytest.raises(ValueError, match="push_to_hub"):
        load(tmp_path / "model").save_pretrained(tmp_path / "saved", push_to_hub=True)


@pytest.mark.parametrize(("family", "gate"), KINDS)
def test_the_files_and_the_card_say_what_plain_transformers_lacks(family: str, gate: bool, tmp_path: Path) -> None:
    report = save_model(*learned(family, gate), tmp_path / "model")
    auto = getattr(hf, json.loads((tmp_path / "model" / "fedbe.json").read_text())["auto_class"])
    plain, notes = auto.from_pretrained(tmp_path / "model", output_loading_info=True)
    whole = report.plain and not gate
    lacking = "token_gate" if report.plain else "expanded_blocks"
    assert notes["unexpected_keys"] == (set() if whole else {f"only_fedbe_load_puts_in.{lacking}"})
    assert weights_fault(plain, notes, new_head=False) is None
    card = ModelCard.load(tmp_path / "model" / "README.md")
    assert card.data.library_name == ("transformers" if whole else "fedbe")
    assert card.data.get("license") is None and "fedbe" in card.data.tags
    assert ("fedbe.load(" in card.text) == (not whole) and report.reason[1:] in card.text
    assert ("gate" in card.text) == (gate or not report.plain)
    assert str(tmp_path) not in card.content


def test_the_card_of_a_scaled_copy_names_its_dial_and_keeps_what_was_written_into_it(tmp_path: Path) -> None:
    save_model(*learned("llama", True), tmp_path / "model")
    file = tmp_path / "model" / "README.md"
    assert "- Dial: 1 " in file.read_text()
    file.write_text(file.read_text() + "\nWritten by hand.\n")
    rescale(tmp_path / "model", tmp_path / "half", 0.5)
    card = (tmp_path / "half" / "README.md").read_text()
    assert "- Dial: 0.5 " in card and "- Dial: 1 " not in card and "Written by hand." in card


def test_the_card_names_a_base_on_the_hub_and_no_folder_of_this_machine(tmp_path: Path) -> None:
    model, expansion = learned("llama", False)
    for name, known in (("some/base", "some/base"), (str(tmp_path), None)):
        model.name_or_path = name
        save_model(model, expansion, tmp_path / name.replace("/", "_"))
        card = ModelCard.load(tmp_path / name.replace("/", "_") / "README.md")
        assert card.data.base_model == known and str(tmp_path) not in card.content


def test_an_adapter_that_was_put_into_the_folder_is_refused(tmp_path: Path) -> None:
    save_model(*learned("llama", False), tmp_path / "model")
    (tmp_path / "model" / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="adapter lies beside"):
        load(tmp_path / "model")

"""One more block in a trained model: outputs, names, tensors, cache, export; and when to add it."""

import json
import math
from bisect import bisect_right
from pathlib import Path

import pytest
import torch
import transformers as hf
from families import FAMILIES, GATED, logits, perturb, tiny
from transformers import PreTrainedModel

from fedbe.errors import ExpansionError, Facts
from fedbe.expansion import Expansion, block_parameter_names, expand_blocks, load, remove_blocks, save_model
from fedbe.expansion.growth import Plateau, grow

SOME = ["llama_tied", "qwen3", "gemma2", "smollm3", "gpt2", "gpt_neo", "mixtral", "bert", "vit"]
GENERATING = ["llama_tied", "qwen3", "gemma2", "gpt_neo", "opt_post_norm"]


def trained(family: str, positions: list[int]) -> tuple[PreTrainedModel, Expansion]:
    model = tiny(family)
    expansion = expand_blocks(model, positions)
    perturb((pair for block in expansion.blocks(model) for pair in block.named_parameters()), 0.1)
    return model, expansion


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_of_a_trained_model_stay_to_the_bit(family: str) -> None:
    model, expansion = trained(family, [0, 2])
    before = logits(model)
    grown, _ = grow(model, expansion, 1)
    assert torch.equal(logits(model), before)
    assert grown.positions == (0, 1, 2) and expansion.positions == (0, 2)
    assert model.config.get_text_config().num_hidden_layers == grown.depth == 7


@pytest.mark.parametrize("position", [0, 1, 2, 3])
@pytest.mark.parametrize("family", ["llama_tied", "bert"])
def test_every_shifted_name_is_renamed_and_no_other(family: str, position: int) -> None:
    model, expansion = trained(family, [0, 2, 2])
    before = dict(model.named_parameters())
    grown, renamed = grow(model, expansion, position)
    after = dict(model.named_parameters())
    assert all(after[renamed.get(name, name)] is parameter for name, parameter in before.items())
    assert all(old != new for old, new in renamed.items()) and len(set(renamed.values())) == len(renamed)
    ordinal = bisect_right(expansion.positions, position)
    new = set(after) - {renamed.get(name, name) for name in before}
    assert new == set(block_parameter_names(model, grown)[ordinal])
    # What lies below the new block keeps its name.
    assert all(f".{index}." not in name for name in renamed for index in range(grown.expanded_indices[ordinal]))


@pytest.mark.parametrize("family", SOME)
def test_growing_step_by_step_gives_the_structure_of_expanding_at_once(family: str) -> None:
    model, expansion = trained(family, [2])
    learned = expansion.blocks(model)[0]
    for position in (0, 2, 3):
        expansion, _ = grow(model, expansion, position)
    assert expansion.positions == (0, 2, 2, 3)
    assert expansion.blocks(model)[1] is learned
    expected = logits(model)
    fresh = tiny(family)
    expansion.apply(fresh)
    assert fresh.config.to_dict() == model.config.to_dict()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(logits(fresh), expected)
    base = tiny(family)
    remove_blocks(model, expansion)
    assert torch.equal(logits(model), logits(base))


@pytest.mark.parametrize("family", ["llama", "gemma2", "bert"])
def test_new_block_copies_the_base_and_not_the_trained_block_beside_it(family: str) -> None:
    model, expansion = trained(family, [1])
    base = dict(tiny(family).get_submodule(f"{expansion.blocks_path}.1").named_parameters())
    grown, _ = grow(model, expansion, 1)
    assert grown.expanded_indices == (2, 3)
    new = grown.blocks(model)[1]
    zeroed = set(grown.rule.targets)
    for name, parameter in new.named_parameters():
        if name in zeroed or name.rpartition(".")[0] in zeroed:
            assert (parameter == -grown.rule.shift).all()
        else:
            assert torch.equal(parameter, base[name])
    shared = {id(parameter) for parameter in new.parameters()} & {
        id(parameter) for block in list(model.get_submodule(grown.blocks_path))[:3] for parameter in block.parameters()
    }
    assert not shared


def test_tied_embeddings_stay_tied() -> None:
    model, expansion = trained("llama_tied", [0])
    grow(model, expansion, 3)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("family", GENERATING)
def test_generation_with_a_cache_agrees_with_generation_without(family: str) -> None:
    model, expansion = trained(family, [0, 2])
    prompt = torch.tensor([[0, 0, 5, 9, 11, 7, 30], [3, 4, 5, 6, 7, 8, 9]])
    arguments = {"attention_mask": (prompt != 0).long(), "max_new_tokens": 8, "do_sample": False}
    before = model.generate(prompt, **arguments)
    grown, _ = grow(model, expansion, 1)
    assert torch.equal(model.generate(prompt, **arguments), before)
    perturb(grown.blocks(model)[1].named_parameters(), 1.0)
    cached = model.generate(prompt, **arguments)
    assert torch.equal(model.generate(prompt, **arguments, use_cache=False), cached)
    assert not torch.equal(cached, before)


@pytest.mark.parametrize("family", SOME)
def test_export_of_a_grown_model_loads_with_equal_logits(family: str, tmp_path: Path) -> None:
    model, expansion = trained(family, [0, 2])
    grown, _ = grow(model, expansion, 1)
    perturb(grown.blocks(model)[1].named_parameters(), 0.1)
    report = save_model(model, grown, tmp_path / "model")
    assert report.plain == (family not in GATED)
    if report.plain:
        name = json.loads((report.directory / "fedbe.json").read_text())["auto_class"]
        assert torch.equal(logits(getattr(hf, name).from_pretrained(report.directory)), logits(model))
    assert torch.equal(logits(load(report.directory)), logits(model))


def test_growth_that_would_change_the_outputs_is_undone() -> None:
    model, expansion = trained("llama", [0, 2])
    model.model.layers[2].register_forward_hook(lambda _module, _args, output: output + 1)
    before, names = logits(model), [name for name, _ in model.named_parameters()]
    with pytest.raises(ExpansionError, match="one more block above block 1: outputs move by"):
        grow(model, expansion, 1)
    assert torch.equal(logits(model), before)
    assert [name for name, _ in model.named_parameters()] == names
    assert [block.self_attn.layer_idx for block in model.model.layers] == list(range(6))
    assert model.config.num_hidden_layers == 6


def test_impossible_positions_and_other_models_are_refused() -> None:
    model, expansion = trained("llama", [0])
    with pytest.raises(ExpansionError, match=r"`positions` = \[4\]: give at least one block, each from 0 to 3"):
        grow(model, expansion, 4)
    with pytest.raises(ExpansionError, match="has 4 blocks, the expansion needs 5"):
        grow(tiny("llama"), expansion, 1)
    assert len(model.model.layers) == 5


def test_plateau_is_noticed_after_patience_and_again_after_as_long() -> None:
    plateau = Plateau(patience=2, min_gain=0.1)
    scores = [0.0, 0.3, 0.35, 0.39, 0.55, 0.5, 0.6, 0.64, 0.65, 0.7, 0.75]
    noticed = [plateau.update(score) for score in scores]
    #         first   gain   small  small  gain   down   small  small  small  gain   small
    assert noticed == [False, False, False, True, False, False, True, False, True, False, False]


def test_small_gains_add_up() -> None:
    plateau = Plateau(patience=3, min_gain=0.1)
    assert not any(plateau.update(0.06 * step) for step in range(20))


def test_score_that_is_not_a_number_is_no_gain() -> None:
    plateau = Plateau(patience=2, min_gain=0.0)
    assert [plateau.update(math.nan) for _ in range(4)] == [False, True, False, True]
    assert not plateau.update(0.1) and not plateau.update(0.1) and plateau.update(math.nan)


@pytest.mark.parametrize("cut", range(8))
def test_plateau_continues_from_its_state(cut: int) -> None:
    scores = [0.1, 0.1, 0.1, 0.2, 0.1, 0.15, 0.2, 0.1]
    whole, first, second = Plateau(2, 0.0), Plateau(2, 0.0), Plateau(2, 0.0)
    expected = [whole.update(score) for score in scores]
    start = [first.update(score) for score in scores[:cut]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
    assert start + [second.update(score) for score in scores[cut:]] == expected and any(expected)


def test_plateau_reports_numbers_out_of_range() -> None:
    assert [problem.key for problem in Plateau(0, -1.0).check("growth", Facts())] == [
        "growth.patience",
        "growth.min_gain",
    ]
    assert not Plateau().check("growth", Facts())

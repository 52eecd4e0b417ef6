"""The probe: its scores against finite differences, the model afterwards, the projection."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from families import FAMILIES, batch, logits, tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from fedbe.errors import ExpansionError
from fedbe.expansion import Expansion, expand_blocks, freeze
from fedbe.expansion.identity import target_parameters
from fedbe.expansion.probe import (
    count_sketch,
    identity_blocks,
    identity_rule,
    probe_client,
    probe_gradients,
)
from fedbe.messages import decode, encode
from fedbe.seeding import generator

KINDS = ["llama", "gpt2", "olmo2", "bert"]


def labelled(model: PreTrainedModel) -> dict[str, Tensor]:
    inputs = batch(model)
    if "input_ids" in inputs and model.config.num_labels == 2:
        return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}
    size = len(next(iter(inputs.values())))
    return {**inputs, "labels": torch.arange(size) % 3}


def unequal_batches(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    whole = labelled(model)
    return [{name: tensor[rows] for name, tensor in whole.items()} for rows in (slice(0, 2), slice(2, 3))]


def mean_loss(model: PreTrainedModel, batches: list[dict[str, Tensor]]) -> Tensor:
    sizes = [len(batch["input_ids"]) for batch in batches]
    losses = [size * model(**batch).loss for size, batch in zip(sizes, batches, strict=True)]
    return torch.stack(losses).sum() / sum(sizes)


def with_gradients(model: PreTrainedModel, expansion: Expansion, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """Return the gradients of the one expanded block's targets."""
    (block,) = expansion.blocks(model)
    targets = target_parameters(expansion.rule, block)
    names = {name for name, parameter in model.named_parameters() if any(parameter is target for target in targets)}
    freeze(model, names)
    mean_loss(model, batches).backward()  # type: ignore[no-untyped-call]
    return [target.grad for target in targets if target.grad is not None]


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("position", [0, 2])
def test_score_is_the_loss_drop_for_each_unit_along_the_gradient(family: str, position: int) -> None:
    model = tiny(family, torch.float64)
    batches = unequal_batches(model)
    score = probe_gradients(model, batches)[position]
    expansion = expand_blocks(model, [position])
    gradients = with_gradients(model, expansion, batches)
    targets = target_parameters(expansion.rule, expansion.blocks(model)[0])
    length, losses = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt(), []
    with torch.no_grad():
        for step in (2e-3, -4e-3):
            for target, gradient in zip(targets, gradients, strict=True):
                target -= step * gradient / length
            losses.append(mean_loss(model, batches))
    assert score > 1e-3
    # Norms and losses of transformers compute in float32 even here.
    torch.testing.assert_close((losses[1] - losses[0]) / 4e-3, score, rtol=2e-3, atol=0.0, check_dtype=False)


@pytest.mark.parametrize("family", [*KINDS, "gemma2", "mixtral"])
def test_all_positions_at_once_agree_with_one_real_block_at_a_time(family: str) -> None:
    model = tiny(family)
    batches = unequal_batches(model)
    scores = probe_gradients(model, batches)
    alone = []
    for position in range(4):
        fresh = tiny(family)
        gradients = with_gradients(fresh, expand_blocks(fresh, [position]), batches)
        alone.append(torch.cat([gradient.flatten() for gradient in gradients]).double().norm())
    torch.testing.assert_close(scores, torch.stack(alone), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_model_is_the_same_to_the_bit_afterwards(family: str) -> None:
    model = tiny(family).train()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    objects = {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()}
    config = model.config.to_dict()
    scores = probe_gradients(model, [labelled(model)])
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert {name: (id(p), p.requires_grad) for name, p in model.named_parameters()} == objects
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(module.training for module in model.modules())
    # GPT-Neo's compressed list comes back in another spelling of the same; classifiers note the kind of their labels.
    respelled = {"attention_types", "problem_type"}
    kept = {name: value for name, value in model.config.to_dict().items() if name not in respelled}
    assert kept == {name: value for name, value in config.items() if name not in respelled}
    assert scores.shape == (4,) and (scores > 0).all() and scores.isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_zeroed_parameters_are_new_and_the_outputs_stay(family: str) -> None:
    model = tiny(family)
    base, expected, rule = {id(parameter) for parameter in model.parameters()}, logits(model), identity_rule(model)
    with identity_blocks(model, rule) as positions:
        assert torch.equal(logits(model), expected)
        new = {id(parameter) for parameter in model.parameters()} - base
        assert new == {id(writer) for writers in positions for writer in writers}
        assert new == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_model_is_whole_again_after_a_failure() -> None:
    model = tiny("llama")
    expected = logits(model)
    with pytest.raises(ExpansionError, match="they need `labels`"):
        probe_gradients(model, [batch(model)])
    with pytest.raises(ExpansionError, match="no batch"):
        probe_gradients(model, [])
    assert len(model.model.layers) == model.config.num_hidden_layers == 4
    assert torch.equal(logits(model), expected)


def test_one_forward_and_one_backward_pass_for_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    rule, batches = identity_rule(model), unequal_batches(model)
    passes = {"forward": 0, "backward": 0}
    model.register_forward_pre_hook(lambda *_: passes.update(forward=passes["forward"] + 1))
    backward = Tensor.backward

    def counted(tensor: Tensor, *args: Any, **options: Any) -> None:
        passes["backward"] += 1
        backward(tensor, *args, **options)

    monkeypatch.setattr(Tensor, "backward", counted)
    probe_gradients(model, batches, rule)
    assert passes == {"forward": 2, "backward": 2}


def test_norm_is_that_of_the_mean_gradient() -> None:
    model = tiny("bert", torch.float64)
    whole = labelled(model)
    rows: list[dict[str, Tensor]] = [{name: tensor[row, None] for name, tensor in whole.items()} for row in range(3)]
    together, alone = probe_gradients(model, rows), [probe_gradients(model, [row]) for row in rows]
    torch.testing.assert_close(together, probe_gradients(model, [whole]))
    # A gate is a single number: where samples pull it both ways, the mean gradient is the smaller.
    mean_of_norms = torch.stack(alone).mean(0)
    assert (together <= mean_of_norms + 1e-12).all() and (together < 0.9 * mean_of_norms).any()


def test_client_reports_samples_scores_and_an_equal_projection_for_all() -> None:
    model = tiny("llama")
    batches, rule = unequal_batches(model), identity_rule(model)
    first = probe_client(model, iter(batches), "a", rule, sketch_dimension=64)
    other = probe_client(model, batches, "b", rule, sketch_dimension=64)
    assert (first.client_id, first.samples, len(first.scores)) == ("a", 3, 4)
    assert first.sketch == other.sketch and first.scores == other.scores
    assert first.sketch is not None and len({row for row in first.sketch}) == 4
    for score, row in zip(first.scores, first.sketch, strict=True):
        assert torch.tensor(row).norm().item() == pytest.approx(score, rel=0.5)
    assert decode(encode(first)) == first
    plain = probe_client(model, batches, "a", rule)
    assert plain.sketch is None and decode(encode(plain)) == plain


def test_another_seed_projects_otherwise() -> None:
    model = tiny("llama")
    reports = [probe_client(model, [labelled(model)], "a", sketch_dimension=8, seed=seed) for seed in (0, 1)]
    assert reports[0].scores == reports[1].scores and reports[0].sketch != reports[1].sketch


def sketched(tensors: list[Tensor], dimension: int, seed: int) -> Tensor:
    return count_sketch(tensors, dimension, generator(seed))


@given(st.integers(0, 1000), st.integers(1, 9), st.floats(-3, 3))
def test_projection_is_linear(seed: int, dimension: int, factor: float) -> None:
    random = generator(seed, "data")
    one, other = ([torch.randn(4, 3, generator=random), torch.randn(5, generator=random)] for _ in range(2))
    combined = [a + factor * b for a, b in zip(one, other, strict=True)]
    expected = sketched(one, dimension, seed) + factor * sketched(other, dimension, seed)
    torch.testing.assert_close(sketched(combined, dimension, seed), expected, rtol=1e-5, atol=1e-5)


def test_single_number_goes_to_one_place_with_a_sign() -> None:
    places = set()
    for seed in range(40):
        sketch = sketched([torch.tensor([0.0, 3.0])], 3, seed)
        assert sorted(sketch.abs().tolist()) == [0.0, 0.0, 3.0]
        places.add((int(sketch.abs().argmax()), float(sketch.sum())))
    assert len(places) == 6


def test_inner_products_are_kept_in_expectation() -> None:
    one, other = torch.randn(2, 500, generator=generator(0)).double()
    other += 0.5 * one
    estimates = torch.stack([sketched([one], 64, seed) @ sketched([other], 64, seed) for seed in range(300)])
    relative = (estimates - one @ other) / (one.norm() * other.norm())
    assert abs(relative.mean()) < 3 * 0.13 / 300**0.5  # a spread of 1/√64 for each
    assert 0.08 < relative.std() < 0.18


def test_pieces_of_any_size_give_the_same_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    vector = torch.randn(100, generator=generator(0))
    whole = sketched([vector], 8, 0)
    monkeypatch.setattr("fedbe.expansion.probe._CHUNK", 7)
    torch.testing.assert_close(sketched([vector.view(20, 5)], 8, 0), whole)


class Pausing(Mapping[str, Tensor]):
    """A batch that looks at the model when it is read."""

    def __init__(self, model: PreTrainedModel, values: dict[str, Tensor]) -> None:
        self.model, self.values_, self.modes = model, values, set[bool]()

    def __getitem__(self, name: str) -> Tensor:
        self.modes.add(any(module.training for module in self.model.modules()))
        return self.values_[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values_)

    def __len__(self) -> int:
        return len(self.values_)


def test_nothing_drops_while_probing() -> None:
    model = tiny("phi3").train()
    pausing = Pausing(model, labelled(model))
    probe_gradients(model, [pausing])
    assert pausing.modes == {False} and model.training

import pytest
import torch
from datasets import Dataset
from toy import adamw, tiny_llama, toy_loop, toy_plan
from transformers import BertConfig, BertForSequenceClassification

from fedbe.algorithms import FedAvg
from fedbe.client.plan import prepare_model
from fedbe.errors import ConfigError, Facts, Problem
from fedbe.messages import FitTask
from fedbe.modeling.base_model import BaseModel
from fedbe.objectives import Anchor, FedProx
from fedbe.objectives.anchor import HiddenStates, Predictions
from fedbe.traits import Trait


def task(client="client", round_index=0):
    return FitTask(client, 0, round_index, {}, ())


def anchor(**options):
    return Anchor(**({"sequences": 12, "sequence_length": 10} | options))


def moved(model, scale=0.1):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


class TwoTexts:
    def load(self, split):
        return Dataset.from_dict({"text": ["a short text", "", "and one that is longer than the other"]})

    def check(self, key, facts):
        return []


def tiny_bert():
    config = BertConfig(
        vocab_size=len(BaseModel("fedbe:micro").processor),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
    )
    return BertForSequenceClassification(config).eval()


def test_the_kl_is_that_of_torch():
    base, now = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    measure = Predictions(temperature=2.0, top=None)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    expected = torch.nn.functional.kl_div(
        (now / 2).log_softmax(-1), (base / 2).log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)[mask.bool()].mean()  # fmt: skip
    assert measure(now, measure.target(base), mask).item() == pytest.approx(4 * expected.item(), rel=1e-2)


def test_fewer_tokens_are_a_lower_bound_and_all_of_them_the_same():
    base, now, mask = 3 * torch.randn(4, 6, 20), 3 * torch.randn(4, 6, 20), torch.ones(4, 6)

    def kl(top):
        measure = Predictions(1.0, top)
        return measure(now, measure.target(base), mask).item()

    assert 0 < kl(2) < kl(8) < kl(None) == kl(20)


def test_hidden_states_as_far_off_as_zero_have_distance_one():
    measure, states = HiddenStates(), torch.randn(2, 3, 4)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    target = measure.target(states)
    assert measure(states, target, mask).item() < 1e-6
    assert measure(torch.zeros_like(states), target, mask).item() == pytest.approx(1.0)


@pytest.mark.parametrize("top", [None, 4])
def test_the_base_model_is_at_no_distance_and_another_is(top):
    model, own = tiny_llama(), anchor(top=top)
    own.prepare(model, None, seed=0)
    rows = torch.arange(12)
    assert own.distance(model, rows).item() == pytest.approx(0.0, abs=1e-5)
    assert own.distance(moved(model), rows).item() > 1e-3


def test_text_follows_from_the_seed_and_choices_from_client_and_round():
    model = tiny_llama()
    texts = []
    for seed in (0, 0, 1):
        own = anchor()
        own.prepare(model, None, seed)
        texts.append(own._text["input_ids"])
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])
    moved(model)
    batch = {"input_ids": torch.zeros(4, 3)}
    tasks = [task("a"), task("a"), task("b"), task("a", round_index=1)]
    losses = [own.local(model, each, {}).loss(torch.zeros(()), batch).item() for each in tasks]
    assert losses[0] == losses[1] and len(set(losses)) == 3


def test_the_loss_is_the_tasks_plus_the_weighted_distance_and_has_gradients():
    model = moved(tiny_llama()).requires_grad_(True)
    losses = []
    for weight in (1.0, 3.0):
        own = anchor(weight=weight)
        own.prepare(tiny_llama(), None, seed=0)
        losses.append(own.local(model, task(), {}).loss(torch.tensor(2.0), {"input_ids": torch.zeros(4, 3)}))
    assert losses[1].item() - 2 == pytest.approx(3 * (losses[0].item() - 2), rel=1e-5)
    losses[0].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_classifier_is_held_by_its_hidden_states():
    model, own = tiny_bert(), anchor(corpus=TwoTexts())
    own.prepare(model, BaseModel("fedbe:micro").processor, seed=0)
    rows = torch.arange(len(own._text["input_ids"]))
    assert own.distance(model, rows).item() < 1e-5 < own.distance(moved(model), rows).item()


def test_a_classifier_without_text_is_refused():
    with pytest.raises(ConfigError, match="name a corpus"):
        anchor().prepare(tiny_bert(), None, seed=0)


def test_what_would_not_fit_in_memory_is_refused_with_a_remedy(monkeypatch):
    monkeypatch.setattr("fedbe.objectives.anchor.CACHE_LIMIT", 1000)
    with pytest.raises(ConfigError, match="top: 64"):
        anchor().prepare(tiny_llama(), None, seed=0)


def test_wrong_numbers_are_problems():
    wrong = anchor(weight=0, share=-1, temperature=0, sequences=0, sequence_length=1, top=0, objective=FedProx(-1.0))
    problems = wrong.check("client.objective.init_args", Facts(optimizer=adamw))
    assert {problem.key.removeprefix("client.objective.init_args.") for problem in problems} == {
        "weight", "share", "temperature", "sequences", "sequence_length", "top", "objective.init_args.mu",
    }  # fmt: skip


def test_mistakes_of_a_corpus_and_of_an_inner_objective_are_named_where_they_stand(monkeypatch):
    class Wrong(TwoTexts):
        def check(self, key, facts):
            return [Problem(f"{key}.folder", 1, "no")]

    key = "client.objective.init_args"
    [problem] = anchor(corpus=Wrong()).check(key, Facts())
    assert problem.key == f"{key}.corpus.init_args.folder"
    monkeypatch.setattr("fedbe.objectives.anchor.CACHE_LIMIT", 1000)
    with pytest.raises(ConfigError, match=r"^objective\.init_args\.sequences = 12"):
        anchor(objective=anchor()).prepare(tiny_llama(), None, seed=0)
    with pytest.raises(ConfigError, match=r"^client\.objective\.init_args\.sequences = 12"):
        prepare_model(toy_plan(objective=anchor()), {})


def test_an_anchor_needs_what_the_other_objective_needs():
    assert anchor().needs == {Trait.SINGLE_CLIENT_STEPS}
    assert anchor(objective=FedProx()).needs == {Trait.SINGLE_CLIENT_STEPS, Trait.GLOBAL_MODEL}


def test_an_anchored_run_forgets_less_and_other_objectives_go_with_it(tmp_path):
    def drift(name, objective):
        loop = toy_loop(tmp_path / name, algorithm=FedAvg(), rounds=3, objective=objective)
        probe = anchor()
        probe.prepare(loop.model, None, seed=5)
        loop.run()
        return probe.distance(loop.model, torch.arange(12)).item()

    plain = drift("plain", FedProx(0.0))
    assert drift("anchored", anchor(weight=5.0, objective=FedProx(0.0))) < 0.5 * plain

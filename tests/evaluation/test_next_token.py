import pytest
import torch
from torch.nn.functional import cross_entropy

from fedbe.errors import ConfigError, Facts
from fedbe.evaluation import NextTokenTask, SampledTextTask
from fedbe.text.packing import pack
from fedbe.text.sampling import draw, sample_sequences
from fedbe.text.tokens import evenly_spread


def test_packing_puts_a_begin_token_before_each_document_and_ignores_the_filling():
    tokens, labels = pack([[5, 6, 7], [8, 9]], begin=1, length=4)
    assert tokens.tolist() == [[1, 5, 6, 7], [1, 8, 9, 1]]
    assert labels.tolist() == [[1, 5, 6, 7], [1, 8, 9, -100]]


def test_few_items_are_spread_over_many():
    assert evenly_spread(10, 4).tolist() == [0, 2, 5, 7]
    assert evenly_spread(3, 4).tolist() == evenly_spread(3, None).tolist() == [0, 1, 2]


def test_next_token_score_is_that_of_a_loop(model, tokenizer, corpus):
    task = NextTokenTask(corpus(test={"text": ["abcdefg", "", "xyz"]}), sequence_length=8)
    assert task.check("general_tasks[0]", Facts()) == []
    task.prepare(model, tokenizer, seed=0)
    score = task.evaluate(model)
    assert tokenizer.batch_decode(task.tokens) == ["<s>abcdefg", "<s>xyz<s><s><s><s>"]
    losses, right = [], []
    model.eval()
    for ids, length in ((task.tokens[0], 8), (task.tokens[1], 4)):
        with torch.no_grad():
            logits = model(input_ids=ids[None, :length]).logits[0]
        losses += [cross_entropy(logits[t - 1], ids[t]).item() for t in range(1, length)]
        right += [int(logits[t - 1].argmax() == ids[t]) for t in range(1, length)]
    assert score.cross_entropy == pytest.approx(sum(losses) / 10, rel=1e-5)
    assert score.score == pytest.approx(sum(right) / 10)


def test_the_scored_text_does_not_depend_on_the_seed(model, tokenizer, corpus):
    documents = {"text": ["abc def ghi", "jkl mno", "pqr stu vwx yz"] * 5}
    tasks = [NextTokenTask(corpus(test=documents), sequence_length=6, max_sequences=7) for _ in range(2)]
    for seed, task in enumerate(tasks):
        task.prepare(model, tokenizer, seed)
    assert torch.equal(tasks[0].tokens, tasks[1].tokens)
    assert tasks[0].tokens.shape == (7, 6)


@pytest.mark.parametrize(
    ("splits", "key", "remedy"),
    [
        ({"test": {"text": ["", "  "]}}, "corpus", "has no text"),
        ({"test": {"content": ["abc"]}}, "corpus", "no such column"),
        ({"train": {"text": ["abc"]}}, "corpus", "cannot be loaded"),
        ({"problem": "there is no such file."}, "corpus.init_args.problem", "there is no such file"),
    ],
)
def test_a_corpus_that_cannot_be_scored_is_reported_before_work_starts(corpus, splits, key, remedy):
    (problem,) = NextTokenTask(corpus(**splits)).check("general_tasks[0].init_args", Facts())
    assert problem.key == f"general_tasks[0].init_args.{key}"
    assert remedy in problem.remedy


def test_bad_numbers_are_all_reported(corpus):
    task = NextTokenTask(corpus(test={"text": ["a"]}), sequence_length=1, max_sequences=0, batch_size=0)
    assert [p.key for p in task.check("t", Facts())] == ["t.sequence_length", "t.max_sequences", "t.batch_size"]
    own_text = SampledTextTask(sequences=0, temperature=0.0)
    assert [p.key for p in own_text.check("t", Facts())] == ["t.sequences", "t.temperature"]


def test_text_without_a_tokenizer_is_refused(model, corpus):
    with pytest.raises(ConfigError, match="has no tokenizer"):
        NextTokenTask(corpus(test={"text": ["a"]})).prepare(model, None, 0)


def sampled(model, seed, **changes):
    task = SampledTextTask(sequences=6, sequence_length=10, batch_size=1, **changes)
    task.prepare(model, None, seed)
    return task.tokens


def test_sampling_follows_from_the_seed_alone_and_leaves_the_global_generator(model):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = sampled(model, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert torch.equal(sampled(model, seed=3), first)
    assert not torch.equal(sampled(model, seed=4), first)
    assert first.shape == (6, 10)
    assert (first[:, 0] == model.config.bos_token_id).all()


def test_sampling_with_the_cache_draws_what_sampling_without_it_would(model):
    tokens = sample_sequences(model, 1, 3, 12, torch.Generator().manual_seed(5), temperature=0.7)
    chance, model = torch.Generator().manual_seed(5), model.eval()
    expected = torch.ones(3, 1, dtype=torch.long)
    with torch.no_grad():
        while expected.shape[1] < 12:
            logits = model(input_ids=expected, use_cache=False).logits[:, -1] / 0.7
            expected = torch.cat([expected, draw(logits, chance)], 1)
    assert torch.equal(tokens, expected)


def test_draws_follow_the_distribution():
    probabilities = torch.tensor([0.0, 0.5, 0.2, 0.3])
    drawn = draw(probabilities.log().expand(20000, 4), torch.Generator().manual_seed(0)).flatten()
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    torch.testing.assert_close(shares, probabilities, atol=0.015, rtol=0)
    assert shares[0] == 0


def test_a_model_predicts_its_own_text_better_than_another_models(model):
    task = SampledTextTask(sequences=16, sequence_length=24, name="own")
    task.prepare(model, None, seed=0)
    own = task.evaluate(model)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(9)) * 0.5
    other = task.evaluate(model)
    assert own.score > other.score and own.cross_entropy < other.cross_entropy

import pytest
import torch

from fedbe.errors import ConfigError, Facts
from fedbe.evaluation import ContinuationTask, MultipleChoiceTask
from fedbe.evaluation.multiple_choice import Item, answer_index, encode, log_likelihoods, pick, score_items

QUESTIONS = {
    "question": ["what is it?", "and this?", "who?"],
    "choices": [["a cat", "a very large dog"], ["no", "yes", "maybe so"], ["you", "me"]],
    "answer": [1, 2, 0],
}


def naive_log_likelihood(model, context, choice):
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([context + choice]), use_cache=False).logits[0]
    log_probabilities = logits.log_softmax(-1)
    return sum(log_probabilities[len(context) + i - 1, token].item() for i, token in enumerate(choice))


def test_the_longer_choice_wins_when_it_is_likelier_per_character():
    # -6/3 = -2 per character against -8/10 = -.8: the plain sum would choose the first.
    assert pick(torch.tensor([-6.0, -8.0]), [3, 10]) == 1
    assert pick(torch.tensor([-6.0, -8.0]), [10, 3]) == 0


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_likelihoods_with_a_shared_context_equal_those_of_whole_sequences(model, batch_size):
    items = [
        Item([1, 4, 5, 6], [[7, 8], [9], [3, 2, 6]], [2, 1, 3], 0),
        Item([1], [[7, 8, 5], [9, 9]], [3, 2], 1),
        Item([1, 8, 8, 2], [[5], [6, 7, 8, 9]], [1, 4], 0),
        Item([1, 3, 3], [[5, 5], [6, 6]], [2, 2], 0),
    ]
    scores = log_likelihoods(model, items, batch_size)
    assert all(module.training for module in model.modules())
    for item, values in zip(items, scores, strict=True):
        expected = [naive_log_likelihood(model, item.context, choice) for choice in item.choices]
        assert values.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_a_context_too_long_for_the_model_loses_its_beginning(model):
    context = [1, *torch.randint(2, 31, (100,), generator=torch.Generator().manual_seed(0)).tolist()]
    (values,) = log_likelihoods(model, [Item(context, [[4, 5], [6]], [2, 1], 0)], 8)
    expected = [naive_log_likelihood(model, context[-62:], choice) for choice in ([4, 5], [6])]
    assert values.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_items_are_scored_by_hand(model):
    items = [Item([1, 4], [[7, 8], [9]], [2, 9], answer) for answer in (0, 1)]
    likelihoods = [naive_log_likelihood(model, [1, 4], choice) for choice in ([7, 8], [9])]
    score = score_items(model, items, 8)
    assert score.score == 0.5  # the same question with either answer
    assert score.standard_error == pytest.approx(0.5)  # sqrt(.25 / 1)
    assert score.cross_entropy == pytest.approx(-sum(likelihoods) / 3, rel=1e-5)


def test_questions_are_encoded_as_running_text(model, tokenizer, corpus):
    task = MultipleChoiceTask(corpus(test=QUESTIONS), template="q. {question} a. ")
    assert task.check("t", Facts()) == []
    task.prepare(model, tokenizer, seed=0)
    first = task.items[0]
    assert tokenizer.decode(first.context) == "<s>q. what is it? a."
    assert [tokenizer.decode(choice) for choice in first.choices] == ["  a cat", "  a very large dog"]
    assert first.lengths == [5, 16]
    assert [item.answer for item in task.items] == [1, 2, 0]
    assert 0 <= task.evaluate(model).score <= 1


def test_white_space_at_the_end_of_a_context_goes_to_the_choices(tokenizer):
    context, *choices = encode(tokenizer, "who? ", ["me", "you"])
    assert tokenizer.decode(context) == "who?"
    assert [tokenizer.decode(choice) for choice in choices] == [" me", " you"]


@pytest.mark.parametrize(
    ("answer", "index"),
    [(1, 1), ("B", 1), (" b ", 1), ("1", 1), ("green", 1), (2, None), ("C", None), (None, None), (-1, None)],
)
def test_an_answer_is_an_index_a_letter_or_a_text(answer, index):
    assert answer_index(answer, ["red", "green"]) == index


def test_an_answer_that_is_no_choice_is_refused_with_its_question(model, tokenizer, corpus):
    rows = QUESTIONS | {"answer": [1, 3, 0]}
    with pytest.raises(ConfigError, match=r"and this\?.*answer 3 is not"):
        MultipleChoiceTask(corpus(test=rows)).prepare(model, tokenizer, 0)


def test_a_missing_column_or_a_template_without_the_question_is_reported(corpus):
    task = MultipleChoiceTask(corpus(test=QUESTIONS), question_column="goal", template="Q:")
    problems = {problem.key: problem.remedy for problem in task.check("t", Facts())}
    assert "{question}" in problems["t.template"]
    assert "no such column" in problems["t.corpus"]


TEXTS = ["abcdefghij" * 3, "klmnopqrst" * 3, "uvwxyz ?.a" * 3, "short"]


def continuation(model, tokenizer, corpus, seed=0, **changes):
    task = ContinuationTask(corpus(test={"text": TEXTS}), choices=3, context_tokens=6, continuation_tokens=4, **changes)
    task.prepare(model, tokenizer, seed)
    return task


def test_false_continuations_come_from_other_documents(model, tokenizer, corpus):
    task = continuation(model, tokenizer, corpus)
    assert len(task.items) == 9  # three pieces of each of the three long documents
    for item in task.items:
        texts = [tokenizer.decode(choice) for choice in item.choices]
        context = tokenizer.decode(item.context).removeprefix("<s>")
        owner = next(text for text in TEXTS if context in text)
        assert context + texts[item.answer] in owner
        assert item.lengths == [4, 4, 4]
        assert all(text not in owner for index, text in enumerate(texts) if index != item.answer)
    assert len({item.answer for item in task.items}) > 1


def test_the_seed_decides_the_false_continuations_only(model, tokenizer, corpus):
    first, same, other = (continuation(model, tokenizer, corpus, seed) for seed in (0, 0, 1))
    assert first.items == same.items != other.items
    assert [item.context for item in first.items] == [item.context for item in other.items]


def test_a_model_without_a_preference_is_at_chance(model, tokenizer, corpus):
    task = continuation(model, tokenizer, corpus)
    torch.nn.init.zeros_(model.lm_head.weight)
    assert task.evaluate(model).score == sum(item.answer == 0 for item in task.items) / 9 < 1


def test_too_few_long_documents_are_refused(model, tokenizer, corpus):
    with pytest.raises(ConfigError, match="only 3 documents have 10 tokens"):
        task = ContinuationTask(corpus(test={"text": TEXTS}), choices=4, context_tokens=6, continuation_tokens=4)
        task.prepare(model, tokenizer, 0)

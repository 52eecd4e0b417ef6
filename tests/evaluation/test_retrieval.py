import pytest
import torch

from fedbe.errors import ConfigError, Facts
from fedbe.evaluation import RetrievalTask
from fedbe.evaluation.retrieval import found_first

TEXTS = ["aaa b", "zzz y", "k k l", "m n o"]


def test_only_the_nearest_document_is_found_first_and_ties_count_as_found():
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    documents = torch.tensor([[0.8, 0.6], [0.6, 0.8], [1.0, 0.0]])
    assert found_first(queries, documents).tolist() == [False, True, False]
    assert found_first(queries, torch.ones(3, 2)).all()


def test_a_query_finds_its_own_text_among_others_and_not_in_anothers_row(encoder, tokenizer, corpus):
    scores = []
    for answers in (TEXTS, TEXTS[1:] + TEXTS[:1]):
        task = RetrievalTask(corpus(test={"question": TEXTS, "answer": answers}), "question", "answer")
        assert task.check("t", Facts()) == []
        task.prepare(encoder, tokenizer, seed=0)
        scores.append(task.evaluate(encoder).score)
    assert scores == [1.0, 0.0]


def test_a_missing_column_and_a_single_item_are_refused(encoder, tokenizer, corpus):
    rows = corpus(test={"question": TEXTS})
    assert [p.key for p in RetrievalTask(rows, "question", "answer", max_items=1).check("t", Facts())] == [
        "t.max_items",
        "t.corpus",
    ]
    with pytest.raises(ConfigError, match="answer"):
        RetrievalTask(rows, "question", "answer").prepare(encoder, tokenizer, 0)

import pytest
import torch
from transformers import BertModel

from fedbe.errors import ConfigError, Facts
from fedbe.evaluation import CentroidTask
from fedbe.evaluation.centroid import embed, nearest_centroid

TRAIN = {"text": ["aaa b", "aa ab", "a a a", "zzz y", "zz zy", "z z z"], "label": [3, 3, 3, 7, 7, 7]}
TEST = {"text": ["aaaa", "ab aa", "zzzz", "zy zz"], "label": [3, 3, 7, 7]}


def test_the_nearest_centroid_is_found_by_direction():
    support = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    queries = torch.tensor([[1.0, 0.1], [0.0, 5.0]])
    assert nearest_centroid(support, torch.tensor([0, 0, 1]), queries).tolist() == [0, 1]


def test_an_embedding_is_the_masked_mean_of_the_last_hidden_state(encoder):
    sequences = [[5, 6, 7], [8], [9, 10, 11, 12, 13]]
    vectors = embed(encoder, sequences, batch_size=3)
    assert all(module.training for module in encoder.modules())
    for vector, sequence in zip(vectors, sequences, strict=True):
        with torch.no_grad():
            mean = encoder.base_model.eval()(input_ids=torch.tensor([sequence])).last_hidden_state[0].mean(0)
        torch.testing.assert_close(vector, mean / mean.norm(), rtol=1e-4, atol=1e-5)


def test_classes_that_look_different_are_told_apart_and_shuffled_labels_are_not(encoder, tokenizer, corpus):
    scores = []
    for labels in (TEST["label"], TEST["label"][::-1]):
        task = CentroidTask(corpus(train=TRAIN, test=TEST | {"label": labels}), shots=2, episodes=4)
        assert task.check("t", Facts()) == []
        task.prepare(encoder, tokenizer, seed=0)
        scores.append(task.evaluate(encoder))
    assert (scores[0].score, scores[1].score) == (1.0, 0.0)
    assert scores[0].cross_entropy is None


def test_a_plain_encoder_gives_the_score_of_the_classifier_around_it(encoder, tokenizer, corpus):
    task = CentroidTask(corpus(train=TRAIN, test=TEST), shots=1)
    task.prepare(encoder, tokenizer, seed=0)
    plain = BertModel(encoder.config)
    plain.load_state_dict(encoder.bert.state_dict(), strict=False)
    assert task.evaluate(plain) == task.evaluate(encoder)


def test_episodes_follow_from_the_seed_and_have_the_shots_asked_for(encoder, tokenizer, corpus):
    tasks = [CentroidTask(corpus(train=TRAIN, test=TEST), shots=2, episodes=5) for _ in range(3)]
    for task, seed in zip(tasks, (0, 0, 1), strict=True):
        task.prepare(encoder, tokenizer, seed)
    drawn = [[task.support[row] for rows in task.episode_rows for row in rows.tolist()] for task in tasks]
    assert drawn[0] == drawn[1] != drawn[2]
    for rows in tasks[0].episode_rows:
        assert tasks[0].support_labels[rows].tolist() == [0, 0, 1, 1]


def test_a_label_without_examples_is_refused(encoder, tokenizer, corpus):
    rows = TEST | {"label": [3, 3, 7, 8]}
    with pytest.raises(ConfigError, match="8: this label of the test split has no training example"):
        CentroidTask(corpus(train=TRAIN, test=rows)).prepare(encoder, tokenizer, 0)

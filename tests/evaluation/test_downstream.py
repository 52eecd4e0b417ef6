from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import BertConfig, BertForSequenceClassification

from fedbe.evaluation import evaluate_downstream


def batches(sizes):
    chance = torch.Generator().manual_seed(0)
    for rows, length, ignored in sizes:
        tokens = torch.randint(32, (rows, length), generator=chance)
        labels = tokens.clone()
        labels[:, :ignored] = -100
        yield {"input_ids": tokens, "labels": labels}


def test_every_predicted_token_weighs_the_same_however_batches_are_cut(model):
    data = list(batches([(4, 9, 0), (1, 5, 3), (2, 12, 11)]))
    score = evaluate_downstream(model, data)
    losses, right = [], []
    for batch in data:
        with torch.no_grad():
            logits = model.eval()(input_ids=batch["input_ids"]).logits
        for row, labels in zip(logits, batch["labels"], strict=True):
            for t in range(1, len(labels)):
                if labels[t] != -100:
                    losses.append(cross_entropy(row[t - 1], labels[t]).item())
                    right.append((row[t - 1].argmax() == labels[t]).item())
    assert score.items == len(losses) == 4 * 8 + 2 + 2
    assert score.loss == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert score.accuracy == pytest.approx(sum(right) / len(right))


def test_a_classifier_is_scored_per_sample():
    config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    model = BertForSequenceClassification(config).eval()
    batch = {"input_ids": torch.arange(12).view(3, 4), "attention_mask": torch.ones(3, 4, dtype=torch.long)}
    with torch.no_grad():
        logits = model(**batch).logits
    labels = logits.argmax(-1)
    labels[0] = 1 - labels[0]
    score = evaluate_downstream(model, [batch | {"labels": labels}])
    assert (score.items, score.accuracy) == (3, pytest.approx(2 / 3))
    assert score.loss == pytest.approx(cross_entropy(logits, labels).item(), rel=1e-6)


def test_scoring_leaves_the_model_and_its_gradients_alone(model):
    evaluate_downstream(model, batches([(2, 6, 0)]))
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_data_without_labels_is_refused(model):
    with pytest.raises(ValueError, match="`batches` holds no label"):
        evaluate_downstream(model, batches([(2, 6, 6)]))
    with pytest.raises(ValueError, match="`batches` holds no label"):
        evaluate_downstream(model, [])


def test_a_classifier_is_scored_by_class_where_that_is_asked_for():
    class Fixed(torch.nn.Module):
        device, config = torch.device("cpu"), BertConfig()

        def forward(self, logits):
            return SimpleNamespace(logits=logits)

    logits = torch.tensor([[2.0, 0], [0, 1], [3, 0], [1, 0]])
    split = [
        {"logits": logits[:3], "labels": torch.tensor([0, 1, 1])},
        {"logits": logits[3:], "labels": torch.tensor([0])},
    ]
    score = evaluate_downstream(Fixed(), split, by_class=True, class_names=["ham", "spam"])
    assert score.by_class["confusion"] == {"ham": {"ham": 2}, "spam": {"ham": 1, "spam": 1}}
    assert score.accuracy == 0.75 and score.standard_error == pytest.approx((0.75 * 0.25 / 3) ** 0.5)
    assert evaluate_downstream(Fixed(), split).by_class is None

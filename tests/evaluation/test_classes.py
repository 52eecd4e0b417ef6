"""Scores by class, compared with figures by hand and with definitions."""

import json

import pytest
import torch

from fedbe.evaluation.classes import class_scores

LOGITS = torch.tensor([[3.0, 1, 0], [0, 2, 1], [2, 1, 0], [0, 3, 1], [1, 0, 0]])
LABELS = torch.tensor([0, 1, 1, 1, 0])


def test_scores_by_hand():
    scores = class_scores(LOGITS, LABELS, ["home", "ward", "never"])
    assert scores["confusion"] == {"home": {"home": 2}, "ward": {"home": 1, "ward": 2}, "never": {}}
    home, ward = scores["classes"]["home"], scores["classes"]["ward"]
    assert (home["samples"], home["precision"], home["recall"], home["f1"]) == (2, pytest.approx(2 / 3), 1.0, 0.8)
    assert (ward["samples"], ward["precision"], ward["recall"], ward["f1"]) == (3, 1.0, pytest.approx(2 / 3), 0.8)
    assert scores["macro_f1"] == pytest.approx(0.8)  # of the classes that occur
    assert scores["classes"]["never"] == {
        "samples": 0, "precision": None, "recall": None, "f1": None, "average_precision": None, "precision_at_10": None,
    }  # fmt: skip
    assert home["average_precision"] == pytest.approx((1 / 1 + 2 / 3) / 2)  # right at places 1 and 3
    assert home["precision_at_10"] == pytest.approx(2 / 5) and ward["precision_at_10"] == pytest.approx(3 / 5)
    json.dumps(scores, allow_nan=False)


def test_precision_is_of_the_ten_most_confident_samples():
    confidence = torch.arange(40.0)
    labels = (torch.arange(40) % 4 == 3).long()  # 3 of the last ten: 31, 35 and 39
    score = class_scores(torch.stack([-confidence, confidence], 1) / 40, labels)["classes"]["1"]
    assert score["precision_at_10"] == pytest.approx(0.3)


def test_classes_without_names_are_numbered():
    assert list(class_scores(LOGITS, LABELS)["classes"]) == ["0", "1", "2"]

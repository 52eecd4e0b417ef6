"""What a class is called in the data, the exported model calls it."""

import json

import pytest
from datasets import ClassLabel, Value
from transformers import AutoConfig, AutoModelForSequenceClassification

from fedbe.errors import ConfigError, Facts
from fedbe.modeling.base_model import BaseModel, GivenModel
from names.classifiers import answers, bert, text_data, trained

GOOD_FIRST = {"id2label": {0: "POSITIVE", 1: "NEGATIVE"}, "label2id": {"POSITIVE": 0, "NEGATIVE": 1}}
BY_NAME = {"good": "POSITIVE", "bad": "NEGATIVE"}
ABC = {"good": "a", "bad": "b", "odd": "c"}
STARS = {"good": 3, "bad": 1, "odd": 2}


@pytest.mark.parametrize(
    ("base", "labels", "feature", "arguments", "names"),
    [
        pytest.param(GOOD_FIRST, BY_NAME, None, {}, BY_NAME, id="the base's names in another order"),
        pytest.param(
            GOOD_FIRST, {"good": "positive", "bad": "negative"}, None, {}, {"good": "positive", "bad": "negative"},
            id="the same in lower case",
        ),
        pytest.param(GOOD_FIRST, {"good": "spam", "bad": "ham"}, None, {}, {"good": "spam", "bad": "ham"}, id="others"),
        pytest.param({}, BY_NAME, None, {}, BY_NAME, id="a base without names"),
        pytest.param({}, ABC, None, {}, ABC, id="another number of classes"),
        pytest.param(
            GOOD_FIRST, {"good": 1, "bad": 0}, None, {"labels": ["NEGATIVE", "POSITIVE"]}, BY_NAME,
            id="places in a list, and the base's names in another order",
        ),
        pytest.param(GOOD_FIRST, {"good": 1, "bad": 0}, None, {}, {"good": "1", "bad": "0"}, id="integers"),
        pytest.param({}, {"good": 7, "bad": 3}, None, {}, {"good": "7", "bad": "3"}, id="integers with gaps"),
        pytest.param(
            {}, STARS, None, {"labels": ["1", "2", "3", "4", "5"]}, {"good": "3", "bad": "1", "odd": "2"},
            id="integers from 1, named as they are written",
        ),
        pytest.param(
            GOOD_FIRST, {"good": 1, "bad": 0}, ClassLabel(names=["NEGATIVE", "POSITIVE"]), {}, BY_NAME, id="ClassLabel"
        ),
        pytest.param(
            {}, {"good": 1, "bad": 0}, ClassLabel(names=["NEGATIVE", "POSITIVE"]), {"labels": ["POSITIVE", "NEGATIVE"]},
            BY_NAME, id="ClassLabel in another order",
        ),
        pytest.param(
            {}, {"good": 1, "bad": 0}, ClassLabel(names=["x", "y"]), {"labels": ["NEGATIVE", "POSITIVE"]}, BY_NAME,
            id="ClassLabel renamed",
        ),
        pytest.param({}, {"good": True, "bad": False}, Value("bool"), {}, {"good": "True", "bad": "False"}, id="bool"),
        pytest.param(
            GOOD_FIRST, {"good": True, "bad": False}, Value("bool"), {"labels": ["NEGATIVE", "POSITIVE"]}, BY_NAME,
            id="booleans with names",
        ),
        pytest.param(
            {}, {"good": True, "bad": False}, Value("bool"), {"labels": ["true", "false"]},
            {"good": "true", "bad": "false"}, id="booleans by their words",
        ),
    ],
)  # fmt: skip
def test_the_exported_model_answers_in_the_names_of_the_data(tmp_path, base, labels, feature, arguments, names):
    data = text_data(tmp_path / "rows", labels, feature, **arguments)
    result = trained(bert(tmp_path / "base", **base), data, tmp_path / "run")
    assert result.summary["downstream"]["accuracy"] == 1
    assert answers(result.path / "model", [f"a {word} b" for word in labels]) == [names[word] for word in labels]
    config = AutoConfig.from_pretrained(result.path / "model")
    assert config.label2id == {name: number for number, name in config.id2label.items()}


def test_a_head_for_the_same_classes_is_kept_and_one_for_others_is_new(tmp_path):
    base = bert(tmp_path / "base", **GOOD_FIRST)
    before = AutoModelForSequenceClassification.from_pretrained(base).classifier.weight

    def weight(classes):
        return BaseModel(str(base), "sequence-classification").load(classes).classifier.weight

    assert weight(["POSITIVE", "NEGATIVE"]).equal(before) and weight(["Positive", "negative"]).equal(before)
    assert weight(2).equal(before) and weight(["0", "1"]).equal(before)
    for others in (["NEGATIVE", "POSITIVE"], ["spam", "ham"]):
        assert not (weight(others) == before).any()
    assert weight(["a", "b", "c"]).shape[0] == 3


@pytest.mark.parametrize(
    "kind", [("multi_label_classification", 6), ("multi_label_classification", 2), ("regression", 1)]
)
def test_a_base_of_another_kind_is_trained_to_tell_classes(tmp_path, kind):
    base = bert(tmp_path / "base", problem_type=kind[0], num_labels=kind[1])
    data = text_data(tmp_path / "rows", BY_NAME, batch_size=2)
    result = trained(base, data, tmp_path / "run")
    assert result.summary["downstream"]["accuracy"] == 1
    assert answers(result.path / "model", ["a good b", "c bad"]) == ["POSITIVE", "NEGATIVE"]
    assert json.loads((result.path / "model/config.json").read_text())["problem_type"] == "single_label_classification"


def test_a_loaded_model_gets_the_names_too(tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(bert(tmp_path / "base"))
    assert GivenModel(model).load(["yes", "no"]).config.id2label == {0: "yes", 1: "no"}
    with pytest.raises(ConfigError, match="has a head for 2 classes, and the data has 3"):
        GivenModel(model).load(["a", "b", "c"])


@pytest.mark.parametrize(
    ("labels", "feature", "arguments", "value", "words"),
    [
        ({"good": 0.5, "bad": 1.5}, None, {}, 0.5, "regression"),
        ({"good": [0, 1], "bad": [1]}, None, {}, "label", "several labels a row"),
        ({"good": 1, "bad": 0}, None, {"labels": ["1", "2"]}, 0, "none of the classes 1, 2"),
        ({"good": 2, "bad": 1}, None, {"labels": ["no", "yes"]}, 2, "their places in `labels`, from 0"),
        ({"good": "x", "bad": "y"}, None, {"labels": ["x", "y", "x"]}, ["x", "y", "x"], "a name twice"),
        ({"good": -1, "bad": 1}, ClassLabel(names=["no", "yes"]), {}, -1, "none of the classes no, yes; list"),
        ({"good": None, "bad": "y"}, None, {}, None, "is missing"),
    ],
)
def test_what_is_no_class_is_named_with_a_remedy(tmp_path, labels, feature, arguments, value, words):
    data = text_data(tmp_path / "rows", labels, feature, **arguments)
    problem = data.check("data.init_args", Facts())[0]
    assert words in problem.remedy
    assert problem.value == value

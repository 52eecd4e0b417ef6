"""Pairs of texts, and classes that weigh more than others."""

from collections import Counter

import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers import processors
from transformers import AutoTokenizer, BertForSequenceClassification

from fedbe.corpora import SavedCorpus
from fedbe.datamodules import IIDPartitioner, SequenceClassificationDataModule
from fedbe.errors import Facts
from fedbe.modeling.head import weigh_classes
from names.classifiers import WORDS, answers, bert, text_data, trained, words

SAME = {"max_length": 12, "text_pair_column": "other"}


def pairs(folder, **arguments) -> SequenceClassificationDataModule:
    """Whether two texts hold the same of the words "good" and "bad"."""
    draw = [(WORDS[4 + i % 2], WORDS[4 + i // 2 % 2]) for i in range(120)]
    columns = {"text": [f"a {x}" for x, _ in draw], "other": [f"b {y}" for _, y in draw]}
    rows = Dataset.from_dict(columns | {"label": ["same" if x == y else "other" for x, y in draw]})
    DatasetDict(train=rows, validation=rows.select(range(16)), test=rows.select(range(16))).save_to_disk(folder)
    return SequenceClassificationDataModule(SavedCorpus(str(folder)), IIDPartitioner(2), **SAME | arguments)


def base_for_pairs(folder):
    bert(folder)
    names = ["input_ids", "token_type_ids", "attention_mask"]
    tokenizer = words(pad_token="<pad>", bos_token="<s>", sep_token="</s>", model_input_names=names)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 2), ("</s>", 3)]
    )
    tokenizer.save_pretrained(folder)
    return folder


def test_pairs_are_encoded_as_the_tokenizer_does_and_served_as_pairs(tmp_path):
    base, data = base_for_pairs(tmp_path / "base"), pairs(tmp_path / "rows")
    result = trained(base, data, tmp_path / "run", rounds=1)
    tokenizer = AutoTokenizer.from_pretrained(base)
    sample, expected = data.test_dataset()[1], tokenizer("a bad", "b good")
    assert sample["input_ids"].tolist() == expected["input_ids"]
    assert sample["token_type_ids"].tolist() == expected["token_type_ids"] == [0, 0, 0, 0, 1, 1, 1]
    batch = next(iter(data.val_dataloader()))
    assert batch["token_type_ids"].shape == batch["input_ids"].shape
    model = BertForSequenceClassification.from_pretrained(result.path / "model")
    with torch.no_grad():
        names = [model.config.id2label[number] for number in model(**batch).logits.argmax(-1).tolist()]
    # Scored batches are sorted by length, and here all are of one length: they come in the order of the rows.
    inputs = [{"text": text, "text_pair": other} for text, other in zip(*columns(data), strict=True)]
    assert answers(result.path / "model", inputs[: len(names)]) == names


def columns(data):
    rows = data.corpus.load("validation")
    return rows["text"], rows["other"]


def test_a_pair_is_cut_and_its_column_is_checked(tmp_path):
    data = pairs(tmp_path / "rows", max_length=8)
    data.connect(AutoTokenizer.from_pretrained(base_for_pairs(tmp_path / "base")), None, 0)
    assert data.check("data.init_args", Facts()) == []
    wrong = pairs(tmp_path / "rows", text_pair_column="nothing").check("data.init_args", Facts())
    assert [problem.key for problem in wrong] == ["data.init_args.text_pair_column"]


def test_the_loss_is_the_weighted_mean_and_its_gradients_are_those_of_the_classes(tmp_path):
    model = BertForSequenceClassification.from_pretrained(bert(tmp_path)).eval()
    batch = {"input_ids": torch.tensor([[4, 7], [5, 8], [6, 9]]), "labels": torch.tensor([0, 1, 1])}
    plain = model(**batch)
    handle = weigh_classes(model, [3.0, 0.5])
    weighted = model(**batch)
    each = torch.nn.functional.cross_entropy(plain.logits, batch["labels"], reduction="none")
    torch.testing.assert_close(weighted.loss, (3 * each[0] + 0.5 * each[1] + 0.5 * each[2]) / 3)
    assert weighted.logits.equal(plain.logits) and model(input_ids=batch["input_ids"]).loss is None
    handle.remove()
    assert model(**batch).loss.equal(plain.loss)


def test_balanced_weights_make_classes_count_alike_and_a_sample_one_in_the_mean(tmp_path):
    data = text_data(tmp_path / "rows", {"good": "x", "bad": "y", "odd": "y"}, class_weights="balanced")
    result = trained(bert(tmp_path / "base"), data, tmp_path / "run", trainer={"max_steps": 2, "accelerator": "cpu"})
    counts = Counter(int(s["labels"]) for c in data.client_ids for s in data.client_dataset(c))
    assert counts == {0: 36, 1: 72} and data.loss_weights == [1.5, 0.75]
    assert result.summary["downstream"]["loss"] > 0


@pytest.mark.parametrize(
    ("weights", "key", "value"),
    [
        ({"x": 1.0}, "class_weights", "y"),
        ({"x": 1.0, "y": 2.0, "z": 1.0}, "class_weights", "z"),
        ({"x": 0.0, "y": 2.0}, "class_weights.x", 0.0),
        ({"x": float("nan"), "y": 2.0}, "class_weights.x", None),
        ("equal", "class_weights", "equal"),
    ],
)
def test_weights_that_are_none_are_refused(tmp_path, weights, key, value):
    data = text_data(tmp_path / "rows", {"good": "x", "bad": "y"}, class_weights=weights)
    (problem,) = data.check("data.init_args", Facts())
    assert problem.key == f"data.init_args.{key}" and value in (None, problem.value)

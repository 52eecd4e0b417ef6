"""Nothing is left out in silence: how many rows, why, and whose."""

import logging

import pytest
from datasets import Dataset
from transformers import BertConfig

from fedbe.data import FederatedDataModule, LeftOut, PooledData, left_out_counts, left_out_lines
from fedbe.datamodules import (
    CausalLMDataModule,
    FlippedLabels,
    NaturalPartitioner,
    SequenceClassificationDataModule,
    SizesPartitioner,
)

ROWS = {"text": ["one", "two", "", "four", None, "six", "seven"], "who": ["a", "a", "a", "b", "c", None, " "]}
HELD_OUT = {"text": ["x", ""], "who": ["a", "a"]}


def causal(corpus, tokenizer, config, partitioner, rows=ROWS) -> FederatedDataModule:
    data = CausalLMDataModule(corpus(rows, HELD_OUT, {"text": ["y"]}), partitioner, sequence_length=16)
    data.connect(tokenizer, config, seed=0)
    data.setup("fit")
    return data


def test_every_row_is_in_a_sample_or_left_out_for_a_reason(corpus, tokenizer, llama_config, caplog):
    with caplog.at_level(logging.WARNING):
        data = causal(corpus, tokenizer, llama_config, NaturalPartitioner("who", min_size=2))
    assert data.left_out == (
        LeftOut("train", "belong to nobody: no value in `who`", (5, 6)),
        LeftOut("train", "belong to nobody: `min_size` = 2 leaves out b, c", (3, 4)),
        LeftOut("train", "have no text", (2,), holder="a"),
        LeftOut("validation", "have no text", (1,)),
    )
    told = [record.getMessage() for record in caplog.records if "rows" in record.getMessage()]
    assert told[0] == "2 rows of the train split belong to nobody: no value in `who` (rows 5, 6)."
    assert "1 row of the train split has no text (1 of a; row 2)." in caplog.text
    data.setup("fit")
    assert len(data.left_out) == 4


def test_the_clients_beyond_the_most_are_named(corpus, tokenizer, llama_config):
    data = causal(corpus, tokenizer, llama_config, NaturalPartitioner("who", max_clients=1))
    assert "`max_clients` = 1 leaves out b, c" in data.left_out[1].reason


def test_a_partitioner_that_gives_out_less_is_told_of(corpus, tokenizer, llama_config):
    rows = {"text": ["a", "b", "c"]}
    data = CausalLMDataModule(corpus(rows), SizesPartitioner([1]), sequence_length=16)
    data.connect(tokenizer, llama_config, seed=0)
    data.setup("fit")
    assert [len(item.rows) for item in data.left_out] == [2]


def test_wrappers_pass_it_on(corpus, tokenizer, llama_config):
    data = causal(corpus, tokenizer, llama_config, NaturalPartitioner("who", max_clients=1))
    assert FlippedLabels(data).left_out == PooledData(data).left_out == data.left_out != ()


@pytest.mark.parametrize("bos", [True, False])
def test_a_text_without_a_token_is_no_sample_of_a_classifier(corpus, make_tokenizer, bos):
    rows = {"text": ["one", None, "three"], "label": ["x", "y", "y"], "who": ["a", "a", "b"]}
    data = SequenceClassificationDataModule(corpus(rows, rows, rows), NaturalPartitioner("who"))
    data.connect(make_tokenizer(bos=bos), BertConfig(vocab_size=200), seed=0)
    data.setup("fit")
    samples = data.validation_dataset()
    assert [int(samples[index]["labels"]) for index in range(len(samples))] == ([0, 1, 1] if bos else [0, 1])
    assert sum(len(item.rows) for item in data.left_out) == (0 if bos else 3)


@pytest.mark.parametrize("kind", ["causal", "classes"])
def test_columns_of_numbers_are_read_as_text_in_every_split(corpus, tokenizer, llama_config, decode, kind):
    train = Dataset.from_dict({"text": ["many", "few"], "label": ["x", "y"], "who": ["a", "a"]})
    numbers = Dataset.from_dict({"text": [1, 20], "label": ["x", "y"], "who": ["a", "a"]})
    if kind == "causal":
        data = CausalLMDataModule(corpus(train, numbers, numbers), NaturalPartitioner("who"), 16, pack=False)
    else:
        source = corpus(train, numbers, numbers)
        data = SequenceClassificationDataModule(source, NaturalPartitioner("who"), max_length=9)
    data.connect(tokenizer, llama_config, seed=0)
    data.setup("fit")
    assert "20" in decode(tokenizer, data.validation_dataset()[1]["input_ids"])


def test_lines_are_short_and_counts_are_json():
    items = [LeftOut("train", "have no text", tuple(range(9)), f"c{number}") for number in range(9)]
    (line,) = left_out_lines(items)
    assert line.startswith("81 rows of the train split have no text (9 of c0,") and "and 4 more; rows 0, 1" in line
    assert left_out_counts(items)[0] == {
        "split": "train", "holder": "c0", "what": "rows", "reason": "have no text", "count": 9,
    }  # fmt: skip

"""Tiny classifiers and texts that are easy to tell apart, made by the tests of what travels with a model."""

from functools import partial
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    pipeline,
)

from fedbe import Federation
from fedbe.algorithms import FedAvg
from fedbe.corpora import SavedCorpus
from fedbe.datamodules import IIDPartitioner, SequenceClassificationDataModule
from fedbe.modeling.base_model import BaseModel

WORDS = ["<pad>", "<unk>", "<s>", "</s>", "good", "bad", "odd", "a", "b", "c"]
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
LIVELY = {**SIZES, "initializer_range": 0.3}  # learns in a few steps


def words(**special: str | None) -> PreTrainedTokenizerFast:
    """One token a word; only what `special` names is a special token."""
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special.get("bos_token"):
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", **special)


def bert(folder: Path, **settings) -> Path:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(WORDS), max_position_embeddings=32, pad_token_id=0, **LIVELY, **settings)
    BertForSequenceClassification(config).save_pretrained(folder)
    words(pad_token="<pad>").save_pretrained(folder)
    return folder


def llama(folder: Path, tokenizer: PreTrainedTokenizerFast, **settings) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=32, **LIVELY, **settings)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def text_data(folder: Path, by_word: dict, feature=None, count: int = 108, **arguments):
    """Texts that contain one of the words "good", "bad" and "odd", and the label that `by_word` has for it."""
    kinds = list(by_word)
    texts = [f"{'abc'[i // 6 % 3]} {kinds[i % len(kinds)]} {'abc'[i // 18 % 3]}" for i in range(count)]
    columns = {"text": texts, "label": [by_word[kinds[i % len(kinds)]] for i in range(count)]}
    features = None if feature is None else Features({"text": Value("string"), "label": feature})
    rows = Dataset.from_dict(columns, features=features)
    DatasetDict(train=rows, validation=rows.select(range(24)), test=rows.select(range(24))).save_to_disk(folder)
    return SequenceClassificationDataModule(SavedCorpus(str(folder)), IIDPartitioner(2), max_length=16, **arguments)


def trained(base: Path | BaseModel, data, output: Path, **settings):
    """Return the result of a run that learns to tell the texts apart."""
    model = base if isinstance(base, BaseModel) else BaseModel(str(base), "sequence-classification")
    arguments = {"rounds": 1, "trainer": {"max_steps": 40, "accelerator": "cpu"}, "logger": "none"}
    arguments |= {"optimizer": partial(torch.optim.AdamW, lr=5e-3), "algorithm": FedAvg(), **settings}
    return Federation(data, model, output=output, **arguments).fit()


def answers(folder: Path, inputs: list, task: str = "text-classification", **options) -> list[str]:
    """Return what the exported model says in a pipeline that knows nothing of fedbe."""
    return [answer["label"] for answer in pipeline(task, model=str(folder), device="cpu", **options)(inputs)]


__all__ = ["LIVELY", "SIZES", "WORDS", "ClassLabel", "answers", "bert", "llama", "text_data", "trained", "words"]

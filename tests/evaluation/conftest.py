from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fedbe.errors import Facts, Problem

CHARACTERS = "abcdefghijklmnopqrstuvwxyz ?."


class MemoryCorpus:
    def __init__(self, problem: str | None = None, **splits: dict[str, list[Any]]):
        self.splits, self.problem = splits, problem

    def load(self, split: str) -> Dataset:
        return Dataset.from_dict(self.splits[split])

    def check(self, key: str, facts: Facts) -> list[Problem]:
        return [Problem(f"{key}.problem", "corpus", self.problem)] if self.problem else []


@pytest.fixture
def corpus() -> type[MemoryCorpus]:
    return MemoryCorpus


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; 0 is the padding, 1 the begin token."""
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", pad_token="<pad>", unk_token="<pad>")


@pytest.fixture
def model() -> LlamaForCausalLM:
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.5, attention_dropout=0.3,
        )  # fmt: skip
        return LlamaForCausalLM(config).train()


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16)
    return BertForSequenceClassification(config).train()

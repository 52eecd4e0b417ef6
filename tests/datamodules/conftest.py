from collections.abc import Callable
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

from fedbe.errors import Facts, Problem

CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:#?!'-\n"
SPECIAL = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<unk>"]


class MemoryCorpus:
    def __init__(self, train: Any, validation: Any = None, test: Any = None):
        held_out = {name: column[:2] for name, column in train.items()} if isinstance(train, dict) else train
        self.splits = {"train": train, "validation": validation or held_out, "test": test or held_out}
        self.loads: list[str] = []

    def load(self, split: str) -> Dataset:
        self.loads.append(split)
        rows = self.splits[split]
        return Dataset.from_dict(rows) if isinstance(rows, dict) else rows

    def check(self, key: str, facts: Facts) -> list[Problem]:
        return []


def character_tokenizer(
    bos: bool = True, eos: bool = True, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """One token a character, so that a test can read what was encoded."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("[\\s\\S]"), "isolated")
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<s>" if bos else None,
        eos_token="</s>" if eos else None,
        extra_special_tokens=SPECIAL[3:6],
    )
    tokenizer.chat_template = chat_template
    return tokenizer


def text_of(tokenizer: PreTrainedTokenizerFast, ids: Any) -> str:
    return "".join(tokenizer.convert_ids_to_tokens([int(token) for token in ids]))


@pytest.fixture
def corpus() -> Callable[..., MemoryCorpus]:
    return MemoryCorpus


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return character_tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return character_tokenizer()


@pytest.fixture
def decode() -> Callable[[PreTrainedTokenizerFast, Any], str]:
    return text_of


@pytest.fixture
def llama_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(SPECIAL) + len(CHARACTERS), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip

"""What is seen of samples: the tokens, which of them are predicted, and what is left out."""

from io import StringIO

import pytest
from rich.console import Console

from fedbe.data import LeftOut
from fedbe.datamodules import InstructionDataModule, NaturalPartitioner, SequenceClassificationDataModule
from fedbe.figures.samples import print_left_out, print_samples

ROWS = {
    "prompt": ["a", "b", "c"],
    "response": ["x", "y", "z"],
    "text": ["[bold]a", "b", "c"],
    "label": ["no", "yes", "no"],
    "who": ["ann", "ann", "bob"],
}


def shown(corpus, tokenizer, config, kind, count: int) -> str:
    stream = StringIO()
    arguments = {"template": "{prompt}: "} if kind is InstructionDataModule else {}
    data = kind(corpus(ROWS), NaturalPartitioner("who"), max_length=16, **arguments)
    data.connect(tokenizer, config, seed=0)
    data.setup("fit")
    print_samples(data, count, Console(file=stream, width=60))
    return stream.getvalue()


def test_what_is_predicted_is_marked_client_after_client(corpus, tokenizer, llama_config):
    lines = shown(corpus, tokenizer, llama_config, InstructionDataModule, 3).split("\n\n")
    assert [line.strip().splitlines()[0] for line in lines] == [
        f"{client}, sample {index}: 6 tokens, 2 of them predicted"
        for client, index in (("ann", 0), ("bob", 0), ("ann", 1))
    ]
    assert "⟦" in lines[0] and lines[0].replace(" ", "").rstrip().endswith("⟦x</s>⟧")


def test_a_class_is_named(corpus, tokenizer, llama_config):
    text = shown(corpus, tokenizer, llama_config, SequenceClassificationDataModule, 9)
    assert text.count("→ no") == 2 and text.count("→ yes") == 1


@pytest.mark.parametrize(
    ("left_out", "words"), [([], ""), ([LeftOut("train", "have [no] text", (1, 2), "ann")], "ann")]
)
def test_what_is_left_out_is_listed(left_out, words):
    stream = StringIO()
    print_left_out(left_out, Console(file=stream, width=100))
    assert words in stream.getvalue() and bool(stream.getvalue()) == bool(left_out)
    assert not left_out or "have [no] text" in stream.getvalue()

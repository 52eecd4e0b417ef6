from collections import Counter
from io import StringIO
from pathlib import Path

import matplotlib
import pytest
from PIL import Image
from rich.console import Console

from fedbe.datamodules import (
    CausalLMDataModule,
    ClientShare,
    DirichletPartitioner,
    NaturalPartitioner,
    describe_partition,
)
from fedbe.figures.partition import plot_partition, print_partition


def printed(shares: list[ClientShare]) -> str:
    stream = StringIO()
    print_partition(shares, Console(file=stream, width=120))
    return stream.getvalue()


def described(corpus, tokenizer, config, partitioner) -> list[ClientShare]:
    rows = {"text": ["Speak.", "Ay.", "No more."], "who": ["a", "b", "a"], "mood": ["calm", "calm", "angry"]}
    data = CausalLMDataModule(corpus(rows), partitioner, sequence_length=16)
    data.connect(tokenizer, config, seed=0)
    data.setup()
    return describe_partition(data)


def test_a_share_says_rows_samples_and_tokens(corpus, tokenizer, llama_config):
    shares = described(corpus, tokenizer, llama_config, NaturalPartitioner("who"))
    assert shares[0] == ClientShare("a", samples=1, rows=2, tokens=7 + 9)
    assert shares[1] == ClientShare("b", samples=1, rows=1, tokens=4)


def test_labels_are_counted_where_the_partitioner_has_a_label_column(corpus, tokenizer, llama_config):
    shares = described(corpus, tokenizer, llama_config, DirichletPartitioner(1, 1.0, "mood"))
    assert shares[0].labels == {"calm": 2, "angry": 1}


def test_the_table_names_clients_sums_and_the_most_frequent_labels():
    table = printed(
        [
            ClientShare("ann", 30, rows=40, tokens=3000, labels=Counter(a=20, b=10, c=6, d=4)),
            ClientShare("bob", 10, rows=10, tokens=1000, labels=Counter(b=10)),
        ]
    )
    for text in ("ann", "75.0 %", "25.0 %", "4,000", "a: 20, b: 10, c: 6, 1 more", "2 clients", "4 labels"):
        assert text in table


def test_names_are_printed_as_they_are():
    table = printed([ClientShare("[bold]", 3, labels=Counter({"[red]": 3}))])
    assert "[bold]" in table and "[red]: 3" in table


def test_columns_that_nothing_is_known_of_are_left_out():
    table = printed([ClientShare("ann", 3)])
    assert "tokens" not in table and "rows" not in table and "label" not in table and "samples" in table


@pytest.mark.parametrize("clients", [1, 10, 100])
@pytest.mark.parametrize("classes", [0, 3, 40])
def test_the_picture_is_written_without_touching_the_backend(tmp_path: Path, clients: int, classes: int):
    before = matplotlib.rcParams["backend"]
    labels = Counter({f"class {number}": number + 1 for number in range(classes)})
    plot_partition([ClientShare(f"client {number}", 5, labels=labels) for number in range(clients)], tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.size[0] >= 900
    assert matplotlib.rcParams["backend"] == before

"""Samples as the model sees them, and what is left out of the data."""

from collections.abc import Iterator, Sequence, Sized
from itertools import groupby
from typing import Any, cast

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from fedbe.data import IGNORED, FederatedDataModule, LeftOut

OPENS, CLOSES = "⟦", "⟧"
"""What stands around the tokens that are predicted."""


def print_samples(data: FederatedDataModule, count: int, console: Console) -> None:
    """Print samples of one client after another, what is predicted of each between ⟦ and ⟧.

    Args:
        data: The data, after its `setup`.
        count: How many samples, of different clients where there are enough.
        console: Where to print.
    """
    for client, index in spread(data, count):
        sample: Any = data.client_dataset(client)[index]
        console.print(f"\n[bold]{escape(client)}[/bold], sample {index}: {escape(described(sample))}")
        console.print(marked(sample, data.tokenizer, data.class_names), soft_wrap=True)


def print_left_out(left_out: Sequence[LeftOut], console: Console) -> None:
    """Print what is left out of the data: how much, why, and whose it is; nothing if nothing is."""
    if not left_out:
        return
    table = Table(title="What is left out")
    for name in ("split", "whose", "count", "what", "why"):
        table.add_column(name, justify="right" if name == "count" else "left")
    for item in left_out:
        whose = item.holder if item.holder is not None else ("nobody's" if item.split == "train" else "")
        table.add_row(item.split, escape(whose), f"{len(item.rows):,}", item.what, escape(item.reason))
    console.print(table)


def spread(data: FederatedDataModule, count: int) -> Iterator[tuple[str, int]]:
    """Yield clients and places of samples: the first of each client, then the second of each, and so on."""
    sizes = {client: len(cast(Sized, data.client_dataset(client))) for client in data.client_ids}
    places = ((client, index) for index in range(max(sizes.values(), default=0)) for client in sizes)
    held = (place for place in places if place[1] < sizes[place[0]])
    yield from (place for place, _ in zip(held, range(count), strict=False))


def described(sample: Any) -> str:
    """Return the size of a sample, and how much of it is predicted."""
    if "input_ids" not in sample:
        return ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in sample.items())
    tokens = f"{len(sample['input_ids'])} tokens"
    labels = sample["labels"]
    return tokens if labels.ndim == 0 else f"{tokens}, {int((labels != IGNORED).sum())} of them predicted"


def marked(sample: Any, tokenizer: PreTrainedTokenizerBase | None, names: Sequence[str] | None = None) -> Text:
    """Return a sample as text: its tokens, those to be predicted between ⟦ and ⟧, or the class behind an arrow.

    Args:
        sample: Tensors by name; without ``input_ids`` only the class is shown.
        tokenizer: What the tokens are of.
        names: The names of the classes, by number.
    """
    labels, text = sample["labels"], Text()
    ids = sample["input_ids"].tolist() if "input_ids" in sample else []
    scored = [False] * len(ids) if labels.ndim == 0 else (labels != IGNORED).tolist()
    for predicted, group in groupby(zip(ids, scored, strict=True), key=lambda pair: pair[1]):
        tokens = [token for token, _ in group]
        words = str(tokens) if tokenizer is None else str(tokenizer.decode(tokens))
        text.append(f"{OPENS}{words}{CLOSES}" if predicted else words, style="bold green" if predicted else "")
    if labels.ndim == 0:
        number = int(labels)
        text.append(f" → {names[number] if names is not None else number}", style="bold green")
    return text

"""Passages labelled by the document that they come from: classes for texts that have no labels."""

from typing import Literal

from datasets import Dataset

from fedbe.corpora.base import SPLITS, Corpus, check_split
from fedbe.errors import Facts, Problem


class Passages:
    """The lines of another corpus' documents, each with its document's number as the class.

    Lines of a document are dealt out to the three splits in turn, so that each split has a third of each document;
    documents of fewer than three lines are passed over. Columns: ``text``, ``label``. Source: ours.

    Args:
        corpus: Source of the documents.
        split: Part of that corpus whose documents are taken.
        min_characters: Shorter lines, headings for the most part, are passed over.
    """

    def __init__(
        self,
        corpus: Corpus,
        split: Literal["train", "validation", "test"] = "test",
        min_characters: int = 200,
    ) -> None:
        self.corpus = corpus
        self.split = split
        self.min_characters = min_characters

    def load(self, split: str) -> Dataset:
        """Return one split, document after document."""
        check_split(split)
        texts, labels = [], []
        for number, text in enumerate(self.corpus.load(self.split)["text"]):
            lines = [line.strip() for line in text.splitlines() if len(line.strip()) >= self.min_characters]
            own = lines[SPLITS.index(split) :: len(SPLITS)] if len(lines) >= len(SPLITS) else []
            texts += own
            labels += [number] * len(own)
        return Dataset.from_dict({"text": texts, "label": labels})

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the problems of the other corpus, and of the least length."""
        problems = self.corpus.check(f"{key}.corpus.init_args", facts)
        if self.min_characters < 1:
            problems.append(Problem(f"{key}.min_characters", self.min_characters, "must be at least 1."))
        return problems

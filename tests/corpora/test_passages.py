from datasets import Dataset

from fedbe.corpora import SPLITS, Corpus, Passages
from fedbe.errors import Facts

LONG = "A line long enough to count as a passage, number {} of document {}."


class Documents:
    """Two documents of four and three long lines, and one that is too short; of another split there are none."""

    def load(self, split):
        counts = (4, 3, 2) if split == "test" else ()
        texts = ["= Heading =\n" + "\n\n".join(LONG.format(i, j) for i in range(n)) for j, n in enumerate(counts)]
        return Dataset.from_dict({"text": texts})

    def check(self, key, facts):
        return []


def test_lines_are_dealt_out_to_the_splits_with_their_document_as_the_class():
    passages = Passages(Documents(), min_characters=30)
    rows = {split: list(zip(*passages.load(split).to_dict().values(), strict=True)) for split in SPLITS}
    line = LONG.format
    assert rows["train"] == [(line(0, 0), 0), (line(3, 0), 0), (line(0, 1), 1)]
    assert rows["validation"] == [(line(1, 0), 0), (line(1, 1), 1)]
    assert rows["test"] == [(line(2, 0), 0), (line(2, 1), 1)]


def test_documents_come_from_the_split_that_is_named():
    assert len(Passages(Documents(), split="train").load("test")) == 0


def test_a_least_length_below_one_is_a_mistake_and_the_other_corpus_is_checked():
    (problem,) = Passages(Documents(), min_characters=0).check("corpus", Facts())
    assert problem.key == "corpus.min_characters"
    missing = Passages(Passages(Documents(), min_characters=0)).check("corpus", Facts())
    assert [problem.key for problem in missing] == ["corpus.corpus.init_args.min_characters"]
    assert isinstance(Passages(Documents()), Corpus)

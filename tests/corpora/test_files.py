import gzip
import json
from itertools import chain

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset

from fedbe.corpora import SPLITS, Corpus, FilesCorpus, HubCorpus, SavedCorpus
from fedbe.errors import Facts


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of its own for each test."""
    for module in ("datasets.config", "fedbe.corpora.files"):
        monkeypatch.setattr(f"{module}.HF_DATASETS_CACHE", tmp_path / "cache")


def rows(count, start=0):
    return [{"text": f"text {number}", "speaker": str(number % 3)} for number in range(start, start + count)]


def jsonl(path, items):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(path)


def texts(corpus, split):
    return list(corpus.load(split)["text"])


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_every_format_is_recognised_by_its_ending(tmp_path, name):
    path, data = tmp_path / name, Dataset.from_list(rows(5))
    if name.endswith("parquet"):
        data.to_parquet(path)
    elif name.endswith("csv"):
        data.to_csv(path)
    else:
        jsonl(path, rows(5))
    if name.endswith("gz"):
        path.write_bytes(gzip.compress(path.read_bytes()))
    corpus = FilesCorpus(str(path), validation_fraction=0, test_fraction=0)
    assert isinstance(corpus, Corpus) and corpus.check("c", Facts()) == []
    assert texts(corpus, "train") == [row["text"] for row in rows(5)]


def test_given_splits_are_taken_as_they_are(tmp_path):
    files = {split: jsonl(tmp_path / f"{split}.jsonl", rows(4, 10 * i)) for i, split in enumerate(SPLITS)}
    corpus = FilesCorpus(**files)
    for i, split in enumerate(SPLITS):
        assert texts(corpus, split) == [row["text"] for row in rows(4, 10 * i)]


def test_missing_splits_are_held_out_of_the_training_rows(tmp_path):
    corpus = FilesCorpus(jsonl(tmp_path / "a.jsonl", rows(400)), validation_fraction=0.1, test_fraction=0.2)
    parts = {split: texts(corpus, split) for split in SPLITS}
    assert sorted(chain(*parts.values())) == sorted(row["text"] for row in rows(400))
    assert 20 < len(parts["validation"]) < 60 and 50 < len(parts["test"]) < 110


def test_only_the_missing_split_is_held_out(tmp_path):
    test = jsonl(tmp_path / "test.jsonl", rows(3, 500))
    corpus = FilesCorpus(jsonl(tmp_path / "a.jsonl", rows(200)), test=test, validation_fraction=0.2)
    assert len(texts(corpus, "train")) + len(texts(corpus, "validation")) == 200
    assert len(texts(corpus, "test")) == 3


def test_a_rows_split_does_not_depend_on_the_rows_around_it(tmp_path):
    all_rows = FilesCorpus(jsonl(tmp_path / "a.jsonl", rows(100)), test_fraction=0.3)
    reversed_half = FilesCorpus(jsonl(tmp_path / "b.jsonl", rows(100)[:50][::-1]), test_fraction=0.3)
    assert set(texts(reversed_half, "test")) == set(texts(all_rows, "test")) & {row["text"] for row in rows(50)}


def test_equal_rows_fall_into_one_split(tmp_path):
    corpus = FilesCorpus(jsonl(tmp_path / "a.jsonl", rows(20) * 5), test_fraction=0.4)
    assert not set(texts(corpus, "train")) & set(texts(corpus, "test"))


def test_columns_are_renamed_and_others_stay(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", [{"content": "x", "speaker": "s"}])
    corpus = FilesCorpus(path, columns={"content": "text"}, validation_fraction=0, test_fraction=0)
    assert corpus.check("c", Facts()) == []
    assert corpus.load("train").to_list() == [{"text": "x", "speaker": "s"}]


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "a.jsonl"
    for count in (3, 5):
        jsonl(path, rows(count))
        assert len(texts(FilesCorpus(str(path), validation_fraction=0, test_fraction=0), "train")) == count


def test_every_broken_file_is_reported_with_its_split(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"text": \nnonsense')
    columns = jsonl(tmp_path / "columns.jsonl", [{"content": "x"}])
    good = jsonl(tmp_path / "good.jsonl", rows(2))
    empty, broken = str(tmp_path / "empty.jsonl"), str(tmp_path / "broken.jsonl")
    corpus = FilesCorpus([good, columns], [empty, "absent.jsonl"], broken, columns={"speaker": "client"})
    problems = corpus.check("data.corpus", Facts())
    assert [(p.key, str(p.value).split("/")[-1]) for p in problems] == [
        ("data.corpus.train", "columns.jsonl"),
        ("data.corpus.validation", "empty.jsonl"),
        ("data.corpus.validation", "absent.jsonl"),
        ("data.corpus.test", "broken.jsonl"),
    ]
    assert "`speaker`" in problems[0].remedy and "content" in problems[0].remedy


@pytest.mark.parametrize(("train", "key"), [([], "c.train"), ("a.docx", "c.format"), ("noending", "c.format")])
def test_a_file_of_unknown_format_is_reported(train, key):
    assert [p.key for p in FilesCorpus(train).check("c", Facts())] == [key]


def test_saved_data_set_with_splits(tmp_path):
    saved = DatasetDict(train=Dataset.from_list(rows(30)), test=Dataset.from_list(rows(4, 90)))
    saved.save_to_disk(tmp_path / "saved")
    corpus = SavedCorpus(str(tmp_path / "saved"), validation_fraction=0.3)
    assert corpus.check("c", Facts()) == []
    assert texts(corpus, "test") == [row["text"] for row in rows(4, 90)]
    assert len(texts(corpus, "train")) + len(texts(corpus, "validation")) == 30


def test_saved_single_data_set_is_divided(tmp_path):
    Dataset.from_list(rows(100)).save_to_disk(tmp_path / "saved")
    corpus = SavedCorpus(str(tmp_path / "saved"), test_fraction=0.3, validation_fraction=0.2)
    found = sorted(chain(*(texts(corpus, split) for split in SPLITS)))
    assert found == sorted(row["text"] for row in rows(100))


def test_saved_data_set_that_cannot_be_used_is_reported(tmp_path):
    DatasetDict(test=Dataset.from_list([{"text": "x"}])).save_to_disk(tmp_path / "saved")
    assert [p.key for p in SavedCorpus(str(tmp_path / "absent")).check("c", Facts())] == ["c.path"]
    problems = SavedCorpus(str(tmp_path / "saved"), columns={"body": "text"}).check("c", Facts())
    remedies = [problem.remedy for problem in problems]
    assert len(remedies) == 2 and "`train`" in remedies[0] and "`body`" in remedies[1]


def test_pictures_are_divided_by_row_and_not_by_their_label(tmp_path):
    features = Features(image=Image(), label=ClassLabel(names=["cat", "dog"]), text=Value("string"))
    picture = {"bytes": b"", "path": None}
    items = {"image": [picture] * 40, "label": [0, 1] * 20, "text": [""] * 40}
    Dataset.from_dict(items, features=features).save_to_disk(tmp_path / "saved")
    corpus = SavedCorpus(str(tmp_path / "saved"), test_fraction=0.4)
    assert set(corpus.load("test").remove_columns("image")["label"]) == {0, 1}


def test_hub_data_set_is_looked_for_in_the_cache_when_offline(tmp_path, monkeypatch):
    monkeypatch.setattr("fedbe.corpora.files.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert [p.key for p in HubCorpus("someone/something").check("c", Facts())] == ["c.name"]
    (tmp_path / "hub" / "datasets--someone--something").mkdir(parents=True)
    assert HubCorpus("someone/something").check("c", Facts()) == []
    assert [p.key for p in HubCorpus("").check("c", Facts())] == ["c.name"]


def test_hub_data_set_is_loaded_by_its_own_split_names(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", [{"story": f"{i}"} for i in range(10)])
    asked = []

    def fake(name, config, split, revision):
        asked.append((name, config, split, revision))
        return load_dataset("json", data_files={"train": path}, split="train")

    monkeypatch.setattr("fedbe.corpora.files.load_dataset", fake)
    corpus = HubCorpus("a/b", "main", train="train[:10]", validation="dev", test="dev", columns={"story": "text"})
    assert len(texts(corpus, "train")) == 10 and len(texts(corpus, "test")) == 10
    assert asked == [("a/b", "main", "train[:10]", None), ("a/b", "main", "dev", None)]

"""What files hold is what is read: strings, types, formats, options, and whose a row is."""

import gzip
import json
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedbe.corpora import SPLITS, FilesCorpus
from fedbe.datamodules import NaturalPartitioner
from fedbe.errors import Facts

WHOLE = {"validation_fraction": 0.0, "test_fraction": 0.0}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    for module in ("datasets.config", "fedbe.corpora.files"):
        monkeypatch.setattr(f"{module}.HF_DATASETS_CACHE", tmp_path / "cache")


def write(path: Path, text: str, encoding: str = "utf-8") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding=encoding)
    return str(path)


def csv(path: Path, columns: dict[str, list[str]], sep: str = ",") -> str:
    lines = [sep.join(columns), *(sep.join(row) for row in zip(*columns.values(), strict=True))]
    return write(path, "\n".join(lines) + "\n")


def jsonl(path: Path, rows: list[dict]) -> str:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


WORDS = ["NA", "None", "N/A", "null", "nan", "NULL", "007", "7", "1.10", "1e3", "True", "-0", "+5", "0x1A", " x", "inf"]


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cells=st.lists(st.sampled_from(WORDS), min_size=1, max_size=6))
def test_cells_of_a_csv_are_the_strings_in_the_file(tmp_path, cells):
    path = csv(tmp_path / "a.csv", {"site": cells, "more": ["x"] * len(cells)})
    assert [str(value) for value in FilesCorpus(path, **WHOLE).load("train")["site"]] == cells


def test_an_empty_cell_is_no_value_and_others_are_each_a_client_of_their_own(tmp_path):
    path = csv(tmp_path / "a.csv", {"text": list("abcdef"), "site": ["NA", "007", "7", "None", "", "NA"]})
    rows = FilesCorpus(path, **WHOLE).load("train")
    clients = NaturalPartitioner("site").partition(rows, seed=0)
    assert {name: len(held) for name, held in clients.items()} == {"NA": 2, "007": 1, "7": 1, "None": 1}


@pytest.mark.parametrize(
    ("values", "kind"), [(["3", "1", ""], "int64"), (["0.5", "1.25"], "float64"), (["1", "02"], "string")]
)
def test_a_csv_column_is_of_numbers_where_nothing_is_lost(tmp_path, values, kind):
    path = csv(tmp_path / "a.csv", {"label": values, "text": ["x"] * len(values)})
    assert FilesCorpus(path, **WHOLE).load("train").features["label"].dtype == kind


def test_all_splits_have_one_type_whatever_their_formats(tmp_path):
    train = csv(tmp_path / "train.csv", {"text": ["many", "3"], "id": ["1", "2"], "label": ["0", "x"]})
    validation = jsonl(tmp_path / "validation.jsonl", [{"text": 4, "id": 7, "label": 0}])
    test = tmp_path / "test.parquet"
    Dataset.from_dict({"text": [5], "id": ["8"], "label": ["x"]}).to_parquet(test)
    corpus = FilesCorpus(train, validation, str(test))
    assert corpus.check("c", Facts()) == []
    splits = [corpus.load(split) for split in SPLITS]
    assert [set(map(str, rows.features.values())) for rows in splits] == [{"Value('string')"}] * 3
    assert [list(rows["text"]) for rows in splits] == [["many", "3"], ["4"], ["5"]]


def test_files_of_one_split_may_differ_in_types_and_columns(tmp_path):
    files = [
        jsonl(tmp_path / "a.jsonl", [{"text": "x", "id": 1}]),
        jsonl(tmp_path / "b.jsonl", [{"text": "y", "id": "b", "note": "n"}]),
    ]
    rows = FilesCorpus(files, **WHOLE).load("train")
    assert list(rows["id"]) == ["1", "b"] and list(rows["note"]) == [None, "n"]


@pytest.mark.parametrize(
    ("name", "text", "encoding", "arguments"),
    [
        ("a.csv", "who;text\nx;Küche, Bad\n", "latin-1", {"sep": ";", "encoding": "latin-1"}),
        ("a.tsv", "who\ttext\nx\tKüche, Bad\n", "utf-8", {}),
        ("a.csv", "# note\nwho,text\nx,'Küche, Bad'\n", "utf-8", {"options": {"quotechar": "'", "skiprows": 1}}),
        (
            "a.json",
            '{"version": 1, "data": [{"who": "x", "text": "Küche, Bad"}]}',
            "utf-8",
            {"options": {"field": "data"}},
        ),
        ("a.dat", 'who,text\nx,"Küche, Bad"\n', "utf-16", {"format": "csv", "encoding": "utf-16"}),
    ],
)
def test_readers_take_their_options(tmp_path, name, text, encoding, arguments):
    corpus = FilesCorpus(write(tmp_path / name, text, encoding), **arguments, **WHOLE)
    assert corpus.check("c", Facts()) == []
    assert corpus.load("train").to_list() == [{"who": "x", "text": "Küche, Bad"}]


@pytest.mark.parametrize(
    ("text", "arguments", "key", "words"),
    [
        ("who;text\nx;y\n", {}, "c.train", "set `sep`"),
        ("who,text\nx,y\n", {"options": {"separator": ","}}, "c.options.separator", "csv"),
        ("who,text\nx,K\udcfcche\n", {}, "c.train", "`encoding`"),
        ("who,client\nx,y\n", {"file_column": "who"}, "c.train", "already"),
        ("who,client\nx,y\n", {"files": {"a": "a.csv"}}, "c.train", "either"),
        ("a\n1\n", {"format": "xlsx"}, "c.format", "csv"),
    ],
)
def test_what_cannot_be_read_is_reported_with_the_key_that_mends_it(tmp_path, text, arguments, key, words):
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    (problem,) = FilesCorpus(str(path), **arguments).check("c", Facts())
    assert problem.key == key and words in problem.remedy


@pytest.mark.parametrize("pattern", ["*.jsonl", "**/*.jsonl", "deep/b.jsonl"])
def test_patterns_mean_the_files_that_fit(tmp_path, pattern):
    jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    jsonl(tmp_path / "deep" / "b.jsonl", [{"text": "b"}])
    corpus = FilesCorpus(str(tmp_path / pattern), **WHOLE)
    assert corpus.check("c", Facts()) == []
    assert list(corpus.load("train")["text"]) == {"*.jsonl": ["a"], "**/*.jsonl": ["a", "b"]}.get(pattern, ["b"])


def test_a_pattern_without_files_is_reported(tmp_path):
    (problem,) = FilesCorpus(str(tmp_path / "*.jsonl")).check("c", Facts())
    assert (problem.key, problem.remedy) == ("c.train", "no file fits this pattern.")


def test_a_folder_of_documents_is_a_row_a_file(tmp_path):
    folder = tmp_path / "letters"
    write(folder / "b.txt", "two\n\nparagraphs\n")
    write(folder / "ward 3" / "a.txt", "one")
    (folder / "c.txt.gz").write_bytes(gzip.compress(b"packed"))
    write(folder / ".hidden.txt", "no")
    write(folder / "notes.docx", "no")
    corpus = FilesCorpus(str(folder), file_column="file", **WHOLE)
    assert corpus.check("c", Facts()) == []
    assert dict(zip(*corpus.load("train").to_dict().values(), strict=True)) == {
        "two\n\nparagraphs\n": "b", "packed": "c", "one": "ward 3/a",
    }  # fmt: skip
    assert list(FilesCorpus(str(folder / "b.txt"), **WHOLE).load("train")["text"]) == ["two", "", "paragraphs"]


def test_one_file_a_client(tmp_path):
    files = {
        "Charité": csv(tmp_path / "a.csv", {"text": ["a", "same"], "age": ["70", "8"]}),
        "St Mary's": [
            jsonl(tmp_path / "b.jsonl", [{"text": "b", "age": 9}]),
            jsonl(tmp_path / "c.jsonl", [{"text": "same", "age": 8}]),
        ],
    }
    corpus = FilesCorpus(files=files, **WHOLE)
    assert corpus.check("c", Facts()) == []
    rows = corpus.load("train")
    assert {name: len(held) for name, held in NaturalPartitioner("client").partition(rows, 0).items()} == {
        "Charité": 2, "St Mary's": 2,
    }  # fmt: skip
    assert rows.features["age"].dtype == "int64"
    divided = FilesCorpus(files=files, test_fraction=0.5, validation_fraction=0.2, seed=3)
    homes = [split for split in SPLITS if "same" in divided.load(split)["text"]]
    assert len(homes) == 1, "equal rows of two clients fall into one split"


def test_the_file_names_clients_and_equal_names_in_two_folders_stay_apart(tmp_path):
    files = [csv(tmp_path / site / "data.csv", {"text": ["a"], "n": ["1"]}) for site in ("north", "south")]
    rows = FilesCorpus(files, file_column="hospital", **WHOLE).load("train")
    assert list(rows["hospital"]) == ["north/data", "south/data"]


def test_a_missing_file_of_a_client_is_reported_with_the_client(tmp_path):
    (problem,) = FilesCorpus(files={"a": str(tmp_path / "none.csv")}).check("c", Facts())
    assert problem.key == "c.files.a"

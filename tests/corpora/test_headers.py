from collections import Counter

import pytest

from fedbe.corpora import SPLITS, Corpus, TorchHeaders
from fedbe.corpora.headers import LIBRARIES, strip_boilerplate
from fedbe.errors import Facts


@pytest.fixture
def folder(tmp_path):
    for library in ("one", "two/three"):
        for number in range(20):
            file = tmp_path / library / "deep" / f"{number}.h"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"// Copyright someone\n\nint {'x' * 100}_{number};\n")
        (tmp_path / library / "readme.txt").write_text("not a header")
    return tmp_path


def headers(folder, **arguments):
    return TorchHeaders(["one", "two/three"], root=str(folder), **arguments)


@pytest.mark.parametrize("split", SPLITS)
def test_the_installation_has_text_of_all_ten_libraries(split):
    corpus = TorchHeaders()
    assert isinstance(corpus, Corpus) and corpus.check("corpus", Facts()) == []
    rows = corpus.load(split)
    assert set(rows["library"]) == set(LIBRARIES) and len(LIBRARIES) == 10
    assert all(text.strip() for text in rows["text"])


def test_no_file_is_in_two_splits_and_none_is_lost(folder):
    corpus = headers(folder)
    paths = Counter(path for split in SPLITS for path in corpus.load(split)["path"])
    assert set(paths.values()) == {1} and len(paths) == 40


def test_columns_say_where_a_text_comes_from(folder):
    for row in headers(folder).load("train"):
        assert row["path"].startswith(row["library"] + "/")
        assert row["text"] == f"int {'x' * 100}_{row['path'].split('/')[-1].removesuffix('.h')};\n"


def test_characters_of_a_library_are_limited_in_each_split(folder):
    corpus = headers(folder, max_characters=1000, validation_fraction=0.1, test_fraction=0.2)
    for split, most in (("train", 700), ("validation", 100), ("test", 200)):
        rows = corpus.load(split)
        for library in corpus.libraries:
            assert sum(len(row["text"]) for row in rows if row["library"] == library) == most


def test_limiting_the_training_text_leaves_the_same_test_files_first(folder):
    everything, some = headers(folder).load("test"), headers(folder, max_characters=1000).load("test")
    assert set(some["path"]) <= set(everything["path"])


def test_guard_and_licence_are_taken_off_and_documentation_stays():
    text = (
        "#if !defined(TORCH_STABLE_ONLY) && !defined(TORCH_TARGET_VERSION)\n/*\n Copyright (c) X\n*/\n"
        "// SPDX-License-Identifier: MIT\n\n// What this is for.\nint a;\n\n#else\n"
        '#error "This file should not be included when it is."\n#endif  // !defined(X)\n'
    )
    assert strip_boilerplate(text) == "// What this is for.\nint a;\n"


def test_mistakes_are_reported_with_their_keys(folder):
    corpus = TorchHeaders(["one", "none"], max_characters=0, test_fraction=1.5, root=str(folder))
    assert [p.key for p in corpus.check("c", Facts())] == ["c.test_fraction", "c.max_characters", "c.libraries"]
    assert [p.key for p in TorchHeaders([]).check("c", Facts())] == ["c.libraries"]

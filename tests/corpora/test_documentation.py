import time

import pytest

from fedbe.corpora import SPLITS, Corpus, Described, InstalledDocumentation, split_of
from fedbe.corpora.documentation import docstrings, licence_of
from fedbe.corpora.paragraphs import paragraph_key
from fedbe.errors import Facts

SHARED = "This paragraph stands in every module of this package, word for word."


@pytest.fixture
def package(tmp_path):
    """A package of 60 modules that share one paragraph and have one of their own."""
    folder = tmp_path / "pack"
    folder.mkdir()
    for number in range(60):
        own = f"module_{number} = {number}"
        (folder / f"module_{number}.py").write_text(f'"""{own}\n\n{SHARED}\n"""\n')
    return InstalledDocumentation(["pack"], str(tmp_path), validation_fraction=0.2, test_fraction=0.2)


def test_docstrings_come_in_source_order_and_code_does_not_run(tmp_path):
    source = tmp_path / "module.py"
    source.write_text(
        '"""Module."""\nraise SystemExit\nclass A:\n    """Class.\n\n    More.\n    """\n'
        '    async def f(self):\n        """Method."""\ndef g():\n    "Function."\nx = "not one"\n'
    )
    assert docstrings(source) == "Module.\n\nClass.\n\nMore.\n\nMethod.\n\nFunction."


def test_a_file_that_is_no_python_gives_nothing(tmp_path):
    source = tmp_path / "template.py"
    source.write_text("def {{ name }}(:")
    assert docstrings(source) == ""


def test_each_module_is_in_the_split_that_its_name_hashes_into(package):
    for split in SPLITS:
        names = package.load(split)["name"]
        assert len(names) > 0
        assert all(split_of(name, 0.2, 0.2) == split for name in names)


def test_no_paragraph_of_a_held_out_document_is_trained_on(package):
    paragraphs = {
        split: [paragraph for text in package.load(split)["text"] for paragraph in text.split("\n\n")]
        for split in SPLITS
    }
    assert paragraphs["test"].count(SHARED) == 1
    assert SHARED not in paragraphs["validation"] + paragraphs["train"]
    assert sum(map(len, paragraphs.values())) == 61


def test_held_out_documents_stay_held_out_when_other_modules_come_and_go(package, tmp_path):
    before = set(package.load("test")["name"])
    (tmp_path / "pack" / "zz_new.py").write_text('"""Something new."""')
    (tmp_path / "pack" / "module_0.py").unlink()
    after = set(InstalledDocumentation(["pack"], str(tmp_path), 0.2, 0.2).load("test")["name"])
    assert before - {"pack.module_0"} <= after


def test_tests_and_foreign_packages_are_left_out(tmp_path):
    for place in ("pack/tests", "other"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "module.py").write_text('"""Unwanted."""')
    (tmp_path / "pack" / "__init__.py").write_text('"""Wanted."""')
    rows = InstalledDocumentation(["pack"], str(tmp_path), 0, 0).load("train")
    assert rows.to_list() == [{"name": "pack", "text": "Wanted."}]


def test_the_installations_held_out_split_is_quick_and_large_enough():
    corpus = InstalledDocumentation()
    assert isinstance(corpus, Corpus) and isinstance(corpus, Described)
    assert corpus.check("corpus", Facts()) == []
    start = time.process_time()
    rows = corpus.load("test")
    assert time.process_time() - start < 10
    assert sum(map(len, rows["text"])) > 200_000
    assert "name" in rows.column_names
    assert any(name.startswith("pydoc_data.topics.") for name in rows["name"])


def test_installations_validation_split_shares_no_paragraph_with_its_test_split():
    corpus = InstalledDocumentation(["jsonargparse", "fsspec"], test_fraction=0.05)
    keys = [
        {paragraph_key(paragraph) for text in corpus.load(split)["text"] for paragraph in text.split("\n\n")}
        for split in ("test", "validation")
    ]
    assert keys[0] and keys[1] and not keys[0] & keys[1]


def test_description_names_versions_and_licences():
    assert "torch" in InstalledDocumentation().describe()
    assert licence_of("jsonargparse") == "MIT"


def test_mistakes_are_reported_with_their_keys(tmp_path):
    assert [p.key for p in InstalledDocumentation(root=str(tmp_path / "none")).check("c", Facts())] == ["c.root"]
    assert [p.key for p in InstalledDocumentation(["absent"], str(tmp_path)).check("c", Facts())] == ["c.packages"]
    assert [p.key for p in InstalledDocumentation(test_fraction=2).check("c", Facts())] == ["c.test_fraction"]


def test_unknown_split_is_refused(package):
    with pytest.raises(ValueError, match="dev"):
        package.load("dev")

from itertools import chain
from pathlib import Path

import pytest
from PIL import Image

from fedbe.corpora import SPLITS, ImageFolder
from fedbe.errors import Facts

FLAT = [f"{name}/{number}.png" for name in ("ward", "home") for number in range(20)]


def folder(root: Path, files: list[str]) -> str:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (3, 2)).save(root / file)
    return str(root)


def files_of(corpus: ImageFolder) -> dict[str, list[str]]:
    return {split: list(corpus.load(split)["file"]) for split in SPLITS}


def test_folders_are_classes_and_every_picture_is_in_one_split(tmp_path):
    corpus = ImageFolder(folder(tmp_path, FLAT), validation_fraction=0.3, test_fraction=0.3)
    assert corpus.check("data", Facts()) == []
    files = files_of(corpus)
    assert sorted(chain(*files.values())) == sorted(FLAT) and all(files.values())
    for row in corpus.load("train"):
        assert corpus.load("train").features["label"].names[row["label"]] == row["file"].split("/")[0]
        assert row["image"].size == (3, 2)


def test_the_split_follows_from_the_seed_and_the_files_names_and_not_from_where_they_lie(tmp_path):
    first, second = (ImageFolder(folder(tmp_path / place, FLAT), 0.3, 0.3) for place in ("a", "b"))
    assert files_of(first) == files_of(second)
    assert files_of(first) != files_of(ImageFolder(str(tmp_path / "a"), 0.3, 0.3, seed=1))


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_folders_of_splits_are_the_splits(tmp_path, name):
    files = [f"{split}/{kind}/{number}.jpg" for split in ("train", name, "test") for kind in "ab" for number in "01"]
    corpus = ImageFolder(folder(tmp_path, files))
    assert corpus.check("data", Facts()) == []
    assert {split: set(found) for split, found in files_of(corpus).items()} == {
        split: {file for file in files if file.startswith(start)}
        for split, start in zip(SPLITS, ("train", name, "test"), strict=True)
    }


def test_only_what_has_no_folder_is_drawn_from_the_training_pictures(tmp_path):
    files = [*(f"train/{file}" for file in FLAT), "test/home/x.png", "test/ward/y.png"]
    found = files_of(ImageFolder(folder(tmp_path, files), validation_fraction=0.3))
    assert found["test"] == ["test/home/x.png", "test/ward/y.png"]
    assert found["validation"] and len(found["validation"]) + len(found["train"]) == len(FLAT)


def test_a_class_may_be_called_train_and_what_is_no_picture_is_counted(tmp_path, caplog):
    corpus = ImageFolder(folder(tmp_path, ["train/1.png", "bus/1.png", "bus/deeper/2.png"]), 0.0, 0.0)
    (tmp_path / "bus" / "notes.txt").write_text("a note")
    (tmp_path / "bus" / ".hidden").write_text("")
    assert corpus.check("data", Facts()) == []
    assert corpus.load("train").features["label"].names == ["bus", "train"] and len(corpus.load("train")) == 3
    assert "1 files" in caplog.text and "notes.txt" in caplog.text


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["a/1.png", "2.png"], "2.png lies in no class's folder"),
        (["train/a/1.png", "other/1.png"], "has folders beside `train`"),
        (["train/a/1.png", "test/b/1.png"], "class 'b' has pictures for test and none to train on"),
        ([], "there is no such folder"),
    ],
)
def test_a_folder_of_another_form_is_refused(tmp_path, files, words):
    (problem,) = ImageFolder(folder(tmp_path / "pictures", files)).check("data.init_args.corpus", Facts())
    assert problem.key == "data.init_args.corpus.path" and words in problem.remedy


def test_a_folder_without_pictures_and_a_broken_picture_are_named(tmp_path):
    (problem,) = ImageFolder(str(tmp_path)).check("corpus", Facts())
    assert "holds no pictures" in problem.remedy
    folder(tmp_path, FLAT)
    (tmp_path / FLAT[3]).write_bytes(b"not a picture")
    (problem,) = ImageFolder(str(tmp_path)).check("corpus", Facts())
    assert f"1 pictures cannot be opened, such as {FLAT[3]}" in problem.remedy

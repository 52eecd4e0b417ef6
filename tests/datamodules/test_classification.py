from itertools import chain

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as Pictures
from transformers import BitImageProcessor, RobertaConfig, ViTConfig, ViTForImageClassification

from fedbe.datamodules import IIDPartitioner, ImageClassificationDataModule, SequenceClassificationDataModule
from fedbe.errors import ConfigError, Facts

ROWS = {"text": ["good", "bad", "fine day", "poor"], "label": ["pos", "neg", "pos", "neg"]}


def module(corpus, tokenizer, config, rows=ROWS, held_out=None, **arguments) -> SequenceClassificationDataModule:
    data = SequenceClassificationDataModule(
        corpus(rows, held_out, held_out), IIDPartitioner(2), **{"max_length": 32, **arguments}
    )
    data.connect(tokenizer, config, seed=0)
    data.setup()
    return data


def test_classes_are_the_sorted_strings_of_the_training_split(corpus, tokenizer, llama_config):
    data = module(corpus, tokenizer, llama_config)
    assert (data.num_labels, data.label_set.names) == (2, ["neg", "pos"])
    assert [data.validation_dataset()[index]["labels"].item() for index in range(2)] == [1, 0]
    assert data.client_labels("0").total() == 2


def test_the_number_of_classes_is_known_before_a_model_is_connected(corpus):
    assert SequenceClassificationDataModule(corpus(ROWS), IIDPartitioner(2)).num_labels == 2


@pytest.mark.parametrize(
    ("values", "labels", "names", "classes"),
    [
        ([7, 3, 7, 9], None, ["3", "7", "9"], [1, 0]),
        ([0, 2, 0, 2], ["a", "b", "c"], ["a", "b", "c"], [0, 2]),
        (["x", "y", "x", "y"], ["y", "x", "z"], ["y", "x", "z"], [1, 0]),
        ([True, False, True, True], None, ["False", "True"], [1, 0]),
    ],
)
def test_other_kinds_of_labels(corpus, tokenizer, llama_config, values, labels, names, classes):
    data = module(corpus, tokenizer, llama_config, {"text": list("abcd"), "label": values}, labels=labels)
    assert data.label_set.names == names
    assert [data.validation_dataset()[index]["labels"].item() for index in range(2)] == classes


def test_a_class_label_column_brings_its_own_names(corpus, tokenizer, llama_config):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "maybe", "yes"])})
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [2, 0]}, features=features)
    data = module(corpus, tokenizer, llama_config, rows, rows)
    assert (data.num_labels, data.label_set.names[1]) == (3, "maybe")
    assert set(data.client_labels("0") + data.client_labels("1")) == {"yes", "no"}


def test_batches_are_truncated_and_padded_with_a_class_each(corpus, tokenizer, llama_config, decode):
    data = module(corpus, tokenizer, llama_config, max_length=5)
    (batch,) = data.test_dataloader()
    assert decode(tokenizer, batch["input_ids"][1]) == "<s>bad<pad>"
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 1, 1, 0]]
    assert batch["labels"].tolist() == [1, 0]


def test_what_is_scored_comes_in_batches_of_similar_length_and_each_sample_once(corpus, tokenizer, llama_config):
    texts = ["a", "a a a a a a", "a a", "a a a a a", "a"]
    rows = {"text": texts, "label": ["x", "y", "x", "y", "x"]}
    data = module(corpus, tokenizer, llama_config, rows, rows, eval_batch_size=2)
    batches = list(data.val_dataloader())
    lengths = [batch["attention_mask"].sum(1).tolist() for batch in batches]
    assert lengths == [sorted(batch, reverse=True) for batch in lengths]
    assert [*chain(*lengths)] == sorted(data.validation_dataset().lengths, reverse=True)
    assert sorted(int(label) for batch in batches for label in batch["labels"]) == [0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("rows", "held_out", "key", "value"),
    [
        (ROWS, {"text": ["a"], "label": ["mixed"]}, "label_column", "mixed"),
        ({"text": ["a", "b"], "label": ["x", None]}, {"text": ["a"], "label": ["x"]}, "label_column", None),
        ({"text": ["a", "b"], "label": ["x", "x"]}, None, "label_column", ["x"]),
        ({"text": ["a", "b"], "label": [0.5, 1.5]}, None, "label_column", 0.5),
        ({"text": ["a", "b"], "label": [[1], [2]]}, None, "label_column", "label"),
        ({"text": ["a", "b"]}, None, "label_column", "label"),
    ],
)
def test_bad_labels_are_reported(corpus, rows: dict, held_out, key: str, value: object):
    data = SequenceClassificationDataModule(corpus(rows, held_out, held_out), IIDPartitioner(2))
    problem = data.check("data.init_args", Facts())[0]
    assert (problem.key, problem.value) == (f"data.init_args.{key}", value)


def test_roberta_has_fewer_positions_than_its_configuration_says(corpus, tokenizer):
    data = SequenceClassificationDataModule(corpus(ROWS), IIDPartitioner(2), max_length=513)
    with pytest.raises(ConfigError, match="has 512 positions"):
        data.connect(tokenizer, RobertaConfig(vocab_size=200, max_position_embeddings=514), seed=0)


def pictures(count: int = 4) -> Dataset:
    shades = [Pictures.new("RGB", (6, 4), (number * 60, 0, 255)) for number in range(count)]
    rows = {"image": shades, "label": [number % 2 for number in range(count)]}
    return Dataset.from_dict(rows, features=Features({"image": Image(), "label": Value("int64")}))


VIT = ViTConfig(
    image_size=8,
    patch_size=4,
    hidden_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    num_labels=2,
)


def image_module(corpus, rows: Dataset, processor: object = None) -> ImageClassificationDataModule:
    data = ImageClassificationDataModule(corpus(rows), IIDPartitioner(2))
    data.connect(processor, VIT, seed=0)
    data.setup()
    return data


def test_pictures_are_resized_to_the_model_and_normalised_where_there_is_no_processor(corpus):
    data = image_module(corpus, pictures())
    (batch,) = data.test_dataloader()
    assert batch["pixel_values"].shape == (4, 3, 8, 8)
    np.testing.assert_allclose(batch["pixel_values"][1, :, 3, 3], [60 / 127.5 - 1, -1, 1], atol=1e-6)
    assert ViTForImageClassification(VIT)(**batch).logits.shape == (4, 2)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"image_mean": [0.0, 0.1, 1.0], "image_std": [1.0, 1.0, 2.0]},
        {"resample": 3},
        {"do_rescale": False},
        {"rescale_factor": 1 / 127.5, "do_normalize": False},
        {"size": {"shortest_edge": 12}, "do_center_crop": True, "crop_size": {"height": 8, "width": 8}},
        {"size": {"height": 10, "width": 10}, "do_center_crop": True, "crop_size": {"height": 8, "width": 8}},
        {"do_resize": False, "do_center_crop": True, "crop_size": {"height": 8, "width": 8}},
    ],
)
def test_pictures_are_what_the_models_own_processor_makes_of_them(corpus, settings):
    processor = BitImageProcessor(**{"size": {"height": 8, "width": 8}, "do_center_crop": False, **settings})
    rows = pictures()
    data = image_module(corpus, rows, processor)
    expected = [processor(images=row["image"], return_tensors="pt")["pixel_values"][0] for row in rows]
    found = [data.test_dataset()[index]["pixel_values"] for index in range(len(rows))]
    assert all(pixels.equal(other) for pixels, other in zip(found, expected, strict=True))


def test_pictures_of_any_mode_reach_a_model_of_one_channel_and_of_three(corpus):
    shade = Pictures.new("RGB", (6, 4), (200, 0, 0))
    modes = {"image": [shade.convert(mode) for mode in ("RGB", "L", "RGBA", "P", "CMYK", "1")], "label": [0, 1] * 3}
    rows = Dataset.from_dict(modes, features=Features({"image": Image(), "label": Value("int64")}))
    for channels in (1, 3):
        config = ViTConfig(**VIT.to_dict() | {"num_channels": channels})
        data = ImageClassificationDataModule(corpus(rows), IIDPartitioner(2))
        data.connect(None, config, seed=0)
        data.setup()
        (batch,) = data.test_dataloader()
        assert batch["pixel_values"].shape == (6, channels, 8, 8)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"size": {"shortest_edge": 8}, "do_center_crop": False}, "unequal shapes"),
        ({"size": {"height": 12, "width": 12}, "do_center_crop": False}, "does not take pictures of shape"),
    ],
)
def test_a_processor_that_does_not_fit_the_model_is_refused(corpus, settings, words):
    data = ImageClassificationDataModule(corpus(pictures()), IIDPartitioner(2))
    with pytest.raises(ConfigError, match=words) as raised:
        data.connect(BitImageProcessor(**settings), VIT, seed=0)
    assert raised.value.problems[0].key == "model.name"


def test_a_text_model_and_a_column_without_pictures_are_refused(corpus, llama_config):
    data = ImageClassificationDataModule(corpus(pictures()), IIDPartitioner(2))
    with pytest.raises(ConfigError, match="does not take pictures"):
        data.connect(None, llama_config, seed=0)
    no_pictures = ImageClassificationDataModule(corpus(ROWS), IIDPartitioner(2), image_column="text")
    assert [problem.key for problem in no_pictures.check("data.init_args", Facts())] == ["data.init_args.image_column"]


def test_a_missing_picture_is_reported(corpus):
    rows = Dataset.from_dict(
        {"image": [Pictures.new("RGB", (4, 4)), None], "label": [0, 1]},
        features=Features({"image": Image(), "label": Value("int64")}),
    )
    (problem,) = ImageClassificationDataModule(corpus(rows), IIDPartitioner(2)).check("data.init_args", Facts())
    assert "1 rows of the train split have no picture" in problem.remedy

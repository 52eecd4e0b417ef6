"""Models of pictures: which are trained, and which are refused before the start."""

import numpy as np
import pytest
from datasets import Dataset, DatasetDict
from PIL import Image
from transformers import (
    BitImageProcessor,
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    pipeline,
)

from fedbe import Federation
from fedbe.algorithms import BlockExpansion, FedAvg
from fedbe.corpora import SavedCorpus
from fedbe.datamodules import IIDPartitioner, ImageClassificationDataModule
from fedbe.errors import ConfigError
from fedbe.modeling.base_model import BaseModel


def run(tmp_path, model, algorithm):
    shades = [Image.fromarray(np.full((20, 30, 3), 250 * (i % 2), np.uint8)) for i in range(32)]
    rows = Dataset.from_dict({"image": shades, "label": ["light" if i % 2 else "dark" for i in range(32)]})
    DatasetDict(train=rows, validation=rows.select(range(4)), test=rows.select(range(4))).save_to_disk(
        tmp_path / "rows"
    )
    model.save_pretrained(tmp_path / "base")
    size = {"height": 32, "width": 32}
    BitImageProcessor(size=size, do_center_crop=False).save_pretrained(tmp_path / "base")
    data = ImageClassificationDataModule(
        SavedCorpus(str(tmp_path / "rows")), IIDPartitioner(2), class_weights="balanced"
    )
    base = BaseModel(str(tmp_path / "base"), "image-classification")
    trainer = {"max_steps": 4, "accelerator": "cpu"}
    federation = Federation(data, base, algorithm, rounds=2, trainer=trainer, logger="none", output=tmp_path / "run")
    return federation.fit()


def resnet():
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 8], "depths": [1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes))


def test_a_model_without_a_list_of_blocks_has_none_to_expand(tmp_path):
    with pytest.raises(ConfigError, match="states no number of blocks") as raised:
        run(tmp_path, resnet(), BlockExpansion())
    assert raised.value.problems[0].key == "algorithm.init_args.positions"


def test_batch_norms_that_would_be_trained_are_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="batch norms that would be trained") as raised:
        run(tmp_path, resnet(), FedAvg())
    assert raised.value.problems[0].key == "model.name"


def test_a_convolutional_model_with_layer_norms_is_trained_and_served_by_name(tmp_path):
    sizes = {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2, "initializer_range": 0.3}
    result = run(
        tmp_path, ConvNextForImageClassification(ConvNextConfig(**sizes, layer_scale_init_value=1.0)), FedAvg()
    )
    pictures = [Image.fromarray(np.full((20, 30, 3), value, np.uint8)) for value in (250, 0)]
    classify = pipeline("image-classification", model=str(result.path / "model"), device="cpu")
    assert result.summary["downstream"]["accuracy"] == 1
    assert [classify(picture)[0]["label"] for picture in pictures] == ["light", "dark"]

"""Image classification: one class for each picture."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from fedbe.corpora import SPLITS, Corpus
from fedbe.datamodules.classification import LabelledDataModule
from fedbe.datamodules.flower import FlowerPartitioner
from fedbe.datamodules.partition import Partitioner
from fedbe.errors import Problem
from fedbe.modeling.images import default_processor, pixel_values, processor_fault, takes_pictures


class ImageClassificationDataModule(LabelledDataModule):
    """Pictures and their classes, for ViT and its kin.

    Pictures are decoded when they are asked for and prepared by the model's own image processor, which `connect`
    receives in place of a tokenizer and which is exported with the model; without one, by
    `fedbe.modeling.images.default_processor`. Batches hold ``pixel_values``, ``[samples, channels, height, width]``,
    float32, and ``labels``, ``[samples]``.

    Args:
        corpus: Source of the three splits, such as `fedbe.corpora.ImageFolder`; pictures are `datasets.Image` columns.
        partitioner: Rule that gives each client its rows.
        image_column: Column of the picture.
        label_column: Column of the class: strings, integers, booleans or a `datasets.ClassLabel`.
        labels: Names of the classes in order, see `LabelSet`; ``None`` to take those of the training split.
        batch_size: Samples in a client's local step.
        eval_batch_size: Samples in a validation or test batch; ``None`` for four times `batch_size`.
        class_weights: What a sample weighs in the clients' loss, see `LabelledDataModule`.
    """

    def __init__(
        self,
        corpus: Corpus,
        partitioner: Partitioner | FlowerPartitioner,
        image_column: str = "image",
        label_column: str = "label",
        labels: list[str] | None = None,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
        class_weights: Literal["balanced"] | dict[str, float] | None = None,
    ) -> None:
        super().__init__(corpus, partitioner, label_column, labels, batch_size, eval_batch_size, class_weights)
        self.image_column = image_column

    def _columns(self) -> Mapping[str, str]:
        return {"image_column": self.image_column, "label_column": self.label_column}

    @property
    def processor(self) -> Any:
        """What prepares pictures for the connected model.

        Raises:
            RuntimeError: None is connected yet.
        """
        if self.model_config is None:
            raise RuntimeError("`setup` needs the model's configuration; call `connect` first.")
        return self.tokenizer or default_processor(self.model_config)

    def _model_problems(self, key: str) -> list[Problem]:
        config = self.model_config
        if config is None:
            return []
        name = config.name_or_path or config.model_type
        if not takes_pictures(config):
            return [Problem("model.name", name, "does not take pictures; name an image model.")]
        fault = processor_fault(self.processor, config)
        return [Problem("model.name", name, fault)] if fault else []

    def _row_problems(self, start: str) -> list[Problem]:
        faults = (self._picture_fault(split) for split in SPLITS)
        fault = next((fault for fault in faults if fault is not None), None)
        pictures = [Problem(f"{start}.image_column", self.image_column, fault)] if fault else []
        return [*pictures, *super()._row_problems(start)]

    def _picture_fault(self, split: str) -> str | None:
        rows = self._split(split)
        if not isinstance(rows.features[self.image_column], ImageFeature):
            return "holds no pictures; name a `datasets.Image` column."
        missing = rows.data.column(self.image_column).null_count
        return f"{missing} rows of the {split} split have no picture; drop them." if missing else None

    def _encode(self, rows: Dataset, split: str) -> TorchDataset[dict[str, Tensor]]:
        targets = torch.tensor(self.label_set.classes(rows), dtype=torch.int64)
        channels = getattr(self.model_config, "num_channels", 3)
        return _Pictures(rows.select_columns(self.image_column), targets, self.processor, channels)


class _Pictures(TorchDataset[dict[str, Tensor]]):
    def __init__(self, rows: Dataset, targets: Tensor, processor: Any, channels: int) -> None:
        self.rows = rows
        self.targets = targets
        self.processor = processor
        self.channels = channels

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        (picture,) = self.rows[index].values()
        return {"pixel_values": pixel_values(self.processor, picture, self.channels), "labels": self.targets[index]}

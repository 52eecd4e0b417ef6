"""Image classification: one class for each picture."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL.Image import Image, Resampling
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from fedbe.corpora import SPLITS, Corpus
from fedbe.datamodules.classification import LabelledDataModule
from fedbe.datamodules.flower import FlowerPartitioner
from fedbe.datamodules.partition import Partitioner
from fedbe.errors import Problem


class ImageClassificationDataModule(LabelledDataModule):
    """Pictures and their classes, for ViT and its kin.

    Pictures are decoded when they are asked for, resized to the model's ``image_size`` (bilinear, the whole picture),
    scaled to [0, 1] and normalised. Mean and deviation are those of the processor that `connect` receives in place of
    a tokenizer, or the arguments. Batches hold ``pixel_values``, ``[samples, channels, height, width]``, float32, and
    ``labels``, ``[samples]``.

    Args:
        corpus: Source of the three splits; pictures are `datasets.Image` columns.
        partitioner: Rule that gives each client its rows.
        image_column: Column of the picture.
        label_column: Column of the class: strings, integers, booleans or a `datasets.ClassLabel`.
        labels: Names of the classes in order, see `LabelSet`; ``None`` to take those of the training split.
        mean: Mean of every channel in [0, 1], where no processor says otherwise.
        deviation: Standard deviation of every channel, where no processor says otherwise.
        batch_size: Samples in a client's local step.
        eval_batch_size: Samples in a validation or test batch; ``None`` for four times `batch_size`.
    """

    def __init__(
        self,
        corpus: Corpus,
        partitioner: Partitioner | FlowerPartitioner,
        image_column: str = "image",
        label_column: str = "label",
        labels: list[str] | None = None,
        mean: float = 0.5,
        deviation: float = 0.5,
        batch_size: int = 8,
        eval_batch_size: int | None = None,
    ) -> None:
        super().__init__(corpus, partitioner, label_column, labels, batch_size, eval_batch_size)
        self.image_column = image_column
        self.mean = mean
        self.deviation = deviation

    def _columns(self) -> Mapping[str, str]:
        return {"image_column": self.image_column, "label_column": self.label_column}

    def _argument_problems(self, key: str) -> list[Problem]:
        return [] if self.deviation > 0 else [Problem(f"{key}.deviation", self.deviation, "must be above 0.")]

    def _model_problems(self, key: str) -> list[Problem]:
        if self.model_config is None or hasattr(self.model_config, "image_size"):
            return []
        remedy = "does not take pictures: its configuration has no `image_size`; name an image model."
        return [Problem("model.name", self.model_config.name_or_path or self.model_config.model_type, remedy)]

    def _row_problems(self, key: str) -> list[Problem]:
        faults = (self._picture_fault(split) for split in SPLITS)
        fault = next((fault for fault in faults if fault is not None), None)
        pictures = [Problem(f"{key}.image_column", self.image_column, fault)] if fault else []
        return [*pictures, *super()._row_problems(key)]

    def _picture_fault(self, split: str) -> str | None:
        rows = self._split(split)
        if not isinstance(rows.features[self.image_column], ImageFeature):
            return "holds no pictures; name a `datasets.Image` column."
        missing = rows.data.column(self.image_column).null_count
        return f"{missing} rows of the {split} split have no picture; drop them." if missing else None

    def _encode(self, rows: Dataset, split: str) -> TorchDataset[dict[str, Tensor]]:
        if self.model_config is None:
            raise RuntimeError("`setup` needs the model's configuration; call `connect` first.")
        size, channels = self.model_config.image_size, getattr(self.model_config, "num_channels", 3)
        height, width = (size, size) if isinstance(size, int) else size
        mean = _per_channel(getattr(self.tokenizer, "image_mean", None), self.mean, channels)
        deviation = _per_channel(getattr(self.tokenizer, "image_std", None), self.deviation, channels)
        targets = torch.tensor(self.label_set.classes(rows), dtype=torch.int64)
        return _Pictures(rows.select_columns(self.image_column), targets, (height, width), mean, deviation)


class _Pictures(TorchDataset[dict[str, Tensor]]):
    def __init__(self, rows: Dataset, targets: Tensor, size: tuple[int, int], mean: Tensor, deviation: Tensor) -> None:
        self.rows = rows
        self.targets = targets
        self.size = size
        self.mean = mean
        self.deviation = deviation

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        (picture,) = self.rows[index].values()
        pixels = pixel_values(picture, self.size, channels=len(self.mean))
        return {"pixel_values": (pixels - self.mean) / self.deviation, "labels": self.targets[index]}


def pixel_values(picture: Image, size: tuple[int, int], channels: int = 3) -> Tensor:
    """Return a picture as ``[channels, height, width]`` in [0, 1], float32, resized to ``size`` (height, width)."""
    picture = picture.convert("RGB" if channels == 3 else "L").resize((size[1], size[0]), Resampling.BILINEAR)
    pixels = np.asarray(picture, dtype=np.float32).reshape(*size, -1) / 255
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _per_channel(known: Any, default: float, channels: int) -> Tensor:
    values = list(known) if known is not None and len(known) == channels else [default] * channels
    return torch.tensor(values, dtype=torch.float32).view(channels, 1, 1)

"""What pictures a model takes, and how they are prepared for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageClassification, PretrainedConfig, ViTImageProcessor

from fedbe.seeding import isolated_rng

_TRIED = ((40, 56), (72, 64))
"""Sizes (width, height) of the blank pictures with which a processor is tried."""


def takes_pictures(config: PretrainedConfig) -> bool:
    """Whether a model of this configuration can be a classifier of pictures."""
    return type(config) in AutoModelForImageClassification._model_mapping


def default_processor(config: PretrainedConfig) -> Any:
    """Return the image processor of a model that brings none: the whole picture, bilinear, its values in [-1, 1]."""
    size, channels = getattr(config, "image_size", 224), getattr(config, "num_channels", 3)
    height, width = (size, size) if isinstance(size, int) else size
    half = [0.5] * channels
    return ViTImageProcessor(size={"height": height, "width": width}, image_mean=half, image_std=half)


def pixel_values(processor: Any, picture: Image.Image, channels: int = 3) -> Tensor:
    """Return a picture as the processor prepares it for the model: ``[channels, height, width]``, float32.

    Args:
        processor: The model's image processor.
        picture: Of any mode.
        channels: 3 for red, green and blue, 1 for shades of grey.
    """
    pixels: Tensor = processor(images=picture.convert("L" if channels == 1 else "RGB"), return_tensors="pt")[
        "pixel_values"
    ]
    return pixels[0]


def processor_fault(processor: Any, config: PretrainedConfig) -> str | None:
    """Return why what a processor makes of pictures cannot be batched or is not what the model takes.

    It is tried on two blank pictures of different shapes, and the model without its weights on what comes out.
    """
    channels = getattr(config, "num_channels", 3)
    try:
        made = [pixel_values(processor, Image.fromarray(np.zeros((*size, 3), np.uint8)), channels) for size in _TRIED]
    except Exception as error:  # whatever a processor says of its own settings
        return f"its image processor cannot prepare a picture: {_first_line(error)}"
    first, second = (tuple(pixels.shape) for pixels in made)
    if first != second:
        return (
            f"its image processor makes pictures of unequal shapes, {first} and {second}, which no batch can hold: "
            "set `do_center_crop` and `crop_size`, or `height` and `width` of `size`, in preprocessor_config.json"
        )
    try:
        with isolated_rng(0), torch.device("meta"), torch.no_grad():
            model = AutoModelForImageClassification.from_config(config)  # type: ignore[no-untyped-call]
            model(pixel_values=torch.empty(1, *first))
    except (ValueError, RuntimeError) as error:
        return f"it does not take pictures of shape {first}, which its image processor makes: {_first_line(error)}"
    return None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)

"""The base model: named in the configuration, loaded once."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from fedbe.assets import micro_path
from fedbe.errors import ConfigError, Facts, Problem
from fedbe.modeling.checkpoint import own_code, unreadable, unusable
from fedbe.modeling.checkpointing import enable_gradient_checkpointing
from fedbe.modeling.families import stated_depth
from fedbe.modeling.head import agree_on_padding, renew_head, set_classes, set_padding
from fedbe.modeling.images import default_processor
from fedbe.modeling.precision import written_as
from fedbe.modeling.weights import quietly, weights_fault
from fedbe.seeding import isolated_rng

MICRO = "fedbe:micro"
PACKAGE = "package:"

_AUTO_CLASSES: dict[str, Any] = {
    "causal-lm": AutoModelForCausalLM,
    "sequence-classification": AutoModelForSequenceClassification,
    "image-classification": AutoModelForImageClassification,
}
_UNLOADABLE = (OSError, ValueError, RuntimeError, ImportError, SafetensorError)


@dataclass
class BaseModel:
    """Which pre-trained model to start from.

    Attributes:
        name: A Hugging Face Hub name, a local checkpoint folder, ``fedbe:micro``, the small model that comes along, or
            ``package:NAME/FOLDER``, a folder inside an installed Python package.
        task: The model's head; a classifier's is trained along with the blocks, and it is new unless the checkpoint's
            is for the data's classes.
        dtype: Type of the resident weights; ``auto`` for that of the checkpoint. What is trained is float32 over any of
            them, and the model is written in the type of the checkpoint.
        trained_dtype: ``base`` to train in the resident type on purpose: most steps are too small for half precision,
            and are lost.
        attention: Attention implementation of `transformers`; ``null`` for its default.
        gradient_checkpointing: Recompute activations in the backward pass to save memory.
        revision: Branch, tag or commit on the Hub.
    """

    name: str = MICRO
    task: Literal["causal-lm", "sequence-classification", "image-classification"] = "causal-lm"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    trained_dtype: Literal["float32", "base"] = "float32"
    attention: str | None = None
    gradient_checkpointing: bool = False
    revision: str = "main"

    @property
    def path(self) -> str:
        """What `from_pretrained` is given.

        Raises:
            ConfigError: The package that holds the model is not installed.
        """
        if self.name == MICRO:
            return str(micro_path())
        return str(packaged_path(self.name)) if self.name.startswith(PACKAGE) else self.name

    @property
    def _source(self) -> dict[str, Any]:
        """Which files are loaded; never the code that comes with some checkpoints."""
        return {"revision": self.revision, "trust_remote_code": False}

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration, read without its weights.

        Raises:
            ConfigError: There is no such model, or its files cannot be read.
        """
        try:
            config: PretrainedConfig = AutoConfig.from_pretrained(self.path, **self._source)
            return config
        except (OSError, ValueError, KeyError, ImportError) as error:
            if known := unreadable(self.path, self.revision):
                raise ConfigError(Problem("model.name", self.name, known)) from error
            kind = "folder" if Path(self.path).exists() else "model"
            absent = Path(self.path).is_absolute() or self.path.startswith(".")
            reason = "there is no such folder" if absent and kind == "model" else str(error).strip().splitlines()[0]
            remedy = f"no such {kind} can be loaded ({reason}); give a Hub name, a checkpoint folder, or {MICRO}"
            raise ConfigError(Problem("model.name", self.name, remedy)) from error

    @property
    def written_dtype(self) -> torch.dtype | None:
        """Type of the checkpoint's weights, as its configuration says; ``None`` where it does not."""
        return getattr(self.config, "dtype", None)

    @property
    def resident_dtype(self) -> str:
        """Type of the resident weights, without ``torch.``."""
        return self.dtype if self.dtype != "auto" else str(self.written_dtype or torch.float32).removeprefix("torch.")

    @property
    def depth(self) -> int:
        """Number of blocks of the base model; 0 where its configuration does not say."""
        return stated_depth(self.config, self.task == "image-classification") or 0

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in this section."""
        try:
            kind = type(self.config)
        except ConfigError as error:
            return list(error.problems)
        if kind not in _AUTO_CLASSES[self.task]._model_mapping:
            fitting = [task for task, auto in _AUTO_CLASSES.items() if kind in auto._model_mapping]
            able = ", ".join(fitting) or "none of the tasks there are"
            remedy = f"a {self.config.model_type} model can do: {able}"
            return [Problem(f"{key}.task", self.task, remedy)]
        if self.attention is not None and "/" in self.attention:
            remedy = "is code from the Hub, which fedbe does not run: give an implementation of transformers"
            return [Problem(f"{key}.attention", self.attention, remedy)]
        fault = unusable(self.path, self.revision, self.config) or self._weights_fault()
        return [Problem(f"{key}.name", self.name, fault)] if fault else []

    def _weights_fault(self) -> str | None:
        """Return why the weights are not those of the configuration, by their names and shapes alone.

        Those of a model on the Hub that has not been fetched yet are judged when it is loaded.
        """
        here = Path(self.path).exists()
        try:
            with isolated_rng(0), quietly():
                model, loading = self._from_pretrained(
                    self.config, device_map="meta", local_files_only=True, ignore_mismatched_sizes=True
                )
        except _UNLOADABLE as error:
            return _cannot_load(error) if here or not isinstance(error, OSError) else None
        return weights_fault(model, loading, new_head=self.task != "causal-lm")

    def _from_pretrained(self, config: PretrainedConfig, **options: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Return the model, and what transformers says of the names and shapes of its weights."""
        if self.attention is not None:
            options["attn_implementation"] = self.attention
        loaded: tuple[PreTrainedModel, dict[str, Any]] = _AUTO_CLASSES[self.task].from_pretrained(
            self.path,
            config=config,
            dtype=getattr(torch, self.resident_dtype),
            output_loading_info=True,
            **self._source,
            **options,
        )
        return loaded

    @cached_property
    def processor(self) -> Any:
        """The tokenizer, or the image processor of an image model.

        Raises:
            ConfigError: It cannot be read.
        """
        images = self.task == "image-classification"
        loader, file = (
            (AutoImageProcessor, "preprocessor_config.json") if images else (AutoTokenizer, "tokenizer_config.json")
        )
        try:
            processor = loader.from_pretrained(self.path, **self._source)
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            if code := own_code(self.path, file, self.revision):
                reason = f"it is code of the checkpoint's own, {code}, which fedbe does not run"
            raise ConfigError(
                Problem("model.name", self.name, f"its {loader.__name__} cannot be read ({reason})")
            ) from error
        if self.task == "sequence-classification":
            agree_on_padding(processor, self.config)
        return processor

    def load(self, classes: int | Sequence[str] | None = None, pad_token_id: int | None = None) -> PreTrainedModel:
        """Return the base model in evaluation mode, all of it frozen.

        Args:
            classes: Names of a classifier's classes in the order of its outputs, or their number; ``None`` keeps the
                checkpoint's head as it is.
            pad_token_id: What batches are padded with; a model without a classifier keeps the id that it names.

        Raises:
            ConfigError: The weights are missing, broken, or not those that the configuration describes.
        """
        config = copy.deepcopy(self.config)
        sized = config.num_labels
        new_head = classes is not None and set_classes(config, classes)
        set_padding(config, pad_token_id, classifier=classes is not None)
        options = {"ignore_mismatched_sizes": True} if config.num_labels != sized else {}
        try:
            model, loading = self._from_pretrained(config, **options)
        except _UNLOADABLE as error:
            raise ConfigError(Problem("model.name", self.name, _cannot_load(error))) from error
        if fault := weights_fault(model, loading, new_head=self.task != "causal-lm"):
            raise ConfigError(Problem("model.name", self.name, fault))
        if new_head and config.num_labels == sized:
            renew_head(model)
        if self.written_dtype is not None:
            written_as(model, self.written_dtype)
        model.requires_grad_(False)
        model.train(False)
        if self.gradient_checkpointing:
            enable_gradient_checkpointing(model)
        return model


class GivenModel(BaseModel):
    """A model that is loaded already, with its tokenizer or image processor; a run trains it in place.

    Args:
        model: With a head for the task.
        processor: Its tokenizer or image processor; ``None`` if the data needs none. A model of pictures is then given
            one that takes whole pictures of its size, values in [-1, 1].
    """

    def __init__(self, model: PreTrainedModel, processor: Any = None) -> None:
        kind, mappings = type(model.config), {task: auto._model_mapping for task, auto in _AUTO_CLASSES.items()}
        heads = {task: mapping[kind] for task, mapping in mappings.items() if kind in mapping}
        task: Any = next((task for task, head in heads.items() if isinstance(model, head)), None)
        dtype: Any = str(model.dtype).removeprefix("torch.")
        super().__init__(model.name_or_path or type(model).__name__, task, dtype)
        self.model, self.config, self.processor = model, model.config, processor
        if self.task == "sequence-classification":
            agree_on_padding(processor, self.config)
        elif self.task == "image-classification" and processor is None:
            self.processor = default_processor(self.config)

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return a problem for a model of no task that there is."""
        if self.task is not None:
            return []
        remedy = f"is of none of the tasks there are: {', '.join(_AUTO_CLASSES)}"
        return [Problem(f"{key}.name", type(self.model).__name__, remedy)]

    def load(self, classes: int | Sequence[str] | None = None, pad_token_id: int | None = None) -> PreTrainedModel:
        """Return the model itself, in evaluation mode and frozen, its configuration that of these classes.

        Raises:
            ConfigError: Its head is for another number of classes.
        """
        count = classes if classes is None or isinstance(classes, int) else len(classes)
        if count is not None and count != self.config.num_labels:
            remedy = f"has a head for {self.config.num_labels} classes, and the data has {count}: load it for as many"
            raise ConfigError(Problem("model.name", self.name, remedy))
        if classes is not None:
            set_classes(self.config, classes)
        set_padding(self.config, pad_token_id, classifier=classes is not None)
        self.model.requires_grad_(False)
        self.model.train(False)
        return self.model


def _cannot_load(error: Exception) -> str:
    return f"its weights cannot be loaded: {str(error).strip().splitlines()[0]}"


def packaged_path(name: str) -> Path:
    """Return the folder that ``package:NAME/FOLDER`` names; the package's code is not run.

    Raises:
        ConfigError: The package is not installed.
    """
    package, _, folder = name.removeprefix(PACKAGE).partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        remedy = f"the package is not installed: pip install {package.replace('_', '-')}"
        raise ConfigError(Problem("model.name", name, remedy))
    return Path(spec.submodule_search_locations[0]) / folder


def forward_options(model: PreTrainedModel) -> dict[str, bool]:
    """Return the arguments of a forward pass that trains or scores whole sequences: no key-value cache.

    Without a cache the model also sees from restarting positions where packed documents begin.
    """
    return {"use_cache": False} if getattr(model.config, "use_cache", False) else {}

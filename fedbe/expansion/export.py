"""Saving an expanded model, as a plain checkpoint where its architecture can express it, and loading it."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.errors import ConfigError, ExpansionError, Problem
from fedbe.expansion.card import CARD_FILE, read_card, turn_dial, write_card
from fedbe.expansion.expand import Expansion, check_dial
from fedbe.expansion.folder import (
    BLOCKS_FILE,
    GATE_FILE,
    OWN_FILES,
    OWN_SUFFIXES,
    ExportReport,
    auto_class,
    read_description,
    write_folder,
)
from fedbe.expansion.gate import install_gate
from fedbe.expansion.names import block_parameter_names
from fedbe.expansion.token_gate import TokenGate
from fedbe.modeling.architecture import find_blocks
from fedbe.modeling.checkpoint import DESCRIPTION_FILE, adapter_beside
from fedbe.modeling.precision import save_weights
from fedbe.modeling.weights import quietly, weights_fault
from fedbe.storage.files import new_folder

_LOADED = "_fedbe_loaded"


def save_model(
    model: PreTrainedModel,
    expansion: Expansion,
    directory: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dial: float = 1.0,
) -> ExportReport:
    """Write an expanded model as a Hugging Face checkpoint with ``fedbe.json`` in it; the live model stays as it is.

    Where the architecture cannot express the blocks (a gated residual), the checkpoint is the base model with its
    task head, and the expanded blocks lie in a file of their own, which `load` puts in. So does a token gate: without
    it all tokens pass through the blocks.

    Args:
        model: The expanded model.
        expansion: What was inserted.
        directory: Where to write: a new or empty folder.
        tokenizer: Saved along.
        dial: The factor on what the blocks write: 0 gives the base model's outputs exactly.

    Raises:
        ConfigError: If the directory holds something.
        ExpansionError: If ``dial`` is out of range or the model was not expanded like this.
    """
    check_dial(dial)
    with new_folder(Path(directory)) as partial:
        written = write_folder(model, expansion, partial, dial, dial * _dial_of(model, expansion), save_weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        write_card(partial, written, model, "block expansion", dial)
    return replace(written, directory=Path(directory).absolute())


def save_plain(
    model: PreTrainedModel, directory: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> ExportReport:
    """Write a model whose architecture is still the base model's as a Hugging Face checkpoint, whole or not at all.

    Args:
        model: The model.
        directory: Where to write: a new or empty folder.
        tokenizer: Saved along.

    Raises:
        ConfigError: If the directory holds something.
    """
    with new_folder(Path(directory)) as partial:
        save_weights(model, partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
    reason = f"{auto_class(model)}.from_pretrained loads the whole model."
    return ExportReport(True, reason, Path(directory).absolute())


def load(directory: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Return the expanded model that `save_model` wrote, of either kind.

    Args:
        directory: A folder with ``fedbe.json``.
        dtype: The dtype of the weights; that of the checkpoint if left out.

    Raises:
        ConfigError: If the folder holds no such model.
    """
    source = Path(directory)
    description = read_description(source)
    if fault := adapter_beside(str(source)):
        raise ConfigError(Problem("directory", str(source), fault))
    name = str(description["auto_class"])
    loader = getattr(transformers, name, None) if name.startswith("AutoModel") else None
    if loader is None:
        raise ConfigError(Problem("auto_class", name, f"{source / DESCRIPTION_FILE} names no class of transformers"))
    kind: torch.dtype | str = "auto" if dtype is None else dtype
    model: PreTrainedModel
    with quietly():
        model, loading = loader.from_pretrained(source, dtype=kind, trust_remote_code=False, output_loading_info=True)
    if fault := weights_fault(model, loading, new_head=False):
        raise ConfigError(Problem("directory", str(source), fault))
    expansion = read_expansion(source)
    if not description["plain"]:
        expansion.apply(model)
        _load_blocks(model, expansion, source / BLOCKS_FILE)
    if gate_arguments := description.get("gate"):
        gate = TokenGate(**gate_arguments)
        gate.load_state_dict(load_file(source / GATE_FILE))
        install_gate(model, expansion, gate)
    _stay_savable(model, _Loaded(expansion, float(description["dial"]), read_card(source)))
    return model


def read_expansion(directory: str | Path) -> Expansion:
    """Return the expansion of a saved model.

    Raises:
        ConfigError: If the folder holds no such model.
    """
    return Expansion.from_dict(read_description(Path(directory))["expansion"])


def rescale(directory: str | Path, to: str | Path, dial: float) -> ExportReport:
    """Write a saved model once more with another dial, tokenizer and other files included.

    Args:
        directory: A folder that `save_model` wrote with dial 1.
        to: Where to write: a new or empty folder.
        dial: The factor on what the blocks write.

    Raises:
        ConfigError: If ``directory`` holds no such model, or ``to`` holds something.
        ExpansionError: If ``dial`` is out of range.
    """
    check_dial(dial)
    source = Path(directory)
    saved_dial = read_description(source)["dial"]
    if saved_dial != 1:
        remedy = f"this export is scaled by {saved_dial} already: start from the run's own model"
        raise ConfigError(Problem("directory", str(source), remedy))
    report = save_model(load(source), read_expansion(source), to, dial=dial)
    for file in source.iterdir():
        if file.is_file() and file.name not in OWN_FILES and not file.name.endswith(OWN_SUFFIXES):
            shutil.copy2(file, report.directory / file.name)
    turn_dial(report.directory, dial)
    return report


@dataclass(frozen=True)
class _Loaded:
    """What was loaded: the expansion, the dial that its weights are at already, and the model card."""

    expansion: Expansion
    dial: float
    card: str | None


def _stay_savable(model: PreTrainedModel, loaded: _Loaded) -> None:
    """Have a model's own `save_pretrained`, and with it `push_to_hub`, write all of what `load` has put in."""
    vars(model)[_LOADED] = loaded
    vars(model)["save_pretrained"] = MethodType(save_pretrained, model)


def save_pretrained(self: PreTrainedModel, save_directory: str | Path, **options: Any) -> None:
    """Write a model that `load` returned as it was loaded: with its gate, blocks, description, and model card.

    Args:
        self: The model; one whose blocks were taken out is written as transformers does.
        save_directory: A folder; it may hold something.
        options: See `PreTrainedModel.save_pretrained`.

    Raises:
        ValueError: With ``push_to_hub=True``, which would leave out what transformers does not know.
    """
    if options.get("push_to_hub"):
        raise ValueError("save_pretrained(push_to_hub=True) would leave a part of the model out: call push_to_hub")
    given, loaded = options.pop("state_dict", None) or {}, vars(self)[_LOADED]

    def save(model: PreTrainedModel, directory: Path, state: Mapping[str, Tensor]) -> None:
        tensors = {**model.state_dict(), **given, **state}
        type(model).save_pretrained(model, directory, state_dict=tensors, **options)

    if find_blocks(self).depth != loaded.expansion.depth:
        type(self).save_pretrained(self, save_directory, state_dict=given or None, **options)
        return
    directory = Path(save_directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_folder(self, loaded.expansion, directory, 1.0, loaded.dial, save)
    if loaded.card is not None:
        (directory / CARD_FILE).write_text(loaded.card, encoding="utf-8")


def _dial_of(model: PreTrainedModel, expansion: Expansion) -> float:
    """Return the dial that a loaded model's blocks are at already."""
    loaded = vars(model).get(_LOADED)
    return float(loaded.dial) if isinstance(loaded, _Loaded) and loaded.expansion == expansion else 1.0


def _load_blocks(model: PreTrainedModel, expansion: Expansion, file: Path) -> None:
    tensors = load_file(file)
    expected = {name for names in block_parameter_names(model, expansion).values() for name in names}
    if missing := sorted(expected - tensors.keys()):
        raise ExpansionError(f"{file} lacks {missing[0]}: it belongs to another expansion.")
    loaded = model.load_state_dict(tensors, strict=False)
    if loaded.unexpected_keys:
        raise ExpansionError(f"{file} holds {loaded.unexpected_keys[0]}, which the model has not.")

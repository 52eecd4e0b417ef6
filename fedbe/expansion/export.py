"""Saving an expanded model, as a plain checkpoint where its architecture can express it, and loading it."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto import modeling_auto

from fedbe.errors import ConfigError, ExpansionError, Problem
from fedbe.expansion.expand import Expansion, check_dial, without_blocks
from fedbe.expansion.gate import install_gate, unregistered
from fedbe.expansion.identity import dialled, target_parameters
from fedbe.expansion.names import block_parameter_names
from fedbe.expansion.token_gate import TokenGate
from fedbe.modeling.architecture import expressed_by_config, find_blocks
from fedbe.modeling.checkpoint import DESCRIPTION_FILE
from fedbe.modeling.precision import held_types, save_weights
from fedbe.storage.files import new_folder

BLOCKS_FILE = "expanded_blocks.safetensors"
GATE_FILE = "token_gate.safetensors"
_OWN_SUFFIXES = (".safetensors", ".safetensors.index.json")
_OWN_FILES = frozenset({DESCRIPTION_FILE, "config.json", "generation_config.json"})
_TASKS = {
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "AutoModelForCausalLM",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES": "AutoModelForMaskedLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "AutoModelForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "AutoModelForTokenClassification",
    "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES": "AutoModelForQuestionAnswering",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES": "AutoModelForImageClassification",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES": "AutoModelForImageTextToText",
    "MODEL_MAPPING_NAMES": "AutoModel",
}


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        plain: Whether ``from_pretrained`` alone loads the whole model; otherwise it loads the base model, and
            `load` the whole.
        reason: Why, in one sentence.
        directory: Where.
    """

    plain: bool
    reason: str
    directory: Path


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
        state = _dialled_blocks(model, expansion, dial)
        with unregistered(model) as gate:
            obstacle = _obstacle(model, expansion)
            if obstacle is None:
                save_weights(model, partial, state)
                reason = f"{_auto_class(model)}.from_pretrained loads the whole model."
            else:
                with without_blocks(model, expansion):
                    save_weights(model, partial)
                held = held_types(model)
                blocks = {name: tensor.to(held.get(name, tensor.dtype)).contiguous() for name, tensor in state.items()}
                save_file(blocks, partial / BLOCKS_FILE)
                reason = f"{obstacle}; from_pretrained gives the base model, fedbe.load the expanded one."
        if gate is not None:
            save_file(gate.state_dict(), partial / GATE_FILE)
            reason += " Only fedbe.load puts in the gate: without it the blocks are open to all tokens (g = 1)."
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        _describe(partial, model, expansion, dial, obstacle, gate)
    return ExportReport(obstacle is None, reason, Path(directory).absolute())


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
    reason = f"{_auto_class(model)}.from_pretrained loads the whole model."
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
    description = _description(source)
    name = str(description["auto_class"])
    loader = getattr(transformers, name, None) if name.startswith("AutoModel") else None
    if loader is None:
        raise ConfigError(Problem("auto_class", name, f"{source / DESCRIPTION_FILE} names no class of transformers"))
    kind: torch.dtype | str = "auto" if dtype is None else dtype
    model: PreTrainedModel = loader.from_pretrained(source, dtype=kind, trust_remote_code=False)
    expansion = read_expansion(source)
    if not description["plain"]:
        expansion.apply(model)
        _load_blocks(model, expansion, source / BLOCKS_FILE)
    if gate_arguments := description.get("gate"):
        gate = TokenGate(**gate_arguments)  # type: ignore[arg-type]
        gate.load_state_dict(load_file(source / GATE_FILE))
        install_gate(model, expansion, gate)
    return model


def read_expansion(directory: str | Path) -> Expansion:
    """Return the expansion of a saved model.

    Raises:
        ConfigError: If the folder holds no such model.
    """
    return Expansion.from_dict(_description(Path(directory))["expansion"])  # type: ignore[arg-type]


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
    saved_dial = _description(source)["dial"]
    if saved_dial != 1:
        remedy = f"this export is scaled by {saved_dial} already: start from the run's own model"
        raise ConfigError(Problem("directory", str(source), remedy))
    report = save_model(load(source), read_expansion(source), to, dial=dial)
    for file in source.iterdir():
        if file.is_file() and file.name not in _OWN_FILES and not file.name.endswith(_OWN_SUFFIXES):
            shutil.copy2(file, report.directory / file.name)
    return report


def _dialled_blocks(model: PreTrainedModel, expansion: Expansion, dial: float) -> dict[str, Tensor]:
    """Return the state of the expanded blocks, copies where the dial changes a tensor."""
    blocks = expansion.blocks(model)
    changed = {id(target) for block in blocks for target in target_parameters(expansion.rule, block)}
    state: dict[str, Tensor] = {}
    for block, index in zip(blocks, expansion.expanded_indices, strict=True):
        for name, tensor in block.state_dict(keep_vars=True).items():
            values = tensor.detach()
            scaled = dialled(values, expansion.rule.shift, dial) if id(tensor) in changed else values
            state[f"{expansion.blocks_path}.{index}.{name}"] = scaled
    return state


def _obstacle(model: PreTrainedModel, expansion: Expansion) -> str | None:
    if expansion.rule.gated:
        kind, name = find_blocks(model).family, expansion.model_type
        why = (
            "a post-norm block" if kind.post_norm else "a block of which it is not known what it writes into the stream"
        )
        return f"{why}, as in this {name} model, needs a residual gate, which the architecture lacks"
    return expressed_by_config(model, find_blocks(model))


def _load_blocks(model: PreTrainedModel, expansion: Expansion, file: Path) -> None:
    tensors = load_file(file)
    expected = {name for names in block_parameter_names(model, expansion).values() for name in names}
    if missing := sorted(expected - tensors.keys()):
        raise ExpansionError(f"{file} lacks {missing[0]}: it belongs to another expansion.")
    loaded = model.load_state_dict(tensors, strict=False)
    if loaded.unexpected_keys:
        raise ExpansionError(f"{file} holds {loaded.unexpected_keys[0]}, which the model has not.")


def _auto_class(model: PreTrainedModel) -> str:
    """Return the name of the ``transformers`` class that loads a model of this class from a folder."""
    name = type(model).__name__
    for mapping, auto_class in _TASKS.items():
        entry = getattr(modeling_auto, mapping).get(model.config.model_type, ())
        if name in ((entry,) if isinstance(entry, str) else entry):
            return auto_class
    return name


def _describe(
    directory: Path,
    model: PreTrainedModel,
    expansion: Expansion,
    dial: float,
    obstacle: str | None,
    gate: TokenGate | None,
) -> None:
    description = {
        "format": 1,
        "expansion": expansion.to_dict(),
        "dial": float(dial),
        "auto_class": _auto_class(model),
        "plain": obstacle is None,
        "obstacle": obstacle,
        "gate": None if gate is None else gate.to_dict(),
    }
    (directory / DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _description(directory: Path) -> dict[str, object]:
    file = directory / DESCRIPTION_FILE
    try:
        description: dict[str, object] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        remedy = f"give a folder with a readable {DESCRIPTION_FILE}, for example the model/ of a run"
        raise ConfigError(Problem("directory", str(directory), remedy)) from error
    return description

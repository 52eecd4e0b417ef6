"""The folder of an expanded model: a checkpoint, what plain transformers cannot hold of it, and their description."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

from fedbe.errors import ConfigError, Problem
from fedbe.expansion.expand import Expansion, without_blocks
from fedbe.expansion.gate import unregistered
from fedbe.expansion.identity import dialled, target_parameters
from fedbe.expansion.token_gate import TokenGate
from fedbe.modeling.architecture import expressed_by_config, find_blocks
from fedbe.modeling.checkpoint import DESCRIPTION_FILE
from fedbe.modeling.precision import held_types

BLOCKS_FILE = "expanded_blocks.safetensors"
GATE_FILE = "token_gate.safetensors"
OWN_SUFFIXES = (".safetensors", ".safetensors.index.json")
OWN_FILES = frozenset({DESCRIPTION_FILE, "config.json", "generation_config.json"})
_MARK = "only_fedbe_load_puts_in."
"""Name of an empty tensor, which transformers reports as unexpected when it loads a checkpoint that lacks something."""
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
        reason: Why, in one sentence, and what else there is to know of loading it.
        directory: Where.
        loader: What loads all of it.
    """

    plain: bool
    reason: str
    directory: Path
    loader: Literal["transformers", "fedbe", "peft"] = "transformers"


def write_folder(
    model: PreTrainedModel,
    expansion: Expansion,
    directory: Path,
    dial: float,
    described_dial: float,
    save: Callable[[PreTrainedModel, Path, Mapping[str, Tensor]], object],
) -> ExportReport:
    """Write an expanded model, its description and its gate into a folder; the live model stays as it is.

    Args:
        model: The expanded model.
        expansion: What was inserted.
        directory: A folder.
        dial: The factor on what the blocks write.
        described_dial: The factor that the description names.
        save: Writes a model's configuration and weights into a folder, some tensors in place of its own or added.

    Raises:
        ExpansionError: The model was not expanded like this.
    """
    state = _dialled_blocks(model, expansion, dial)
    with unregistered(model) as gate:
        obstacle = _obstacle(model, expansion)
        missing = "expanded_blocks" if obstacle else "token_gate" if gate else None
        mark = {f"{_MARK}{missing}": torch.zeros(0, dtype=model.dtype)} if missing else {}
        if obstacle is None:
            save(model, directory, state | mark)
            reason = f"{auto_class(model)}.from_pretrained loads the whole model."
        else:
            with without_blocks(model, expansion):
                save(model, directory, mark)
            held = held_types(model)
            blocks = {name: tensor.to(held.get(name, tensor.dtype)).contiguous() for name, tensor in state.items()}
            save_file(blocks, directory / BLOCKS_FILE)
            reason = f"{obstacle}; from_pretrained gives the base model, fedbe.load the expanded one."
    if gate is not None:
        save_file(gate.state_dict(), directory / GATE_FILE)
        reason += " Only fedbe.load puts in the gate: without it the blocks are open to all tokens (g = 1)."
    _describe(directory, model, expansion, described_dial, obstacle, gate)
    return ExportReport(obstacle is None, reason, directory, "fedbe" if mark else "transformers")


def read_description(directory: Path) -> dict[str, Any]:
    """Return what the description of an expanded model's folder says.

    Raises:
        ConfigError: There is none that can be read.
    """
    file = directory / DESCRIPTION_FILE
    try:
        description: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        remedy = f"give a folder with a readable {DESCRIPTION_FILE}, for example the model/ of a run"
        raise ConfigError(Problem("directory", str(directory), remedy)) from error
    return description


def auto_class(model: PreTrainedModel) -> str:
    """Return the name of the ``transformers`` class that loads a model of this class from a folder."""
    name = type(model).__name__
    for mapping, loader in _TASKS.items():
        entry = getattr(modeling_auto, mapping).get(model.config.model_type, ())
        if name in ((entry,) if isinstance(entry, str) else entry):
            return loader
    return name


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
        "auto_class": auto_class(model),
        "plain": obstacle is None,
        "obstacle": obstacle,
        "gate": None if gate is None else gate.to_dict(),
    }
    (directory / DESCRIPTION_FILE).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")

"""What lies in a checkpoint besides a model: adapters, code, quantised weights, and what fedbe has exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.utils.hub import cached_file

DESCRIPTION_FILE = "fedbe.json"
"""What an export of fedbe is described in."""

ADAPTER_FILE = "adapter_config.json"
_QUANTISED = ("quantization_config", "compression_config")


def unusable(path: str, revision: str, config: PretrainedConfig) -> str | None:
    """Return why a checkpoint whose configuration can be read is no base model, in one sentence, or ``None``.

    Args:
        path: A folder, or a name on the Hub.
        revision: Branch, tag or commit on the Hub.
        config: The checkpoint's.
    """
    if fault := adapter_beside(path, revision):
        return fault
    if method := _quantisation(config):
        return (
            f"its weights are quantised ({method}), and blocks are copies of weights that can be trained: give the "
            "checkpoint that it was made from, or one that `model.dequantize()` gives"
        )
    description = read_json(path, DESCRIPTION_FILE, revision) or {}
    if not description.get("plain", True) or description.get("gate"):
        return (
            "it is a result of fedbe's with a gate or blocks that only fedbe.load puts in, and a run would begin "
            "without them: give the base model that it was made from"
        )
    return None


def adapter_beside(path: str, revision: str = "main") -> str | None:
    """Return what is wrong with a checkpoint that holds an adapter as well, in one sentence, or ``None``."""
    if read_json(path, ADAPTER_FILE, revision) is None:
        return None
    return (
        f"a peft adapter lies beside its weights ({ADAPTER_FILE}), which transformers would put on them unasked: move "
        "the adapter's files elsewhere, or merge it (PeftModel's merge_and_unload) and save the model"
    )


def unreadable(path: str, revision: str) -> str | None:
    """Return what a checkpoint is whose configuration transformers does not read, in one sentence, or ``None``."""
    adapter = read_json(path, ADAPTER_FILE, revision)
    if adapter is not None:
        base = adapter.get("base_model_name_or_path") or "another model"
        return (
            f"it is a peft adapter of {base} and no model: merge it (PeftModel's merge_and_unload), save it, "
            "and give that folder"
        )
    if code := own_code(path, "config.json", revision):
        return (
            f"its architecture is code of its own ({code}), which fedbe does not run: give a model of an architecture "
            "that transformers has"
        )
    return None


def own_code(path: str, file: str, revision: str) -> str | None:
    """Return what code that comes with a checkpoint one of its files refers to, ``None`` if to none."""
    named = (read_json(path, file, revision) or {}).get("auto_map")
    values = list(named.values()) if isinstance(named, dict) else [named]
    flat = [name for value in values for name in (value if isinstance(value, list) else [value])]
    return next((name for name in flat if isinstance(name, str)), None)


def read_json(path: str, file: str, revision: str = "main") -> dict[str, Any] | None:
    """Return what a JSON file of a checkpoint holds; ``None`` if there is none, or nothing that can be read."""
    try:
        found = cached_file(path, file, revision=revision)
        content = json.loads(Path(str(found)).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else {}


def _quantisation(config: PretrainedConfig) -> str | None:
    for part in (config, config.get_text_config()):
        for name in _QUANTISED:
            if stated := getattr(part, name, None):
                given = stated if isinstance(stated, dict) else vars(stated)
                return str(given.get("quant_method") or given.get("format") or "quantization_config")
    return None

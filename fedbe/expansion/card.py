"""The model card of what a run writes: what it is, what loads it, and what is lacking otherwise."""

import re
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from transformers import PreTrainedModel

from fedbe.expansion.folder import ExportReport, auto_class

CARD_FILE = "README.md"
_DIAL = re.compile(r"^- Dial: .*$", re.MULTILINE)
_PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForImageClassification": "image-classification",
}
_TEXT = """# {base}, fine-tuned with fedbe

- Base model: {base}
- Method: {method}
{dial}
- Licence: not stated here. It is for whoever publishes the model to state, within that of the base model.

## How to load it

{reason}

```python
{code}
```
"""
_CODE = {
    "transformers": """from transformers import {auto}

model = {auto}.from_pretrained("FOLDER")""",
    "fedbe": """import fedbe

model = fedbe.load("FOLDER")""",
    "peft": """from peft import PeftModel
from transformers import {auto}

model = PeftModel.from_pretrained({auto}.from_pretrained("{base}"), "FOLDER")""",
}


def write_card(directory: Path, report: ExportReport, model: PreTrainedModel, method: str, dial: float = 1.0) -> None:
    """Write the model card of a folder, in place of one that is there.

    Args:
        directory: The folder of an exported model.
        report: What was written.
        model: The model; it names its base.
        method: What was trained, and how, in a few words.
        dial: The factor on what fine-tuning added.
    """
    source, auto = model.name_or_path or "", auto_class(model)
    local = not source or Path(source).exists() or Path(source).is_absolute()
    base = Path(source).name if local else source
    data = ModelCardData(
        base_model=None if local else source,
        library_name=report.loader,
        pipeline_tag=_PIPELINES.get(auto),
        tags=["fedbe", "federated-learning"],
    )
    text = _TEXT.format(
        base=base or type(model).__name__,
        method=method,
        dial=_dial_line(dial),
        reason=report.reason[:1].upper() + report.reason[1:],
        code=_CODE[report.loader].format(auto=auto, base=base),
    )
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text}").save(directory / CARD_FILE)


def turn_dial(directory: Path, dial: float) -> None:
    """Write another dial into the model card of a folder, if it has one that names a dial."""
    if (card := read_card(directory)) is not None:
        (directory / CARD_FILE).write_text(_DIAL.sub(_dial_line(dial), card), encoding="utf-8")


def read_card(directory: Path) -> str | None:
    """Return the model card of a folder; ``None`` if it has none that can be read."""
    try:
        return (directory / CARD_FILE).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def _dial_line(dial: float) -> str:
    return f"- Dial: {dial:g} (the factor on what fine-tuning added: 1 as trained, 0 the base model)"

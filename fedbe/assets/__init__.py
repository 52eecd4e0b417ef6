"""Files that are installed with `fedbe`: the micro base model."""

from pathlib import Path


def micro_path() -> Path:
    """Return the folder of the packaged micro model: a Hugging Face checkpoint with its tokenizer and model card."""
    return Path(__file__).parent / "micro"

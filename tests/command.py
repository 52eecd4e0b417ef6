"""A small configuration of the command line, on a file of rows, and the command that runs it."""

import json
from pathlib import Path
from typing import Any

import yaml

from fedbe.cli.main import main

TEXT = "The number {} comes before the number {}, as everyone who has learned to count will tell you. "


def small_config(folder: Path) -> dict[str, Any]:
    """Return what a run of two short rounds on three speakers' rows needs, its output in `folder`."""
    rows = [{"text": TEXT.format(i, i + 1) * 4, "speaker": f"s{i % 3}"} for i in range(60)]
    data = folder / "rows.jsonl"
    data.write_text("\n".join(json.dumps(row) for row in rows))
    corpus = {"class_path": "fedbe.corpora.FilesCorpus", "init_args": {"train": str(data)}}
    partitioner = {"class_path": "fedbe.datamodules.NaturalPartitioner", "init_args": {"column": "speaker"}}
    return {
        "output": str(folder / "run"),
        "algorithm": {"class_path": "fedbe.algorithms.BlockExpansion", "init_args": {"positions": [5]}},
        "data": {
            "class_path": "fedbe.datamodules.CausalLMDataModule",
            "init_args": {
                "corpus": corpus, "partitioner": partitioner, "sequence_length": 32, "batch_size": 2,
                "max_validation_sequences": 4, "max_test_sequences": 4,
            },
        },
        "client": {"optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003}}},
        "federation": {"rounds": 2, "cohort": 2},
        "trainer": {"max_steps": 2, "accelerator": "cpu"},
        "general_tasks": [
            {
                "class_path": "fedbe.evaluation.NextTokenTask",
                "init_args": {"corpus": corpus, "sequence_length": 32, "max_sequences": 4},
            }
        ],
        "logger": "none",
    }  # fmt: skip


def write(config: dict[str, Any], folder: Path) -> list[str]:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return [f"--config={path}"]


def run(config: dict[str, Any], folder: Path, *arguments: str, command: str = "fit") -> int:
    return main([command, *write(config, folder), *arguments])

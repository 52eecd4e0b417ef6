"""Made-up results and run folders."""

import json
from pathlib import Path

import yaml

from fedbe.comparison.results import RunResult

VERSIONS = {"fedbe": "0", "torch": "2"}


def history(accuracies, retentions, seconds=1.0, size=10):
    return [
        {
            "round": index, "downstream": {"accuracy": accuracy, "loss": 2.0},
            "retention": None if retained is None else {"mean": retained},
            "bytes": {"up": size * (index > 0), "down": size * (index > 0)}, "simulated_seconds": seconds * index,
        }
        for index, (accuracy, retained) in enumerate(zip(accuracies, retentions, strict=True))
    ]  # fmt: skip


def dial(*triples):
    """A measured dial of (factor, accuracy, retention)."""
    points = [{"factor": f, "accuracy": a, "retention": {"mean": r, "stories": r}} for f, a, r in triples]
    return {"points": points, "chosen": 0.5, "wanted_retention": None}


def summary(accuracy, **changes):
    return {
        "algorithm": "FedIT", "rounds": 2, "downstream": {"accuracy": accuracy, "loss": 2.0},
        "downstream_base": {"accuracy": 0.1, "loss": 3.0}, "trainable_parameters": 7,
        "general": {"base": {"stories": {"score": 0.8}}, "final": {"stories": {"score": 0.4}}},
        "retention": {"mean": 0.5, "stories": 0.5}, "delta_ce": {"mean": 0.25}, "bytes_up": 20, "bytes_down": 20,
        "simulated_seconds": 2.0, "wall_seconds": 3.0, "peak_rss_bytes": 1000000, "versions": VERSIONS, **changes,
    }  # fmt: skip


def result(arm="a", seed=0, accuracies=(0.1, 0.2, 0.3), retentions=(1.0, 0.8, 0.5), chosen=True, **changes):
    records = history(accuracies, retentions, changes.pop("seconds", 1.0))
    return RunResult(arm, seed, 1e-3, chosen, Path(f"{arm}-{seed}"), summary(accuracies[-1], **changes), records)


def write_run(folder, seed=0, rounds=2, algorithm="FedIT", accuracy=0.3, **arguments):
    folder.mkdir(parents=True)
    config = {
        "seed": seed, "name": folder.name, "output": None, "federation": {"rounds": rounds},
        "algorithm": {"class_path": f"fedbe.algorithms.{algorithm}", "init_args": arguments},
        "client": {"optimizer": {"init_args": {"lr": 0.001}}},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    records = history((0.1, 0.2, accuracy), (1.0, 0.8, 0.5))
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
    (folder / "summary.json").write_text(json.dumps(summary(accuracy)))
    return folder

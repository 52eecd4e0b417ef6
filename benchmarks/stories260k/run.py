"""Runs every arm of this benchmark for every seed and writes `results.csv` and the table of `results.md`.

    python benchmarks/stories260k/run.py --model DIR --shakespeare DIR --tinystories FILE --seeds 0 1 2

An arm whose folder holds a summary already is not run again.
"""

import argparse
import csv
import json
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from fedbe.cli.main import main as fedbe

HERE = Path(__file__).parent
ARMS = {
    "5 blocks, lr 1e-3": {"positions": 5, "lr": 1e-3},
    "5 blocks, lr 3e-3": {"positions": 5, "lr": 3e-3},
    "blocks above 1 and 3, lr 3e-3": {"positions": [1, 3], "lr": 3e-3},
}
COLUMNS = ("downstream", "own_text", "tinystories")


def run_arm(name: str, seed: int, material: argparse.Namespace) -> dict[str, float]:
    """Run one arm with one seed, if it has not been run, and return its scores."""
    folder = material.output / f"{name} seed {seed}".replace(" ", "_").replace(",", "")
    if not (folder / "summary.json").is_file():
        config = folder.with_suffix(".yaml")
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(yaml.safe_dump(arm_config(name, material)))
        if fedbe(["fit", f"--config={config}", f"--seed={seed}", f"--output={folder}"]):
            raise SystemExit(f"{name}, seed {seed} failed")
    summary = json.loads((folder / "summary.json").read_text())
    scores = {
        "downstream": summary["downstream"]["accuracy"],
        "base_downstream": summary["downstream_base"]["accuracy"],
    }
    for task, score in summary["general"]["final"].items():
        scores |= {task: score["score"], f"base_{task}": summary["general"]["base"][task]["score"]}
    return scores


def arm_config(name: str, material: argparse.Namespace) -> dict[str, Any]:
    """Return `blocks.yaml` with model and data filled in, and the arm's settings."""
    config: dict[str, Any] = yaml.safe_load((HERE / "blocks.yaml").read_text())
    config["model"] = {"name": str(material.model)}
    held_out = [str(material.shakespeare / f"{split}.jsonl.gz") for split in ("validation", "test")]
    files = {"train": str(material.shakespeare / "train.jsonl.gz"), "validation": held_out, "test": held_out}
    config["data"]["init_args"]["corpus"]["init_args"] = files
    stories = config["general_tasks"][1]["init_args"]["corpus"]["init_args"]
    stories["train"] = stories["test"] = str(material.tinystories)
    config["algorithm"]["init_args"]["positions"] = ARMS[name]["positions"]
    config["client"]["optimizer"]["init_args"]["lr"] = ARMS[name]["lr"]
    return config


def spread(values: Iterable[float]) -> str:
    """Return mean ± standard deviation."""
    values = list(values)
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


def main() -> None:
    """Run all arms and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="stories260K as a Hugging Face checkpoint")
    parser.add_argument("--shakespeare", type=Path, required=True, help="folder with {train,validation,test}.jsonl.gz")
    parser.add_argument("--tinystories", type=Path, required=True, help="JSONL file of stories, column `text`")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/stories260k"))
    arguments = parser.parse_args()
    rows = []
    for name in ARMS:
        for seed in arguments.seeds:
            scores = run_arm(name, seed, arguments)
            rows.append({"arm": name, "seed": seed} | scores)
    with (HERE / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    print("| arm | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 1))
    print("| base | " + " | ".join(spread(row[f"base_{c}"] for row in rows) for c in COLUMNS) + " |")
    for name in ARMS:
        print(f"| {name} | " + " | ".join(spread(r[c] for r in rows if r["arm"] == name) for c in COLUMNS) + " |")


if __name__ == "__main__":
    main()

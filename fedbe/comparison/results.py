"""Finished runs, read from their folders."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from fedbe.comparison.config import BUDGET, FREE, LEARNING_RATE
from fedbe.errors import ConfigError, Problem
from fedbe.evaluation.convergence import Point, curve, first_reaching
from fedbe.evaluation.dial import DialPoint, recorded_points
from fedbe.evaluation.tasks import RESERVED_NAME
from fedbe.storage.nested import leaves, section
from fedbe.storage.run_folder import RunFolder

_OF_ONE_RUN = ("seed", "name", "output", "logger")


@dataclass(frozen=True)
class RunResult:
    """What one finished run left.

    Attributes:
        arm: The arm it belongs to.
        seed: Its seed.
        learning_rate: Its learning rate; ``None`` if its configuration names none.
        chosen: Whether it counts; otherwise it only served to choose the learning rate.
        folder: Its folder.
        summary: Its `summary.json`.
        history: Its `metrics.jsonl`.
    """

    arm: str
    seed: int
    learning_rate: float | None
    chosen: bool
    folder: Path
    summary: Mapping[str, Any]
    history: Sequence[Mapping[str, Any]]

    @cached_property
    def points(self) -> list[Point]:
        """Downstream validation accuracy by round, simulated second and byte."""
        return curve(self.history)

    @cached_property
    def trajectory(self) -> list[tuple[float, float]]:
        """(Downstream validation accuracy, mean retention) of each round in which both were measured."""
        measured = [record for record in self.history if record["downstream"] and record["retention"]]
        return [(record["downstream"]["accuracy"], record["retention"][RESERVED_NAME]) for record in measured]

    @cached_property
    def dial(self) -> list[DialPoint]:
        """The final model at the places of its dial that were measured, from 0 to 1; often none."""
        return recorded_points(self.summary)

    @cached_property
    def dial_curve(self) -> dict[float, tuple[float, float]]:
        """(Downstream validation accuracy, mean retention) at each of these places, by factor."""
        return {p.factor: (p.accuracy, kept) for p in self.dial if (kept := p.mean_retention) is not None}

    @property
    def validation_accuracy(self) -> float:
        """Downstream accuracy on validation data of the model that the run ended with."""
        kept = self.summary.get("kept_round")
        ended = [point for point in self.points if kept is None or point.round <= kept]
        return ended[-1].accuracy

    @property
    def tuning_accuracy(self) -> float:
        """What learning rates are chosen by: validation accuracy of the common model, or of the clients' own if higher.

        Clients that train alone leave the common model as it was.
        """
        own = [float(record["personalised"]["mean"]) for record in self.history if record.get("personalised")]
        return max([self.validation_accuracy, *own[-1:]])

    @property
    def retention(self) -> float | None:
        """Mean retention of the model that the run ended with; ``None`` without general tasks."""
        retention = self.summary.get("retention")
        return None if not retention else float(retention[RESERVED_NAME])

    @property
    def test_accuracy(self) -> float:
        """Downstream accuracy on test data of the model that the run ended with."""
        return float(self.summary["downstream"]["accuracy"])

    @property
    def base_accuracy(self) -> float:
        """Downstream accuracy of the base model on test data."""
        return float(self.summary["downstream_base"]["accuracy"])

    @property
    def personalised_accuracy(self) -> float | None:
        """Mean test accuracy of the clients' own models; ``None`` unless the algorithm gives each client one."""
        own = self.summary.get("personalised")
        return float(own["mean"]) if own else None

    def reaching(self, target: float | None) -> Point | None:
        """Return the first evaluated round whose validation accuracy is at least `target`."""
        return None if target is None else first_reaching(self.points, target)

    def accuracy_within(self, seconds: float) -> float:
        """Return the validation accuracy of the last evaluated round that ended within so much simulated time."""
        return [point.accuracy for point in self.points if point.simulated_seconds <= seconds][-1]

    def row(self, target: float | None) -> dict[str, Any]:
        """Return the run as a line of `comparison.csv`; sizes in bytes, times in seconds."""
        summary, reached = self.summary, self.reaching(target)
        return {
            "arm": self.arm,
            "seed": self.seed,
            "learning_rate": self.learning_rate,
            "chosen": self.chosen,
            "downstream_validation_accuracy": self.validation_accuracy,
            "downstream_base_accuracy": self.base_accuracy,
            "downstream_test_accuracy": self.test_accuracy,
            "downstream_test_loss": summary["downstream"]["loss"],
            "personalised_test_accuracy": self.personalised_accuracy,
            **dict(_general(summary)),
            "retention_mean": self.retention,
            **dict(_dial(self.dial)),
            "delta_ce_mean": (summary.get("delta_ce") or {}).get(RESERVED_NAME),
            "rounds": summary["rounds"],
            "trainable_parameters": summary["trainable_parameters"],
            "bytes_up": summary.get("bytes_up"),
            "bytes_down": summary.get("bytes_down"),
            "simulated_seconds": summary["simulated_seconds"],
            "wall_seconds": summary["wall_seconds"],
            "peak_rss_bytes": summary["peak_rss_bytes"],
            "target": target,
            "rounds_to_target": reached and reached.round,
            "simulated_seconds_to_target": reached and reached.simulated_seconds,
            "bytes_to_target": reached and reached.bytes,
            "versions": " ".join(f"{name}={number}" for name, number in summary["versions"].items()),
            "folder": str(self.folder),
        }


def _general(summary: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    general = summary.get("general") or {"base": {}, "final": {}}
    for task, score in general["base"].items():
        yield f"{task}_base", score["score"]
        yield f"{task}_final", general["final"][task]["score"]


def _dial(points: Sequence[DialPoint]) -> Iterator[tuple[str, float | None]]:
    for point in points:
        yield f"dial_{point.factor:g}_validation_accuracy", point.accuracy
        yield f"dial_{point.factor:g}_retention_mean", point.mean_retention


def read_run_result(arm: str, seed: int, learning_rate: float | None, chosen: bool, folder: Path) -> RunResult:
    """Return what a finished run left.

    Raises:
        ConfigError: The folder holds no finished run.
    """
    files = RunFolder(folder)
    try:
        summary = json.loads(files.summary.read_text(encoding="utf-8"))
        history = [json.loads(line) for line in files.metrics.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        remedy = f"holds no finished run ({' '.join(str(error).split())}); give a run's folder"
        raise ConfigError(Problem("runs", str(folder), remedy)) from error
    return RunResult(arm, seed, learning_rate, chosen, folder, summary, history)


def read_runs(folders: Sequence[Path]) -> tuple[list[RunResult], list[str]]:
    """Return runs that exist, those that differ in nothing but the seed as one arm, and what makes them unequal.

    Raises:
        ConfigError: A folder holds no finished run.
    """
    configs = [_flat(_read_config(folder)) for folder in folders]
    labels = arm_labels(configs)
    results = [
        read_run_result(label, config["seed"], config.get(".".join(LEARNING_RATE)), True, folder)
        for label, config, folder in zip(labels, configs, folders, strict=True)
    ]
    twice = {(r.arm, r.seed) for r in results if sum((o.arm, o.seed) == (r.arm, r.seed) for o in results) > 1}
    if twice:
        raise ConfigError(*(Problem("runs", arm, f"is there more than once with seed {seed}") for arm, seed in twice))
    return results, budget_differences(configs)


def arm_labels(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a name of each run's arm: its algorithm, and what tells it from other arms of that algorithm.

    Args:
        configs: The runs' configurations with dotted keys.
    """
    arms = [{key: value for key, value in config.items() if key not in _OF_ONE_RUN} for config in configs]
    labels = []
    for arm in arms:
        algorithm = _algorithm(arm)
        rivals = [other for other in arms if _algorithm(other) == algorithm]
        keys = sorted({key for other in rivals for key in other.keys() | arm.keys() if other.get(key) != arm.get(key)})
        differences = [f"{key.rsplit('.', 1)[-1]} {arm.get(key)}" for key in keys]
        labels.append(", ".join([algorithm, *differences]))
    return labels


def _algorithm(config: Mapping[str, Any]) -> str:
    """Return the name of a run's algorithm, behind those that wrap it: `Gated FedBE`."""
    names, key = [], "algorithm"
    while f"{key}.class_path" in config:
        names.append(str(config[f"{key}.class_path"]).rsplit(".", 1)[-1])
        key += ".init_args.algorithm"
    return " ".join(names) or "run"


def budget_differences(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each key of the budget in which runs differ.

    Args:
        configs: The runs' configurations with dotted keys.
    """
    keys = sorted({key for config in configs for key in config})
    sections = set(BUDGET) - set(_OF_ONE_RUN)
    shared = [key for key in keys if section(key) in sections and not key.startswith(FREE)]
    values = {key: sorted({str(config.get(key)) for config in configs}) for key in shared}
    return [f"{key} = {' / '.join(found)}" for key, found in values.items() if len(found) > 1]


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = yaml.safe_load(RunFolder(folder).config.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(Problem("runs", str(folder), "holds no run; give a run's folder")) from error
    return config


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with dotted keys, lists of plain values as one value each."""
    return {key: value for key, value in leaves(config, lists="of mappings") if value != {}}


def write_csv(results: Sequence[RunResult], target: float | None, file: Path) -> None:
    """Write a line per run."""
    rows = [result.row(target) for result in results]
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)

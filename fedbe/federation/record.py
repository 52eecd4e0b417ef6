"""Metrics of a round's record by path, for whatever monitors or logs them."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from fedbe.errors import ConfigError, Problem

Mode = Literal["max", "min"]
"""Whether more or less of a metric is better."""

_SECTIONS = (
    "downstream",
    "personalised",
    "general",
    "retention",
    "delta_ce",
    "bytes",
    "averaging",
    "simulated_seconds",
    "wall_seconds",
)


def flatten(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a record by path, for example ``downstream/accuracy``; what was not measured is left out.

    Args:
        record: A line of `metrics.jsonl`.
    """
    return dict(_leaves({section: record.get(section) for section in _SECTIONS}))


def _leaves(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            found.extend(_leaves(value, f"{prefix}{name}/"))
        elif isinstance(value, int | float):
            found.append((f"{prefix}{name}", value))
    return found


def metric_value(record: Mapping[str, Any], monitor: str) -> float | None:
    """Return one metric of a round; ``None`` if it was not measured in that round.

    Args:
        record: A line of `metrics.jsonl`.
        monitor: Path of the metric, for example ``retention/mean``.

    Raises:
        ConfigError: Its section was measured, and the metric is not in it.
    """
    metrics = flatten(record)
    section = monitor.split("/")[0]
    if monitor not in metrics and any(name.split("/")[0] == section for name in metrics):
        raise ConfigError(Problem("monitor", monitor, f"no such metric; there are {', '.join(metrics)}."))
    return metrics.get(monitor)


def metric_paths(tasks: Sequence[str]) -> list[str]:
    """Return the paths of all metrics that a run with these general tasks records."""
    shares = ["mean", *tasks] if tasks else []
    return [
        *("downstream/accuracy", "downstream/loss"),
        *(f"general/{task}/{figure}" for task in tasks for figure in ("score", "standard_error", "cross_entropy")),
        *(f"{section}/{task}" for section in ("retention", "delta_ce") for task in shares),
        *("bytes/up", "bytes/down", "simulated_seconds", "wall_seconds"),
    ]


def check_monitor(key: str, monitor: str, mode: str, metrics: Collection[str]) -> list[Problem]:
    """Return what is wrong with a monitored metric: a run does not record it, or its mode is none."""
    problems = []
    if monitor not in metrics:
        remedy = f"no such metric in this run; there are {', '.join(metrics)}."
        problems.append(Problem(f"{key}.monitor", monitor, remedy))
    falls = monitor.endswith(("/loss", "/cross_entropy")) or monitor.startswith("delta_ce/")
    if mode not in ("max", "min"):
        problems.append(Problem(f"{key}.mode", mode, "must be max or min."))
    elif falls and mode == "max":
        problems.append(Problem(f"{key}.mode", mode, f"less of {monitor} is better: give min."))
    return problems


def better(value: float, than: float, mode: Mode, min_delta: float = 0.0) -> bool:
    """Return whether a value is better by more than `min_delta`; NaN never is."""
    return value > than + min_delta if mode == "max" else value < than - min_delta

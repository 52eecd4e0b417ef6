"""A round's record, and its metrics by path for whatever monitors or logs them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from fedbe.errors import ConfigError, Problem
from fedbe.storage.nested import leaves

Mode = Literal["max", "min"]
"""Whether more or less of a metric is better."""


@dataclass
class RoundRecord:
    """One line of `metrics.jsonl`.

    Attributes:
        round: Its number; 0 is the base model.
        experience: Index of the task of a sequence; 0 in a plain run.
        downstream: ``accuracy`` and ``loss`` on validation data, of the state that the round ended with.
        personalised: The same of the clients' own models: ``mean``, ``min``, ``max``, ``loss``.
        general: Score, standard error and cross-entropy of each general task.
        retention: General score now over that of the base model, by task, and their ``mean``.
        delta_ce: Rise of the cross-entropy over the base model's, in nats, by task, and their ``mean``.
        bytes: Bytes of tensors that travelled, ``up`` and ``down``.
        simulated_seconds: Time until this round's end, see `FederatedLoop`.
        wall_seconds: Measured time until this round's end.
        cohort: The clients that were asked, those that replaced failed ones last.
        allocation: Client → the units that it was given.
        explanation: Why the allocation is what it is.
        client_seconds: Client → seconds that its part took.
        idle: Clients that had nothing to train.
        late: Clients for whom the server did not wait.
        lacking_memory: Client → bytes that its device has too few.
        failures: What went wrong, client by client.
        averaging: What the averaging rule notes.
        rolled_back: Why the round was taken back, and the scores of the discarded model; ``None`` where it stands.
        metrics: What callbacks have logged, by name.
    """

    round: int
    experience: int = 0
    downstream: dict[str, float] | None = None
    personalised: dict[str, float] | None = None
    general: dict[str, Any] | None = None
    retention: dict[str, float] | None = None
    delta_ce: dict[str, float] | None = None
    bytes: dict[str, int] = field(default_factory=lambda: {"up": 0, "down": 0})
    simulated_seconds: float | None = None
    wall_seconds: float | None = None
    cohort: list[str] = field(default_factory=list)
    allocation: dict[str, list[str]] = field(default_factory=dict)
    explanation: dict[str, Any] = field(default_factory=dict)
    client_seconds: dict[str, float] = field(default_factory=dict)
    idle: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)
    lacking_memory: dict[str, float] = field(default_factory=dict)
    failures: list[dict[str, str]] = field(default_factory=list)
    averaging: dict[str, float] = field(default_factory=dict)
    rolled_back: dict[str, Any] | None = None
    metrics: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the line of `metrics.jsonl`, as plain JSON values."""
        return asdict(self)


SECTIONS = (
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
"""What a record holds figures of; a metric that a callback logs has another name."""


def flatten(record: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of a record by path, for example ``downstream/accuracy``; what was not measured is left out.

    Args:
        record: A line of `metrics.jsonl`.
    """
    sections = {section: record.get(section) for section in SECTIONS}
    numbers = {path: value for path, value in leaves(sections, "/") if isinstance(value, int | float)}
    return numbers | dict(record.get("metrics") or {})


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
    measured = section in SECTIONS and any(name.split("/")[0] == section for name in metrics)
    if measured and monitor not in metrics:
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

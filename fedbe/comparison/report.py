"""`comparison.md`: a comparison as a page."""

from collections.abc import Iterable, Iterator, Sequence

from fedbe.comparison.statistics import Estimate
from fedbe.comparison.summary import Arm, Comparison
from fedbe.evaluation.convergence import Point

HEADER = (
    "arm", "lr", "runs", "**retention at matched score**", "retention at matched score, dialled", "downstream, test",
    "clients' own models, test", "downstream at equal time, validation",
    "retention, end", "ΔCE, end", "sent (MB)", "simulated (s)", "wall (s)", "peak memory (MB)", "rounds to target",
    "simulated to target (s)", "sent to target (MB)", "times as fast",
)  # fmt: skip

MISSING = "–"
"""Stands for a figure that an arm does not have."""


def page(comparison: Comparison) -> str:
    """Return the page: how to read it, the table with the best retention first, and what is to be known besides."""
    header, rows = _without_empty(HEADER, list(_rows(comparison)))
    parts = ["# Comparison", *_introduction(comparison), table(header, rows), *_warnings(comparison)]
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _without_empty(header: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Return the table without the columns in which no arm has a figure."""
    kept = [index for index in range(len(header)) if any(row[index] != MISSING for row in rows)]
    return [header[index] for index in kept], [[row[index] for index in kept] for row in rows]


def shown(estimate: Estimate | None, digits: int = 3, scale: float = 1.0) -> str:
    """Return mean ± standard error."""
    if estimate is None:
        return MISSING
    error = "" if estimate.error is None else f" ± {scale * estimate.error:.{digits}f}"
    return f"{scale * estimate.mean:.{digits}f}{error}"


def percent(estimate: Estimate | None) -> str:
    """Return mean ± standard error of a share, in per cent."""
    return MISSING if estimate is None else f"{shown(estimate, 1, 100)} %"


def ranked(comparison: Comparison) -> list[Arm]:
    """Return the arms, the highest retention at the matched score first, those that do not reach it last."""

    def key(arm: Arm) -> tuple[float, float]:
        matched, test = arm.retention_at(comparison.level), arm.estimate(lambda run: run.test_accuracy)
        return (matched.mean if matched else -1.0, test.mean if test else -1.0)

    return sorted(comparison.arms, key=key, reverse=True)


def _introduction(comparison: Comparison) -> Iterator[str]:
    yield "Means ± standard errors over seeds. Retention: general accuracy ÷ the base model's, mean over general tasks."
    if comparison.level is not None:
        origin = (
            "the highest that all arms which learn anything reach" if comparison.given_level is None else "as given"
        )
        yield (
            f"**Retention at matched score** is read off each run where its downstream accuracy on validation data "
            f"first reaches **{comparison.level:.4f}** ({origin}), between evaluated rounds by linear interpolation."
        )
    if any(arm.mean_dial for arm in comparison.arms):
        yield (
            "**Dialled**: instead of an earlier round's model, the last with a part of what fine-tuning added, from "
            "none (the base model) to all; read off where it first gives the matched score, between measured parts by "
            "linear interpolation."
        )
    if comparison.target is not None:
        yield (
            f"Convergence is timed to a downstream validation accuracy of {comparison.target:.4f}; times as fast: the "
            f"simulated seconds of {comparison.reference.name} ÷ an arm's."
        )
    yield f"Equal time: the {comparison.common_seconds:.0f} simulated seconds that the quickest run took."
    bases = {f"{run.base_accuracy:.4f}" for arm in comparison.arms for run in arm.runs}
    yield f"The base model's downstream accuracy on test data: {', '.join(sorted(bases))}."


def simulated(point: Point) -> float:
    """Return the simulated seconds since a run's start."""
    return point.simulated_seconds


def _rows(comparison: Comparison) -> Iterator[list[str]]:
    for arm in ranked(comparison):
        rates = sorted({f"{run.learning_rate:g}" for run in arm.runs if run.learning_rate is not None})
        delta = arm.estimate(lambda run: (run.summary.get("delta_ce") or {}).get("mean"))
        sent = arm.estimate(lambda run: run.summary.get("bytes_up", 0) + run.summary.get("bytes_down", 0))
        faster = comparison.acceleration(arm, simulated)
        yield [
            arm.name,
            ", ".join(rates) or MISSING,
            str(len(arm.runs)),
            percent(arm.retention_at(comparison.level)),
            percent(arm.dialled_retention_at(comparison.level)),
            shown(arm.estimate(lambda run: run.test_accuracy)),
            shown(arm.estimate(lambda run: run.personalised_accuracy)),
            shown(arm.estimate(lambda run: run.accuracy_within(comparison.common_seconds))),
            percent(arm.estimate(lambda run: run.retention)),
            shown(delta),
            shown(sent, 1, 1e-6),
            shown(arm.estimate(lambda run: run.summary["simulated_seconds"]), 1),
            shown(arm.estimate(lambda run: run.summary["wall_seconds"]), 0),
            shown(arm.estimate(lambda run: run.summary["peak_rss_bytes"]), 0, 1e-6),
            shown(arm.cost(comparison.target, lambda point: point.round), 1),
            shown(arm.cost(comparison.target, simulated), 0),
            shown(arm.cost(comparison.target, lambda point: point.bytes), 1, 1e-6),
            MISSING if faster is None else f"{faster:.2f}",
        ]


def _warnings(comparison: Comparison) -> Iterator[str]:
    level = comparison.level
    short = [arm.name for arm in comparison.arms if level is not None and arm.retention_at(level) is None]
    notes = list(comparison.notes)
    if short:
        notes.append(f"Not every run of these arms reaches the matched score: {', '.join(short)}.")
    low = [arm.name for arm in comparison.arms if arm.mean_dial and arm.dialled_retention_at(level) is None]
    if level is not None and low:
        notes.append(f"Not every final model of these arms gives the matched score on its dial: {', '.join(low)}.")
    versions = {tuple(sorted(result.summary["versions"].items())) for result in comparison.results}
    if len(versions) > 1:
        notes.append("The runs were made with different package versions: see `comparison.csv`.")
    if notes:
        yield "\n".join(["## To be known", "", *(f"- {note}" for note in notes)])

"""``fedbe dial`` and ``fedbe export --dial``: the dial of a finished run, measured, chosen and applied."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path

from fedbe.dial import NEEDS
from fedbe.dial.finished_run import FinishedRun, read_summary
from fedbe.dial.measure import measure_dial
from fedbe.errors import ConfigError, Problem, StorageError
from fedbe.evaluation.dial import Dial, choose_factor, recorded_points
from fedbe.expansion import ExportReport
from fedbe.expansion.card import write_card
from fedbe.expansion.expand import check_dial
from fedbe.figures.dial import dial_figure
from fedbe.figures.style import save
from fedbe.storage.files import explained, replacing_folder
from fedbe.storage.run_folder import RunFolder
from fedbe.system.notice import say

FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0)


def check_factors(factors: Collection[float], retention: float | None) -> list[Problem]:
    """Return the mistakes in the factors to measure and the retention to keep."""
    problems = [
        Problem("--factors", factor, "a factor lies from 0, the base model, to 1, the trained one")
        for factor in factors
        if not 0 <= factor <= 1
    ]
    if retention is not None and not 0 < retention <= 1:
        problems.append(Problem("--retention", retention, "a share of the base model's score lies in (0, 1]"))
    return problems


def measure_run(path: Path, factors: Collection[float] = FACTORS, retention: float | None = None) -> Dial:
    """Measure the dial of a finished run, choose a factor, and write both into its folder.

    What was measured before is not measured again. 0 and 1 are always measured. A picture that cannot be written is
    left out, and a line says so.

    Args:
        path: The run's folder; its `summary.json` and `plots/dial.png` are written.
        factors: Places of the dial, in [0, 1].
        retention: The mean retention to keep; ``None`` for the best trade-off.

    Raises:
        ConfigError: There is no finished run, it has no dial, or its model cannot be made any more.
        StorageError: `summary.json` cannot be written.
    """
    if problems := check_factors(factors, retention):
        raise ConfigError(*problems)
    folder = RunFolder(path)
    summary = read_summary(folder)
    known = {point.factor: point for point in recorded_points(summary)}
    missing = {0.0, 1.0, *factors} - known.keys()
    if missing:
        loop, start = _with_dial(FinishedRun.read(path)).open()
        known |= {point.factor: point for point in measure_dial(loop, start, missing)}
    points = [known[factor] for factor in sorted(known)]
    dial = Dial(points, choose_factor(points, retention), retention)
    folder.write_summary(summary | {"dial": asdict(dial)})
    _draw(dial, folder)
    return dial


def _draw(dial: Dial, folder: RunFolder) -> None:
    """Write the picture; without it all the figures are there."""
    try:
        with explained(f"the folder {folder.plots}"):
            folder.plots.mkdir(exist_ok=True)
        save(dial_figure(dial), folder.plots / "dial.png")
    except StorageError as error:
        say(f"{error}; the dial is in {folder.summary}")


def chosen_factor(path: Path, retention: float | None = None) -> float:
    """Return the factor chosen for a run, measuring its dial first where that was not done.

    Args:
        path: The run's folder.
        retention: The mean retention to keep; ``None`` for what `measure_run` chose.

    Raises:
        ConfigError: As `measure_run`; or the run has no general tasks.
    """
    if problems := check_factors((), retention):
        raise ConfigError(*problems)
    dial = Dial.recorded(read_summary(RunFolder(path))) or measure_run(path, retention=retention)
    chosen = dial.chosen if retention is None else choose_factor(dial.points, retention)
    if chosen is None:
        raise ConfigError(Problem("--dial", "auto", f"{dial.reason}; give a number"))
    return chosen


def export_run(path: Path, to: Path, factor: float) -> ExportReport:
    """Write the model of a finished run with a part of what fine-tuning added, as its algorithm exports it.

    Args:
        path: The run's folder.
        to: A new or empty folder.
        factor: The part, at least 0.

    Raises:
        ConfigError: There is no finished run, it has no dial, or `to` holds something.
        ExpansionError: The factor is out of range.
        StorageError: The model cannot be written; nothing is left of it then.
    """
    check_dial(factor)
    loop, start = _with_dial(FinishedRun.read(path)).open(general_tasks=False)
    adaptation = loop.algorithm.adaptation
    loop.server.restore(adaptation.dial(start, loop.server.state, factor))
    with (
        explained(f"the model in {to}", "the run is intact: make room, then export again"),
        replacing_folder(to) as new,
    ):
        new.rmdir()  # whoever writes it makes it
        report = adaptation.export(loop.model, new, loop.plan.tokenizer)
        write_card(new, report, loop.model, loop.algorithm.title, factor)
    return replace(report, directory=to)


def _with_dial(finished: FinishedRun) -> FinishedRun:
    algorithm = finished.run.algorithm
    if not algorithm.offers >= NEEDS:
        remedy = "has no dial: there is no global model that clients' training is part of"
        raise ConfigError(Problem("run", str(finished.folder.path), f"{type(algorithm).__name__} {remedy}"))
    return finished

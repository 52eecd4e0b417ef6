"""``fedbe dial`` and ``fedbe export --dial``: the dial of a finished run, measured, chosen and applied."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich.box import SIMPLE_HEAD
from rich.table import Table

from fedbe.dial.finished_run import FinishedRun, read_summary
from fedbe.dial.measure import measure_dial
from fedbe.errors import ConfigError, Problem
from fedbe.evaluation.dial import DialPoint, choose_factor, recorded_points
from fedbe.evaluation.tasks import RESERVED_NAME
from fedbe.expansion import ExportReport
from fedbe.expansion.expand import check_dial
from fedbe.figures.style import COLORS, GREY, STYLE
from fedbe.figures.tables import readable_share
from fedbe.storage.run_folder import RunFolder

FACTORS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Dial:
    """The measured dial of a run.

    Attributes:
        points: In ascending order of the factor, from 0 to 1.
        chosen: The chosen factor; ``None`` without general tasks.
        wanted_retention: The retention to which it was chosen; ``None`` for the best trade-off.
    """

    points: list[DialPoint]
    chosen: float | None
    wanted_retention: float | None

    @classmethod
    def recorded(cls, summary: Mapping[str, Any]) -> Dial | None:
        """Return what a `summary.json` holds of it."""
        if not summary.get("dial"):
            return None
        record = summary["dial"]
        return cls(recorded_points(summary), record["chosen"], record["wanted_retention"])

    @property
    def reason(self) -> str:
        """Why the factor was chosen."""
        if self.chosen is None:
            return "no factor is chosen: the run has no general tasks to see what was kept"
        if self.wanted_retention is None:
            return f"{self.chosen:g} is the best trade-off between retention and what is left of the downstream gain"
        return f"{self.chosen:g} is the largest of these that keeps {readable_share(self.wanted_retention)} or more"


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

    What was measured before is not measured again. 0 and 1 are always measured.

    Args:
        path: The run's folder; its `summary.json` and `plots/dial.png` are written.
        factors: Places of the dial, in [0, 1].
        retention: The mean retention to keep; ``None`` for the best trade-off.

    Raises:
        ConfigError: There is no finished run, it has no dial, or its model cannot be made any more.
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
    folder.plots.mkdir(exist_ok=True)
    dial_figure(dial).savefig(folder.plots / "dial.png")
    return dial


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
    """
    check_dial(factor)
    loop, start = _with_dial(FinishedRun.read(path)).open(general_tasks=False)
    loop.restore(loop.algorithm.dial(start, loop.state, factor))
    return loop.algorithm.export(loop.model, to, loop.tokenizer)


def _with_dial(finished: FinishedRun) -> FinishedRun:
    algorithm = finished.run.algorithm
    if not algorithm.has_dial:
        remedy = "has no dial: there is no global model that clients' training is part of"
        raise ConfigError(Problem("run", str(finished.folder.path), f"{type(algorithm).__name__} {remedy}"))
    return finished


def dial_table(dial: Dial) -> Table:
    """Return the points, a line each, with the chosen one marked."""
    caption = "downstream: accuracy on validation data; general tasks: what is kept"
    table = Table(box=SIMPLE_HEAD, caption=caption, caption_justify="left")
    names = list(dial.points[0].retention)
    for title in ("dial", "downstream", *names):
        table.add_column(title, justify="right", no_wrap=True)
    for point in dial.points:
        mark = "→ " if point.factor == dial.chosen else ""
        kept = [readable_share(point.retention[name]) for name in names]
        table.add_row(f"{mark}{point.factor:g}", f"{point.accuracy:.3f}", *kept)
    return table


def dial_figure(dial: Dial) -> Figure:
    """Return what is learned and what is kept over the dial, with the chosen factor marked."""
    names = [name for name in dial.points[0].retention if name != RESERVED_NAME]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.4 if names else 5.0, 3.9), layout="constrained")
        panels = figure.subplots(1, 2 if names else 1, squeeze=False)[0]
        _draw(panels[0], dial, [point.accuracy for point in dial.points], COLORS[0])
        panels[0].set_title("Learned: downstream task")
        panels[0].set_ylabel("accuracy on validation data")
        if names:
            for index, name in enumerate(names):
                color = COLORS[1 + index % (len(COLORS) - 1)]
                _draw(panels[1], dial, [point.retention[name] for point in dial.points], color, name)
            if len(names) > 1:
                _draw(panels[1], dial, [point.retention[RESERVED_NAME] for point in dial.points], "black", "mean")
            panels[1].set_title("Kept: general tasks")
            panels[1].set_ylabel("retention: general accuracy, % of base")
            panels[1].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}"))
            panels[1].legend(frameon=False, fontsize=9.5)
        for panel in panels:
            panel.set_xlabel("dial: 0 the base model, 1 as trained")
            if dial.chosen is not None:
                panel.axvline(dial.chosen, color=GREY, linestyle=(0, (4, 3)), linewidth=1.2)
                place = (dial.chosen, 0.02)
                panel.annotate(" chosen", place, xycoords=panel.get_xaxis_transform(), color=GREY, fontsize=9)
    return figure


def _draw(panel: Axes, dial: Dial, values: list[float], color: str, label: str | None = None) -> None:
    factors = [point.factor for point in dial.points]
    panel.plot(factors, values, color=color, linewidth=2, marker="o", markersize=4, label=label)

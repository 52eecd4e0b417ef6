"""The pictures of a comparison."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedbe.comparison.report import ranked
from fedbe.comparison.statistics import Estimate, pareto_front
from fedbe.comparison.summary import Arm, Comparison, Place
from fedbe.evaluation.convergence import Point
from fedbe.figures.style import COLORS, GREY, STYLE, plain

# More arms than colours differ in marker and dash.
_ARM_COLORS = (*COLORS, "#000000")
_MARKERS = ("o", "s", "^", "D")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)))
_COSTS: Mapping[str, Callable[[Point], float]] = {
    "rounds": lambda point: point.round,
    "simulated seconds": lambda point: point.simulated_seconds,
    "bytes": lambda point: point.bytes,
}


def figures(comparison: Comparison) -> Iterator[tuple[str, Figure]]:
    """Yield the pictures with their file names."""
    if any(arm.mean_trajectory for arm in comparison.arms):
        yield "learning_against_forgetting.png", pareto_figure(comparison)
    yield "downstream.png", downstream_figure(comparison)
    if comparison.target is not None:
        yield "convergence.png", convergence_figure(comparison)


def looks(comparison: Comparison) -> dict[str, dict[str, Any]]:
    """Return colour, marker and dash of each arm, the same in every picture."""
    count = len(_ARM_COLORS)
    return {
        arm.name: {
            "color": _ARM_COLORS[index % count],
            "marker": _MARKERS[index // count % len(_MARKERS)],
            "linestyle": _DASHES[index // count % len(_DASHES)],
        }
        for index, arm in enumerate(comparison.arms)
    }


def pareto_figure(comparison: Comparison) -> Figure:
    """Return learning against forgetting: each arm's way over the rounds and where it ended, with standard errors.

    Dotted, the final models along their dial.
    """
    styles, arms = looks(comparison), [arm for arm in ranked(comparison) if arm.mean_trajectory]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.2, max(5.2, 1.2 + 0.27 * len(arms))), layout="constrained")
        panel = figure.subplots()
        for arm in arms:
            _draw_way(panel, arm, styles[arm.name])
        _draw_dials(panel, arms, styles)
        _draw_front(panel, [arm.mean_trajectory[-1] for arm in arms])
        if comparison.level is not None:
            panel.axvline(comparison.level, color=GREY, linestyle=(0, (4, 3)), linewidth=1, label="matched score")
        panel.set_title("Learning against forgetting")
        panel.set_xlabel("downstream accuracy on validation data")
        panel.set_ylabel("retention: general accuracy, % of base")
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}"))
        figure.legend(loc="outside right center", frameon=False, fontsize=9.5)
    return figure


def _draw_way(panel: Axes, arm: Arm, style: Mapping[str, Any]) -> None:
    xs, ys = zip(*arm.mean_trajectory, strict=True)
    color = style["color"]
    panel.plot(xs, ys, color=color, linestyle=style["linestyle"], linewidth=1.2, alpha=0.65)
    x, y = (Estimate.of([run.trajectory[-1][axis] for run in arm.runs]) for axis in (0, 1))
    panel.errorbar(
        x.mean, y.mean, xerr=x.error or 0, yerr=y.error or 0, color=color, marker=style["marker"], markersize=7,
        markeredgecolor="white", markeredgewidth=0.8, elinewidth=1.2, linestyle=style["linestyle"],
        label=plain(arm.name), zorder=3,
    )  # fmt: skip


def _draw_dials(panel: Axes, arms: Sequence[Arm], styles: Mapping[str, Mapping[str, Any]]) -> None:
    dotted: dict[str, Any] = {"linestyle": ":", "linewidth": 1.2, "markersize": 3}
    measured = [arm for arm in arms if arm.mean_dial]
    for arm in measured:
        xs, ys = zip(*arm.mean_dial, strict=True)
        panel.plot(xs, ys, color=styles[arm.name]["color"], marker=styles[arm.name]["marker"], **dotted)
    if measured:
        panel.plot([], [], color=GREY, marker="o", label="dial", **dotted)


def _draw_front(panel: Axes, ends: Sequence[tuple[float, float]]) -> None:
    """Join the end points that no other beats in both, as a staircase: what lies below it is dominated."""
    front = [ends[index] for index in pareto_front(ends)]
    xs, ys = zip(*front, strict=True)
    panel.step(xs, ys, where="pre", color=GREY, linewidth=5, alpha=0.2, zorder=1)
    panel.scatter(xs, ys, s=190, facecolors="none", edgecolors=GREY, linewidths=1, label="Pareto front of ends")


def downstream_figure(comparison: Comparison) -> Figure:
    """Return downstream accuracy by round, simulated second and byte: means with a band of one standard error."""
    styles = looks(comparison)
    scale, unit = _byte_unit(max((place.bytes for arm in comparison.arms for place in arm.places), default=0.0))
    axes: Mapping[str, Callable[[Place], float]] = {
        "round": lambda place: place.round,
        "simulated time (s)": lambda place: place.simulated_seconds,
        f"tensors sent, up and down ({unit})": lambda place: place.bytes / scale,
    }
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(14.5, max(4.4, 1.2 + 0.27 * len(comparison.arms))), layout="constrained")
        panels = figure.subplots(1, 3, sharey=True)
        for panel, (label, position) in zip(panels, axes.items(), strict=True):
            for arm in comparison.arms:
                _draw_curve(panel, arm, position, styles[arm.name])
            if comparison.target is not None:
                panel.axhline(comparison.target, color=GREY, linestyle=(0, (4, 3)), linewidth=1)
            panel.set_xlabel(label)
            panel.margins(x=0.02)
            panel.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=label == "round"))
        panels[0].set_title("Downstream task (dashed: the target)")
        panels[0].set_ylabel("accuracy on validation data")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=9.5)
    return figure


def _draw_curve(panel: Axes, arm: Arm, position: Callable[[Place], float], style: Mapping[str, Any]) -> None:
    xs, ys = [position(place) for place in arm.places], [place.accuracy.mean for place in arm.places]
    errors = [place.accuracy.error or 0.0 for place in arm.places]
    panel.plot(xs, ys, linewidth=1.6, markersize=4, markevery=max(1, len(xs) // 8), label=plain(arm.name), **style)
    low, high = ([y + sign * e for y, e in zip(ys, errors, strict=True)] for sign in (-1, 1))
    panel.fill_between(xs, low, high, color=style["color"], alpha=0.15, linewidth=0)


def _byte_unit(largest: float) -> tuple[float, str]:
    units = {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
    return max(((scale, unit) for unit, scale in units.items() if scale <= largest), default=(1.0, "B"))


def convergence_figure(comparison: Comparison) -> Figure:
    """Return bars of what it took each arm to reach the target, in rounds, simulated seconds and bytes."""
    baseline = comparison.reference.name
    with mpl.rc_context(STYLE | {"axes.grid.axis": "x"}):
        figure = Figure(figsize=(14.5, 1.6 + 0.32 * len(comparison.arms)), layout="constrained")
        panels = figure.subplots(1, 3, sharey=True)
        for panel, (unit, cost) in zip(panels, _COSTS.items(), strict=True):
            _draw_bars(panel, comparison, cost, baseline)
            panel.set_xlabel(f"{plain(baseline)}'s {unit} ÷ the arm's")
            panel.set_title(f"in {unit}")
        panels[0].set_yticks(range(len(comparison.arms)), [plain(arm.name) for arm in comparison.arms])
        panels[0].invert_yaxis()
        figure.suptitle(
            f"How many times as fast to a downstream accuracy of {comparison.target:.3f}",
            x=0.01,
            ha="left",
            fontsize=12,
        )
    return figure


def _draw_bars(panel: Axes, comparison: Comparison, cost: Callable[[Point], float], baseline: str) -> None:
    values = [comparison.acceleration(arm, cost) for arm in comparison.arms]
    colors = [GREY if arm.name == baseline else _ARM_COLORS[0] for arm in comparison.arms]
    panel.barh(range(len(values)), [value or 0.0 for value in values], color=colors, height=0.7)
    panel.axvline(1.0, color=GREY, linestyle=(0, (4, 3)), linewidth=1)
    for index, value in enumerate(values):
        text = "not reached" if value is None else f"{value:.2f}×"
        panel.annotate(text, (value or 0.0, index), (4, 0), textcoords="offset points", va="center", fontsize=9.5)
    panel.margins(x=0.15)
    panel.set_xlim(left=0)

"""The pictures of a run, drawn from its records."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fedbe.evaluation.tasks import RESERVED_NAME
from fedbe.expansion.placement import Choice
from fedbe.figures.allocation import allocation_figure
from fedbe.figures.confusion import confusion_figure
from fedbe.figures.placement import placement_figure
from fedbe.figures.style import COLORS, GREY, STYLE, plain
from fedbe.figures.tables import readable_share

Records = Sequence[Mapping[str, Any]]
"""The records of a run, as in `metrics.jsonl`."""

Axis = Literal["round", "simulated_seconds", "bytes"]
"""What a curve is drawn over."""

_DASHED: dict[str, Any] = {"linestyle": (0, (4, 3)), "linewidth": 1.2}
_STEPS = [1, 2, 5, 10]


@dataclass(frozen=True)
class Curve:
    """One line of a picture.

    Attributes:
        label: Its name.
        x: Where it was measured.
        y: What was measured.
        color: Its colour.
    """

    label: str
    x: list[float]
    y: list[float]
    color: str


def learning_figure(history: Records, axis: Axis = "round") -> Figure:
    """Return what the model learned, and what it kept, over rounds, simulated time or bytes.

    Args:
        history: The records of a run; the first is the base model's, whose level is dashed.
        axis: What to draw over.
    """
    positions, label = _positions(history, axis)
    kept = _general_curves(history, positions, "general", lambda scores, name: scores[name]["score"])
    ratios = _general_curves(history, positions, "retention", lambda shares, name: shares[name])
    with mpl.rc_context(STYLE):
        count = 3 if kept else 1
        figure = Figure(figsize=(4.3 * count if kept else 5.6, 3.9), layout="constrained")
        panels = list(figure.subplots(1, count, squeeze=False)[0])
        learned = _learned(history, positions)
        _draw(panels[0], "Learned: downstream task", "accuracy on validation data", [learned])
        _name_base(panels[0], learned)
        if kept:
            _draw(panels[1], "Kept: general tasks", "accuracy on general tasks", kept)
            _draw(panels[2], "Retention", "general accuracy, % of base", ratios, percent=True)
        for panel in panels:
            panel.set_xlabel(label)
            if axis == "round":
                panel.xaxis.set_major_locator(MaxNLocator(nbins=8, steps=_STEPS, integer=True))
    return figure


def _positions(history: Records, axis: Axis) -> tuple[list[float], str]:
    """Return where each record stands on the axis, and the axis' label with its unit."""
    if axis == "round":
        return [record["round"] for record in history], "round"
    if axis == "bytes":
        values = list(accumulate(float(sum(record["bytes"].values())) for record in history))
        scale, unit = _unit(values[-1], {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12})
        return [value / scale for value in values], f"tensors sent, up and down ({unit})"
    values = [record["simulated_seconds"] or 0.0 for record in history]
    scale, unit = _unit(values[-1] / 2, {"s": 1, "min": 60, "h": 3600})
    return [value / scale for value in values], f"simulated time ({unit})"


def _unit(largest: float, units: Mapping[str, float]) -> tuple[float, str]:
    fitting = [(scale, unit) for unit, scale in units.items() if scale <= largest]
    return max(fitting, default=(1.0, next(iter(units))))


def _learned(history: Records, positions: Sequence[float]) -> Curve:
    points = [(x, r["downstream"]["accuracy"]) for x, r in zip(positions, history, strict=True) if r["downstream"]]
    return Curve("downstream", [x for x, _ in points], [y for _, y in points], COLORS[0])


def _general_curves(history: Records, positions: Sequence[float], section: str, value: Any) -> list[Curve]:
    measured = [(x, record[section]) for x, record in zip(positions, history, strict=True) if record[section]]
    names = [name for name in (measured[0][1] if measured else {}) if name != RESERVED_NAME]
    xs = [x for x, _ in measured]
    curves = [
        Curve(name, xs, [value(scores, name) for _, scores in measured], COLORS[1 + index % (len(COLORS) - 1)])
        for index, name in enumerate(names)
    ]
    if section == "retention" and len(names) > 1:
        curves.append(Curve(RESERVED_NAME, xs, [value(scores, RESERVED_NAME) for _, scores in measured], "black"))
    return curves


def _draw(panel: Axes, title: str, label: str, curves: Sequence[Curve], percent: bool = False) -> None:
    panel.set_title(title)
    panel.set_ylabel(label)
    panel.margins(x=0.03, y=0.1)
    for curve in curves:
        marker = "o" if len(curve.x) <= 40 else None
        panel.plot(curve.x, curve.y, color=curve.color, linewidth=2, marker=marker, markersize=3.5)
        if not percent:
            panel.axhline(curve.y[0], color=curve.color, **_DASHED)
    if percent:
        panel.axhline(1.0, color=GREY, **_DASHED)
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}"))
    _widen(panel, 0.1 if percent else 0.05)
    _name_ends(panel, curves, percent)
    panel.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=_STEPS))


def _widen(panel: Axes, span: float) -> None:
    """Keep noise from filling a picture: the axis spans at least this much."""
    low, high = panel.get_ylim()
    missing = max(0.0, span - (high - low))
    panel.set_ylim(low - missing / 2, high + missing / 2)


def _name_ends(panel: Axes, curves: Sequence[Curve], percent: bool) -> None:
    """Write each curve's name and figures beside its end, far enough apart to be read; a legend could cover curves."""
    low, high = panel.get_ylim()
    places = spread([curve.y[-1] for curve in curves], 0.13 * (high - low), high)
    for curve, place in zip(curves, places, strict=True):
        figures = readable_share(curve.y[-1]) if percent else f"{curve.y[0]:.3f} → {curve.y[-1]:.3f}"
        panel.annotate(
            f"{plain(curve.label)}\n{figures}",
            (1.02, place),
            xycoords=panel.get_yaxis_transform(),
            color=curve.color,
            va="center",
            fontsize=10,
            annotation_clip=False,
        )


def _name_base(panel: Axes, curve: Curve) -> None:
    """Say what the dashed line is, on the side of it where the curve does not end."""
    rose = curve.y[-1] >= curve.y[0]
    place = (1.0, curve.y[0])
    panel.annotate(
        "base model",
        place,
        (-2, -4 if rose else 4),
        xycoords=panel.get_yaxis_transform(),
        textcoords="offset points",
        color=GREY,
        ha="right",
        va="top" if rose else "bottom",
        fontsize=9,
    )


def spread(values: Sequence[float], gap: float, highest: float) -> list[float]:
    """Return places near `values`, in their order, at least `gap` apart and none above `highest`."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    places = [min(values[index], highest) for index in order]
    for below, above in pairwise(range(len(places))):
        places[above] = max(places[above], places[below] + gap)
    ceiling = highest
    for index in reversed(range(len(places))):
        places[index] = min(places[index], ceiling)
        ceiling = places[index] - gap
    return [place for _, place in sorted(zip(order, places, strict=True))]


def figures(history: Records, summary: Mapping[str, Any]) -> Iterator[tuple[str, Figure]]:
    """Yield the pictures of a run with their file names.

    Args:
        history: Its records.
        summary: What `summary.json` holds of it.
    """
    yield "learning.png", learning_figure(history)
    yield "learning_by_second.png", learning_figure(history, "simulated_seconds")
    yield "learning_by_byte.png", learning_figure(history, "bytes")
    allocation = allocation_figure(history)
    if allocation is not None:
        yield "allocation.png", allocation
    placement = history[0]["explanation"].get("placement")
    chosen = None if placement is None else placement_figure(Choice.from_dict(placement))
    if chosen is not None:
        yield "placement.png", chosen
    if by_class := summary.get("by_class"):
        yield "confusion.png", confusion_figure(by_class["confusion"])

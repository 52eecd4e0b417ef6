"""The picture of a placement; imported by those who draw, not by the package."""

from collections.abc import Iterator

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fedbe.expansion.placement import Choice, Reason
from fedbe.figures.style import COLORS, GREY, STYLE

_REST = "#C8C8C8"


def placement_figure(choice: Choice) -> Figure | None:
    """Return what a block would gain at each position, which positions were taken, and in which order.

    Bars are the clients' mean scores times their agreement; what they disagree on is outlined above.

    Args:
        choice: A choice.

    Returns:
        The picture; None if the choice was made without scores.
    """
    scored = [reason for reason in choice.reasons if reason.score is not None]
    if not scored:
        return None
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(min(14.0, 3.6 + 0.42 * len(scored)), 3.9), layout="constrained")
        panel = figure.subplots()
        panel.grid(axis="x", visible=False)
        for label, color, reasons in _groups(scored):
            xs, gains = [reason.position for reason in reasons], [_gain(reason) for reason in reasons]
            panel.bar(xs, gains, color=color, label=label, width=0.75)
        _outline_scores(panel, scored)
        for reason in scored:
            if reason.order is not None:
                place = (reason.position, reason.score or 0.0)
                panel.annotate(str(reason.order), place, (0, 3), textcoords="offset points", ha="center", weight="bold")
        panel.set_title("Where a block would gain most")
        panel.set_xlabel("above base block")
        panel.set_xticks([reason.position for reason in scored][:: max(1, len(scored) // 24)])
        panel.set_ylabel("first-order gain (gradient norm)")
        panel.margins(y=0.12)
        figure.legend(loc="outside right center", frameon=False, fontsize=9.5)
    return figure


def _groups(scored: list[Reason]) -> Iterator[tuple[str, str, list[Reason]]]:
    taken = [reason for reason in scored if reason.order is not None]
    rest = [reason for reason in scored if reason.order is None]
    yield "taken, in this order", COLORS[0], taken
    if rest:
        yield "left", _REST, rest


def _outline_scores(panel: Axes, scored: list[Reason]) -> None:
    if any((reason.agreement or 0.0) < 1 for reason in scored):
        xs, ys = [reason.position for reason in scored], [reason.score or 0.0 for reason in scored]
        panel.bar(xs, ys, width=0.75, fill=False, edgecolor=GREY, linewidth=0.8, label="clients disagree")


def _gain(reason: Reason) -> float:
    return (reason.score or 0.0) * (reason.agreement or 0.0)

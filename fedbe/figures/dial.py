"""The measured dial of a run as a table and as a picture."""

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from fedbe.evaluation.dial import Dial
from fedbe.evaluation.tasks import RESERVED_NAME
from fedbe.figures.style import COLORS, GREY, STYLE, plain
from fedbe.figures.tables import readable_share


def dial_table(dial: Dial) -> Table:
    """Return the points, a line each, with the chosen one marked."""
    caption = "downstream: accuracy on validation data; general tasks: what is kept"
    table = Table(box=SIMPLE_HEAD, caption=caption, caption_justify="left")
    names = list(dial.points[0].retention)
    for title in ("dial", "downstream", *map(escape, names)):
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
            _draw_kept(panels[1], dial, names)
        for panel in panels:
            panel.set_xlabel("dial: 0 the base model, 1 as trained")
            if dial.chosen is not None:
                panel.axvline(dial.chosen, color=GREY, linestyle=(0, (4, 3)), linewidth=1.2)
                place = (dial.chosen, 0.02)
                panel.annotate(" chosen", place, xycoords=panel.get_xaxis_transform(), color=GREY, fontsize=9)
    return figure


def _draw_kept(panel: Axes, dial: Dial, names: list[str]) -> None:
    for index, name in enumerate(names):
        color = COLORS[1 + index % (len(COLORS) - 1)]
        _draw(panel, dial, [point.retention[name] for point in dial.points], color, plain(name))
    if len(names) > 1:
        _draw(panel, dial, [point.retention[RESERVED_NAME] for point in dial.points], "black", "mean")
    panel.set_title("Kept: general tasks")
    panel.set_ylabel("retention: general accuracy, % of base")
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}"))
    panel.legend(frameon=False, fontsize=9.5)


def _draw(panel: Axes, dial: Dial, values: list[float], color: str, label: str | None = None) -> None:
    factors = [point.factor for point in dial.points]
    panel.plot(factors, values, color=color, linewidth=2, marker="o", markersize=4, label=label)

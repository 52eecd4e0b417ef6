"""A partition as a table and as a picture."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedbe.datamodules.report import ClientShare
from fedbe.figures.style import plain, save

_OTHER = "other"
_MOST_COLOURS = 10
_GREY = 7
_MOST_NAMED_CLIENTS = 30


def print_partition(shares: Sequence[ClientShare], console: Console, top_labels: int = 3) -> None:
    """Print a table: a line a client, and the sums below; columns that nothing is known of are left out.

    Args:
        shares: What each client holds.
        console: Where to print.
        top_labels: How many labels to name, the most frequent ones.
    """
    table = Table(title="Who gets what", show_footer=True)
    table.add_column("client", footer=f"{len(shares)} clients")
    total = sum(share.samples for share in shares)
    columns: list[tuple[str, list[int | None]]] = [
        ("rows", [share.rows for share in shares]),
        ("samples", [share.samples for share in shares]),
        ("tokens", [share.tokens for share in shares]),
    ]
    known = [(name, counts) for name, values in columns if (counts := _known(values))]
    for name, counts in known:
        table.add_column(name, justify="right", footer=f"{sum(counts):,}")
    table.add_column("share", justify="right", footer="100.0 %")
    labelled = any(share.labels for share in shares)
    if labelled:
        table.add_column("most frequent labels", footer=f"{len(_label_totals(shares))} labels")
    for line, share in enumerate(shares):
        cells = [f"{counts[line]:,}" for _, counts in known]
        cells += [f"{100 * share.samples / max(total, 1):.1f} %"]
        table.add_row(escape(share.client_id), *cells, *([escape(_top(share.labels, top_labels))] if labelled else []))
    console.print(table)


def plot_partition(shares: Sequence[ClientShare], path: str | Path) -> None:
    """Draw a bar a client and write it to ``path``: rows stacked by label, else tokens, else samples.

    Args:
        shares: What each client holds.
        path: Image file to write, its kind by the ending.

    Raises:
        StorageError: It cannot be written.
    """
    figure = Figure(figsize=(min(max(6.0, 2.2 + 0.34 * len(shares)), 13.0), 4.4), layout="constrained", dpi=150)
    axes = figure.add_subplot()
    if any(share.labels for share in shares):
        _draw_labels(axes, shares)
    else:
        _draw_sizes(axes, shares)
    _name_clients(axes, [share.client_id for share in shares])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    save(figure, Path(path))


def _draw_labels(axes: Axes, shares: Sequence[ClientShare]) -> None:
    totals = _label_totals(shares)
    named = [label for label, _ in totals.most_common()]
    if len(named) > _MOST_COLOURS:
        named = named[: _MOST_COLOURS - 1]
    rest = [sum(share.labels.values()) - sum(share.labels[label] for label in named) for share in shares]
    parts = [(label, [share.labels[label] for share in shares]) for label in sorted(named)]
    if any(rest):
        parts.append((f"{_OTHER} ({len(totals) - len(named)})", rest))
    distinct = list(colormaps["tab10"].colors)  # type: ignore[attr-defined]
    distinct.append(distinct.pop(_GREY))  # for the rest, or for the tenth label
    colours = [*distinct[: len(named)], distinct[-1]]
    below = [0] * len(shares)
    for (label, counts), colour in zip(parts, colours, strict=False):
        axes.bar(range(len(shares)), counts, bottom=below, label=plain(_shortened(label)), color=colour, width=0.85)
        below = [low + count for low, count in zip(below, counts, strict=True)]
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(handles[::-1], labels[::-1], title="label", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    axes.set_ylabel("rows")


def _draw_sizes(axes: Axes, shares: Sequence[ClientShare]) -> None:
    tokens = _known([share.tokens for share in shares])
    axes.bar(range(len(shares)), tokens or [share.samples for share in shares], color="tab:blue", width=0.85)
    axes.set_ylabel("tokens" if tokens else "samples")


def _name_clients(axes: Axes, names: Sequence[str]) -> None:
    axes.set_xlim(-0.7, len(names) - 0.3)
    if len(names) > _MOST_NAMED_CLIENTS:
        axes.set_xlabel(f"client, by its place in the table (1 to {len(names)})")
        ticks = [0, *range(9, len(names), 10)] if len(names) <= 200 else [0, len(names) - 1]
        axes.set_xticks(ticks, [str(tick + 1) for tick in ticks])
        return
    long = max(map(len, names), default=0) > 3
    axes.set_xlabel("client")
    axes.set_xticks(
        range(len(names)),
        [plain(_shortened(name)) for name in names],
        rotation=45 if long else 0,
        ha="right" if long else "center",
        rotation_mode="anchor" if long else "default",
    )


def _known(values: Sequence[int | None]) -> list[int]:
    """Return the values if all are known, else nothing."""
    known = [value for value in values if value is not None]
    return known if len(known) == len(values) else []


def _label_totals(shares: Sequence[ClientShare]) -> Counter[str]:
    return sum((share.labels for share in shares), Counter())


def _top(labels: Counter[str], count: int) -> str:
    named = [f"{_shortened(label)}: {number:,}" for label, number in labels.most_common(count)]
    return ", ".join(named) + (f", {len(labels) - count} more" if len(labels) > count else "")


def _shortened(name: str, longest: int = 22) -> str:
    return name if len(name) <= longest else f"{name[: longest - 1]}…"

"""What a finished run says of itself, on a terminal."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from fedbe.evaluation.tasks import RESERVED_NAME


def readable_bytes(count: float) -> str:
    """Return a number of bytes in decimal units, three figures."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def readable_seconds(seconds: float) -> str:
    """Return a duration as ``s``, ``min:s`` or ``h:min:s``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"


def readable_share(value: float) -> str:
    """Return a share as a percentage."""
    return f"{100 * value:.1f} %"


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Return the table a run ends with: the downstream task and each general task, base against final.

    Args:
        summary: The content of `summary.json`; what was not measured is left out.
    """
    table = Table(
        title=escape(f"{summary.get('algorithm', 'Run')}, {summary.get('rounds', '?')} rounds"),
        title_justify="left",
        caption="accuracy ± standard error; Δ loss in nats",
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    table.add_column("task", no_wrap=True)
    for title in ("base", "final", "change", "kept", "Δ loss"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in _rows(summary):
        table.add_row(*row)
    return table


def _rows(summary: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    before, after = summary.get("downstream_base"), summary.get("downstream")
    if before and after:
        values = [before["accuracy"], after["accuracy"]]
        loss = after["loss"] - before["loss"]
        yield "downstream", *map(_accuracy, (before, after)), f"{values[1] - values[0]:+.3f}", "", f"{loss:+.3f}"
    general, kept, losses = (summary.get(key) or {} for key in ("general", "retention", "delta_ce"))
    for name, score in general.get("base", {}).items():
        final = general["final"][name]
        change = f"{final['score'] - score['score']:+.3f}"
        yield escape(name), _score(score), _score(final), change, _share(kept.get(name)), _signed(losses.get(name))
    if kept:
        yield "general, mean", "", "", "", _share(kept[RESERVED_NAME]), _signed(losses.get(RESERVED_NAME))


def _accuracy(score: Mapping[str, float]) -> str:
    error = score.get("standard_error")  # summaries of earlier versions have none
    return f"{score['accuracy']:.3f}" + ("" if error is None else f" ± {error:.3f}")


def _score(score: Mapping[str, float]) -> str:
    return f"{score['score']:.3f} ± {score['standard_error']:.3f}"


def _share(value: float | None) -> str:
    return "-" if value is None else readable_share(value)


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.3f}"


def summary_lines(summary: Mapping[str, Any], folder: Path) -> list[str]:
    """Return the lines below the table: bytes, time, why the run ended, and where things are."""
    lines = []
    if "bytes_up" in summary:
        up, down = readable_bytes(summary["bytes_up"]), readable_bytes(summary["bytes_down"])
        lines.append(f"sent      {up} up, {down} down")
    if "wall_seconds" in summary:
        wall, simulated = (readable_seconds(summary[f"{clock}_seconds"]) for clock in ("wall", "simulated"))
        lines.append(f"time      {wall}; clients side by side would have trained for {simulated}")
        if "evaluation_seconds" in summary:
            share = readable_share(summary["evaluation_seconds"] / summary["wall_seconds"])
            lines.append(f"scoring   {share} of that time")
    if summary.get("stop_reason"):
        lines.append(f"ended     {summary['stop_reason']}")
    if summary.get("kept_round") is not None:
        lines.append(f"kept      the model after round {summary['kept_round']}")
    if summary.get("kept_note"):
        lines.append(f"note      {summary['kept_note']}")
    model = [f"model     {folder / 'model'}"]
    if loading := summary.get("model", {}).get("note"):
        model.append(f"loading   {loading}")
    return [*lines, *model, f"pictures  {folder / 'plots'}"]

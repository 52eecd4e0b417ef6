"""Tables of what `run.py` measured: ``python benchmarks/speed/report.py runs/speed.jsonl``."""

import json
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

MB = 1e6
Lines = dict[tuple[str, str], list[dict[str, Any]]]


def report(results: Path) -> str:
    """Return the tables, in Markdown."""
    lines: Lines = {}
    for line in map(json.loads, results.read_text().splitlines()):
        lines.setdefault((line["case"]["name"], line["side"]), []).append(line)
    timed = {key: found for key, found in lines.items() if "peak_bytes" not in found[0]}
    sampled = {key: found for key, found in lines.items() if "peak_bytes" in found[0]}
    parts = [ratio_table(timed), time_table(timed), start_table(timed), memory_table(sampled), flower_table(lines)]
    return "\n\n".join(part for part in parts if part)


def time_table(lines: Lines) -> str:
    """Return seconds of a round, and beyond the local steps; the bare loop's also from the processes that have both."""
    rows = []
    for (case, side), found in lines.items():
        clients = found[0]["case"]["clients"]
        for name, seconds, steps in sides_of(side, rounds_of(found)):
            rest = [a - b for a, b in zip(seconds, steps, strict=True)] if steps else []
            beyond_steps = [spread(rest), f"{1e3 * statistics.median(rest) / clients:.1f}"] if rest else ["–", "–"]
            rows.append([case, name, spread(seconds), *beyond_steps, len(seconds)])
    return table(["case", "side", "seconds a round", "beyond the steps", "ms a client", "rounds"], rows)


def sides_of(side: str, rounds: Sequence[dict[str, float]]) -> list[tuple[str, list[float], list[float]]]:
    """Return the sides measured in one process, each with the seconds of rounds and of local steps where known."""
    steps = [r["steps"] for r in rounds if "steps" in r]
    sides = [(side, [r["seconds"] for r in rounds], steps)]
    return sides + ([(f"bare ({side})", [r["bare"] for r in rounds], steps)] if "bare" in rounds[0] else [])


def start_table(lines: Lines) -> str:
    """Return seconds from the start of the process to the beginning of the first client's training."""
    rows = [[case, side, spread(f["startup"] for f in found), len(found)] for (case, side), found in lines.items()]
    return table(["case", "side", "start-up, seconds", "processes"], rows)


def ratio_table(lines: Lines) -> str:
    """Return fedbe's round over the bare loop's that follows it in the same process, and how far they come apart."""
    rows = []
    for (case, side), found in lines.items():
        if "difference" in found[0]:
            ratios = [r["seconds"] / r["bare"] for r in rounds_of(found)]
            rows.append([case, side, spread(ratios, 3), len(ratios), f"{max(f['difference'] for f in found):g}"])
    return table(["case", "side", "round ÷ bare round", "pairs", "largest difference"], rows)


def memory_table(lines: Lines) -> str:
    """Return the peak memory of all processes of a side."""
    rows = [
        [case, side, spread((f["peak_bytes"] / MB for f in found), 0), max(f["processes"] for f in found), len(found)]
        for (case, side), found in lines.items()
    ]
    return table(["case", "side", "peak memory, MB", "processes at once", "repeats"], rows)


def flower_table(lines: Lines) -> str:
    """Return the targets against Flower: its time beyond the local steps over fedbe's, and fedbe's memory over its."""
    rows = []
    for (case, side), found in lines.items():
        own = next((lines[case, name] for name in ("fedbe", "fedbe beside bare") if (case, name) in lines), None)
        if not side.startswith("Flower") or own is None:
            continue
        if "peak_bytes" in found[0]:
            ours, theirs = (statistics.median(f["peak_bytes"] for f in some) for some in (own, found))
            rows.append([case, side, "peak memory, fedbe ÷ Flower", f"{ours / theirs:.2f}", "0.33 or less"])
        else:
            ours, theirs = (statistics.median(beyond(some)) for some in (own, found))
            rows.append([case, side, "beyond the steps, Flower ÷ fedbe", f"{theirs / ours:.1f}", "5 or more"])
    return table(["case", "side", "what", "ratio of medians", "target"], rows)


def beyond(found: Iterable[dict[str, Any]]) -> list[float]:
    """Return the seconds of each round that its local steps do not account for."""
    return [r["seconds"] - r["steps"] for r in rounds_of(found)]


def rounds_of(found: Iterable[dict[str, Any]]) -> list[dict[str, float]]:
    """Return the rounds that count: all but the first of each process."""
    return [r for line in found for r in line["rounds"][1:]]


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Return median, least and largest."""
    values = list(values)
    middle, least, most = (f"{value:.{digits}f}" for value in (statistics.median(values), min(values), max(values)))
    return f"{middle} ({least} – {most})"


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a table in Markdown; nothing where it has no row."""
    if not rows:
        return ""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows))


if __name__ == "__main__":
    print(report(Path(sys.argv[1])))

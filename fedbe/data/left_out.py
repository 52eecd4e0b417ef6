"""What of the data is not trained on or scored, why, and whose it is."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_MOST_NAMED = 5


@dataclass(frozen=True)
class LeftOut:
    """What one holder has that is left out for one reason.

    Attributes:
        split: The split it is in.
        reason: Why, to be read after "25 rows of the train split": for example ``"have no text"``.
        rows: Numbers of the rows in their split, from 0; a row is named once for each thing left out of it.
        holder: The client that holds them; ``None`` in the other splits, and for what belongs to nobody.
        what: What is left out, in the plural.
    """

    split: str
    reason: str
    rows: tuple[int, ...]
    holder: str | None = None
    what: str = "rows"


def left_out_lines(left_out: Iterable[LeftOut]) -> list[str]:
    """Return a line for each split and reason: how many, whose, and the first of the rows."""
    groups: dict[tuple[str, str, str], list[LeftOut]] = {}
    for item in left_out:
        groups.setdefault((item.split, item.what, item.reason), []).append(item)
    return [_line(*key, items) for key, items in groups.items()]


def left_out_counts(left_out: Iterable[LeftOut]) -> list[dict[str, str | int | None]]:
    """Return what is left out as JSON values: split, holder, what, reason and count."""
    return [
        {"split": item.split, "holder": item.holder, "what": item.what, "reason": item.reason, "count": len(item.rows)}
        for item in left_out
    ]


def _line(split: str, what: str, reason: str, items: Sequence[LeftOut]) -> str:
    count = sum(len(item.rows) for item in items)
    held = Counter({item.holder: len(item.rows) for item in items if item.holder is not None})
    whose = _listed([f"{number} of {client}" for client, number in held.most_common()])
    rows = sorted({row for item in items for row in item.rows})
    where = f"row{'s' * (len(rows) > 1)} {_listed([str(row) for row in rows])}"
    noun, verb = (what, reason) if count != 1 else (what.removesuffix("s"), _singular(reason))
    return f"{count} {noun} of the {split} split {verb} ({'; '.join(filter(None, [whose, where]))})."


def _listed(words: Sequence[str]) -> str:
    more = len(words) - _MOST_NAMED
    return ", ".join(words[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def _singular(reason: str) -> str:
    verb, _, rest = reason.partition(" ")
    return f"{ {'have': 'has', 'are': 'is', 'belong': 'belongs'}.get(verb, verb) } {rest}"

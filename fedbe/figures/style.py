"""How every picture of the project looks, how names of users stand in it, and how it is written."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from fedbe.storage.files import explained, replacing

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's colours, told apart by colour-blind people too."""

GREY = "#666666"
"""What is in the background: base levels and notes."""

STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "axes.axisbelow": True,
    "figure.dpi": 150,
}
"""Settings of matplotlib, to be used in `matplotlib.rc_context`."""


def plain(name: str) -> str:
    """Return a name as a text that matplotlib draws as it is, and that no legend leaves out.

    Names of clients, labels, tasks and arms are the user's. Between two ``$`` matplotlib reads a formula, it hides
    entries of a legend that begin with ``_``, and half a surrogate pair is no text that it can draw.
    """
    drawable = name.encode("utf-8", "replace").decode("utf-8").replace("$", r"\$")
    return f" {drawable}" if drawable.startswith("_") else drawable


def save(figure: Figure, path: Path, remedy: str = "") -> None:
    """Write a picture in the format that the file's ending says, whole or not at all.

    Args:
        figure: The picture.
        path: Where to; what stands there stays if it cannot be written.
        remedy: What to say then: what is intact and how to go on.

    Raises:
        StorageError: It cannot be written.
    """
    with explained(f"the picture {path}", remedy), replacing(path) as partial:
        figure.savefig(partial, format=path.suffix.removeprefix(".") or "png")

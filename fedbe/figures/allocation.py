"""The picture of who trained which block when."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from fedbe.figures.style import STYLE, plain

_NAMED_CLIENTS = 24
_NAMED_BLOCKS = 24


def allocation_figure(records: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None) -> Figure | None:
    """Return who trained which block when, and how often: blocks by rounds, and blocks by clients.

    On the left the colour is the share of a round's cohort that trained the block, on the right the share of a client's
    rounds in which it did. Clients stand in the order of how many blocks they train a round, the strongest first.

    Args:
        records: The records of a run.
        names: All blocks, the lowest first; ``None`` for those that anyone trained, ordered by name.

    Returns:
        The picture; ``None`` if no round has an allocation.
    """
    rounds = [record for record in records if record["allocation"]]
    if not rounds:
        return None
    blocks = list(names) if names is not None else _trained_blocks(rounds)
    clients, by_client = _by_client(rounds, blocks)
    by_round = _by_round(rounds, blocks)
    widths = [float(np.clip(0.28 * count, 3.4, 8)) for count in (by_round.shape[1], len(clients))]
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(sum(widths) + 2.4, float(np.clip(2.2 + 0.3 * len(blocks), 3.4, 8))))
        figure.set_layout_engine("constrained")
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=widths)
        image = _draw(left, by_round, first=rounds[0]["round"])
        _draw(right, by_client, first=0)
        left.set_title("Who trained which block when")
        left.set_xlabel("round")
        left.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        left.set_ylabel("block")
        shown = range(0, len(blocks), -(-len(blocks) // _NAMED_BLOCKS) or 1)
        left.set_yticks(list(shown), [plain(blocks[index]) for index in shown])
        right.set_title("… and how often")
        _name_clients(right, clients)
        bar = figure.colorbar(image, ax=[left, right], aspect=25, format=PercentFormatter(1.0))
        bar.set_label("share of the cohort (left), of the client's rounds (right)", fontsize=9)
    return figure


def _by_round(rounds: Sequence[Mapping[str, Any]], blocks: Sequence[str]) -> NDArray[np.float64]:
    """Return the share of the cohort that trained each block, [blocks, rounds]; NaN in a round without allocation."""
    first = rounds[0]["round"]
    shares = np.full((len(blocks), rounds[-1]["round"] - first + 1), np.nan)
    for record in rounds:
        cohort = record.get("cohort") or record["allocation"]
        counts = [sum(block in taken for taken in record["allocation"].values()) for block in blocks]
        shares[:, record["round"] - first] = np.array(counts) / len(cohort)
    return shares


def _by_client(rounds: Sequence[Mapping[str, Any]], blocks: Sequence[str]) -> tuple[list[str], NDArray[np.float64]]:
    """Return the clients, and the share of its rounds in which each trained each block, [blocks, clients]."""
    rows: dict[str, list[list[bool]]] = {}
    for record in rounds:
        for client in record.get("cohort") or record["allocation"]:
            taken = record["allocation"].get(client, ())
            rows.setdefault(client, []).append([block in taken for block in blocks])
    shares = {client: np.mean(taken, axis=0) for client, taken in rows.items()}
    clients = sorted(shares, key=lambda client: (-shares[client].sum(), _natural(client)))
    return clients, np.stack([shares[client] for client in clients], axis=1)


def _draw(panel: Axes, shares: NDArray[np.float64], first: float) -> AxesImage:
    blocks, columns = shares.shape
    return panel.imshow(
        shares,
        aspect="auto",
        origin="lower",
        cmap=mpl.colormaps["Blues"].with_extremes(bad="#E6E6E6"),
        vmin=0,
        vmax=1,
        extent=(first - 0.5, first + columns - 0.5, -0.5, blocks - 0.5),
        interpolation="nearest",
    )


def _name_clients(panel: Axes, clients: Sequence[str]) -> None:
    """Write the clients' names where there is room for them."""
    if len(clients) <= _NAMED_CLIENTS:
        panel.set_xticks(range(len(clients)), [plain(client) for client in clients], rotation=90, fontsize=9)
        panel.set_xlabel("client")
    else:
        panel.set_xticks([])
        panel.set_xlabel(f"{len(clients)} clients, the strongest first")


def _trained_blocks(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    return sorted({block for r in rounds for taken in r["allocation"].values() for block in taken}, key=_natural)


def _natural(name: object) -> list[tuple[int, str]]:
    """Return a key that sorts ``layers.2`` before ``layers.10``."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", str(name))]

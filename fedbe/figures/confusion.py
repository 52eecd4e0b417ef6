"""The picture of which classes a classifier takes for which."""

from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from fedbe.figures.style import STYLE, plain

_NAMED_CLASSES = 30


def confusion_figure(confusion: Mapping[str, Mapping[str, int]]) -> Figure:
    """Return the confusion matrix: a row for each true class, its colour the share that is taken for each class.

    Args:
        confusion: True class → predicted class → how many samples, as `summary.json` holds it.
    """
    names = list(confusion)
    counts = np.array([[confusion[name].get(other, 0) for other in names] for name in names], dtype=np.float64)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(2.5 + 0.3 * len(names), 4, 9))
    with mpl.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(side + 1, side))
        figure.set_layout_engine("constrained")
        axes = figure.subplots()
        image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        shown = range(0, len(names), -(-len(names) // _NAMED_CLASSES))
        texts = [plain(names[index]) for index in shown]
        axes.set_xticks(list(shown), texts, rotation=90)
        axes.set_yticks(list(shown), texts)
        axes.set_title("What is taken for what")
        axes.set_xlabel("predicted class")
        axes.set_ylabel("true class")
        bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1.0))
        bar.set_label("share of the true class", fontsize=9)
    return figure

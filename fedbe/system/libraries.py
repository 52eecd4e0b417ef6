"""Other libraries kept quiet and quick: for processes of the command line, which set this up before they work."""

import functools
import importlib.metadata
import logging
import warnings

import datasets
from lightning.fabric.utilities import registry
from transformers.utils.logging import disable_progress_bar


def settle_libraries() -> None:
    """Quieten the libraries of this process, and have them look for installed extensions once."""
    quiet_libraries()
    remember_installed_callbacks()


def quiet_libraries() -> None:
    """Silence what Lightning says at each of a run's many short fits, and other libraries' progress bars."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in (".*does not have many workers.*", ".*in eval mode at the start.*", ".*LeafSpec.*deprecated.*"):
        warnings.filterwarnings("ignore", message)
    disable_progress_bar()  # type: ignore[no-untyped-call]
    datasets.disable_progress_bars()


def remember_installed_callbacks() -> None:
    """Have Lightning look only once for callbacks that installed packages bring along, and not for each client.

    It reads the metadata of every package for that, which takes longer than all else about a new `L.Trainer`.
    """
    if hasattr(registry, "entry_points"):
        registry.entry_points = functools.cache(importlib.metadata.entry_points)

"""What simulated clients cost in memory: peak by number of clients, and growth from round to round."""

import ctypes
import gc
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import ParamSpec, TypeVar

from fedbe.bench.display import quiet
from fedbe.config.build import build
from fedbe.config.parser import read_run, run_parser
from fedbe.federation.callback import FederatedCallback
from fedbe.federation.view import RunView
from fedbe.system.libraries import settle_libraries
from fedbe.system.machine import peak_rss_bytes, resident_bytes, trim_memory

MIB = 2**20
MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of <malloc.h>
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class MemoryUse:
    """Memory of one run in a process of its own.

    Attributes:
        clients: Number of simulated clients.
        rounds: Number of rounds.
        peak_bytes: Largest resident memory of the process.
        early_bytes: Memory in use after a fifth of the rounds.
        late_bytes: Memory in use after the last round.
    """

    clients: int
    rounds: int
    peak_bytes: int
    early_bytes: int
    late_bytes: int

    @property
    def growth(self) -> float:
        """Memory in use at the end over that after a fifth of the rounds."""
        return self.late_bytes / self.early_bytes

    def __str__(self) -> str:
        peak, early, late = (count / MIB for count in (self.peak_bytes, self.early_bytes, self.late_bytes))
        return (
            f"{self.clients:>4} clients, {self.rounds} rounds: peak {peak:.1f} MiB; "
            f"in use after a fifth {early:.1f}, at the end {late:.1f} MiB ({self.growth:.3f})"
        )


class _Gauge(FederatedCallback):
    def __init__(self) -> None:
        self.in_use: dict[int, int] = {}

    def on_round_written(self, run: RunView) -> None:
        if run.completed in (max(1, run.rounds // 5), run.rounds):
            self.in_use[run.completed] = bytes_in_use()


def bytes_in_use() -> int:
    """Return the resident memory of this process, in bytes, after garbage and free pages have been given back."""
    gc.collect()
    trim_memory()
    return resident_bytes()


def give_back_freed_memory() -> None:
    """Have this process hand each large block that is freed back to the system, so that its peak is what was in use.

    Left to itself the GNU C library keeps freed blocks in a heap that falls to pieces, more in one run than in the
    next. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, 2**16)


def measure_memory(arguments: Sequence[str], clients: int) -> MemoryUse:
    """Run a configuration with this number of clients in a fresh process and return its memory use.

    Args:
        arguments: As given to ``fedbe fit``.
        clients: Number of clients; the training data is dealt to them evenly.
    """
    return in_fresh_process(_run, list(arguments), clients)


def in_fresh_process(function: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Return what a function of a module returns in a process of its own."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=settle_libraries) as pool:
        return pool.submit(function, *arguments, **options).result()


def _run(arguments: list[str], clients: int) -> MemoryUse:
    gauge = _Gauge()
    with TemporaryDirectory() as folder:
        dealt = [
            "--data.init_args.partitioner=fedbe.datamodules.IIDPartitioner",
            f"--data.init_args.partitioner.clients={clients}",
        ]
        run, config = read_run(run_parser("fit"), [*arguments, *dealt, f"--output={folder}/run"])
        quiet(build(run, config), gauge).run()
    return MemoryUse(clients, run.federation.rounds, peak_rss_bytes(), *gauge.in_use.values())

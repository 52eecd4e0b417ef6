"""What simulated clients cost in memory: peak by number of clients, and growth from round to round."""

import multiprocessing
import statistics
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from fedbe.bench.display import without_display
from fedbe.callback import FederatedCallback
from fedbe.fit import build
from fedbe.loop import FederatedLoop, memory_line, peak_rss_bytes
from fedbe.run_parser import read_run, run_parser

MIB = 2**20


@dataclass(frozen=True)
class MemoryUse:
    """Memory of one run in a process of its own.

    Attributes:
        clients: Number of simulated clients.
        peak_bytes: Largest resident memory of the process.
        by_round: Resident memory after each round, in bytes.
    """

    clients: int
    peak_bytes: int
    by_round: tuple[int, ...]

    @property
    def growth(self) -> float:
        """Median of the last fifth of the rounds over that of the second fifth; the first fifth is warm-up."""
        fifth = max(1, len(self.by_round) // 5)
        return statistics.median(self.by_round[-fifth:]) / statistics.median(self.by_round[fifth : 2 * fifth])

    def __str__(self) -> str:
        return (
            f"{self.clients:>4} clients: peak {self.peak_bytes / MIB:7.1f} MiB, "
            f"{len(self.by_round)} rounds, last fifth over second fifth {self.growth:.3f}"
        )


class _Gauge(FederatedCallback):
    def __init__(self) -> None:
        self.by_round: list[int] = []

    def on_round_written(self, loop: FederatedLoop) -> None:
        if loop.progress.completed:
            self.by_round.append(resident_bytes())


def resident_bytes() -> int:
    """Return the resident memory of this process now, in bytes; on systems without ``/proc`` its peak so far."""
    status = Path("/proc/self/status")
    return memory_line(status, "VmRSS") if status.exists() else peak_rss_bytes()


def measure_memory(arguments: Sequence[str], clients: int) -> MemoryUse:
    """Run a configuration with so many clients in a fresh process and return its memory use.

    Args:
        arguments: As given to ``fedbe fit``.
        clients: Number of clients; the training data is dealt to them evenly.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_run, list(arguments), clients).result()


def _run(arguments: list[str], clients: int) -> MemoryUse:
    gauge = _Gauge()
    with TemporaryDirectory() as folder:
        dealt = [
            "--data.init_args.partitioner=fedbe.datamodules.IIDPartitioner",
            f"--data.init_args.partitioner.clients={clients}",
        ]
        run, config = read_run(run_parser("fit"), [*arguments, *dealt, f"--output={folder}/run"])
        loop = build(run, config)
        loop.callbacks = [*without_display(loop), gauge]
        loop.run()
    return MemoryUse(clients, peak_rss_bytes(), tuple(gauge.by_round))

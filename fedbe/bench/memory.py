"""What simulated clients cost in memory: peak by number of clients, and growth from round to round."""

import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from fedbe.callback import FederatedCallback
from fedbe.fit import build
from fedbe.loop import FederatedLoop, peak_rss_bytes
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
        """Mean of the last five rounds over the mean of five early ones (the first five are left out)."""
        early, late = self.by_round[5:10], self.by_round[-5:]
        return (sum(late) / len(late)) / (sum(early) / len(early))

    def __str__(self) -> str:
        return (
            f"{self.clients:>4} clients: peak {self.peak_bytes / MIB:7.1f} MiB, "
            f"{len(self.by_round)} rounds, last five over early five {self.growth:.3f}"
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
    if not status.exists():
        return peak_rss_bytes()
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def measure_memory(arguments: Sequence[str], clients: int) -> MemoryUse:
    """Run a configuration with so many clients in a fresh process and return its memory use.

    Args:
        arguments: As given to ``fedbe fit``.
        clients: Number of clients; the training data is dealt to them evenly.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_run, (list(arguments), clients))


def _run(arguments: list[str], clients: int) -> MemoryUse:
    gauge = _Gauge()
    with TemporaryDirectory() as folder:
        dealt = [
            "--data.init_args.partitioner=fedbe.datamodules.IIDPartitioner",
            f"--data.init_args.partitioner.clients={clients}",
        ]
        run, config = read_run(run_parser("fit"), [*arguments, *dealt, f"--output={folder}/run"])
        loop = build(run, config)
        loop.callbacks = [*loop.callbacks, gauge]
        loop.run()
    return MemoryUse(clients, peak_rss_bytes(), tuple(gauge.by_round))

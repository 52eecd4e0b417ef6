"""What a run says of the machine it ran on: memory, and versions of what decides a result."""

import ctypes
import platform
import resource
import sys
from importlib.metadata import version
from pathlib import Path

import fedbe


def trim_memory() -> None:
    """Give freed memory back to the system, where the C library can: it keeps it in a heap that falls to pieces.

    Each client's run leaves small objects behind between large freed blocks. Measured on the quickstart with FedIT, the
    peak of a process rose with every round without this.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class Trimming:
    """Gives freed memory back (`trim_memory`) between two clients when the process has grown, and not for each client.

    What was given back must be fetched again, page by page: measured on small models, that made a client's round
    5 % slower. What one client frees the next one takes, so that only what has grown since is too much.

    Args:
        growth: By which factor the process may grow from before the first client after a trim to before any later one.
    """

    def __init__(self, growth: float = 1.05) -> None:
        self.growth = growth
        self._reference: int | None = None

    def before_client(self) -> None:
        """Trim the memory if it has grown."""
        now = resident_bytes()
        if self._reference is None:
            self._reference = now
        elif now > self.growth * self._reference:
            trim_memory()
            self._reference = None


def resident_bytes() -> int:
    """Return the resident memory of this process now, in bytes; on systems without ``/proc`` its peak so far."""
    try:
        pages = int(Path("/proc/self/statm").read_bytes().split()[1])  # one line, a quarter of the time of ``status``
    except OSError:
        return peak_rss_bytes()
    return pages * resource.getpagesize()


def peak_rss_bytes() -> int:
    """Return the largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # what `getrusage` says is inherited from the process that started this one
        return memory_line(status, "VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def memory_line(status: Path, name: str) -> int:
    """Return one figure of a process's status file under ``/proc``, in bytes."""
    line = next(line for line in status.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a result."""
    packages = ("torch", "transformers", "lightning", "datasets")
    own = {"fedbe": fedbe.__version__, "python": platform.python_version()}
    return own | {name: version(name) for name in packages}

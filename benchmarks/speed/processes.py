"""Runs one measurement in a process of its own and follows the memory of all processes that it starts."""

import contextlib
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

MARK = "FEDBE_SPEED_MEASUREMENT"


class MemorySampler(threading.Thread):
    """Samples the proportional set size of a process and all below it.

    Proportional: a page that several processes share counts once over all of them.

    Args:
        root: The process's id.
        mark: Value of the environment variable `MARK`, which finds processes that have another parent now.
        seconds: Between samples.

    Attributes:
        peak_bytes: The largest sum of one sample.
        processes: How many processes there were then.
    """

    def __init__(self, root: int, mark: str, seconds: float) -> None:
        super().__init__(daemon=True)
        self.root, self.mark, self.seconds = root, mark, seconds
        self.peak_bytes = self.processes = 0
        self._known: set[int] = set()
        self._ended = threading.Event()

    def run(self) -> None:
        """Sample until `stop`."""
        while not self._ended.wait(self.seconds):
            sizes = [size for pid in self.family() if (size := proportional_bytes(pid))]
            if sum(sizes) > self.peak_bytes:
                self.peak_bytes, self.processes = sum(sizes), len(sizes)

    def stop(self) -> None:
        """End the sampling."""
        self._ended.set()
        self.join()

    def family(self) -> set[int]:
        """Return the process, those below it, and those that were or that carry the mark."""
        parents = dict(processes())
        family = {self.root} | {pid for pid in self._known if pid in parents}
        family |= {pid for pid in parents.keys() - self._known if marked(pid, self.mark)}
        while below := {pid for pid, parent in parents.items() if parent in family} - family:
            family |= below
        self._known |= family
        return family


def processes() -> Iterator[tuple[int, int]]:
    """Yield the id of every process and its parent's."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text()
            except OSError:
                continue
            yield int(folder.name), int(stat.rpartition(")")[2].split()[1])


def marked(pid: int, mark: str) -> bool:
    """Whether a process has inherited the mark."""
    try:
        return f"{MARK}={mark}".encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def end(mark: str) -> None:
    """End what is left of the processes that carry the mark."""
    for pid, _ in processes():
        if marked(pid, mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def proportional_bytes(pid: int) -> int:
    """Return the proportional set size of a process; 0 if there is none."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)


def run_measurement(
    command: Sequence[str], environment: Mapping[str, str], sample_seconds: float | None, limit_seconds: float
) -> dict[str, Any]:
    """Run a side's program and return what it printed, with start-up seconds, and peak memory where it is sampled.

    Args:
        command: The program; its last line of output is a JSON object.
        environment: Beside the present one.
        sample_seconds: Between samples of the memory; ``None`` to leave it out, as sampling takes time itself.
        limit_seconds: How long it may take.

    Raises:
        RuntimeError: It failed, with the end of what it said.
        TimeoutExpired: It took too long.
    """
    mark = uuid.uuid4().hex
    with tempfile.TemporaryFile("w+") as errors:
        started = time.monotonic()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, **environment, MARK: mark}
        )
        sampler = MemorySampler(process.pid, mark, sample_seconds or limit_seconds)
        sampler.start()
        try:
            output, _ = process.communicate(timeout=limit_seconds)
        finally:
            sampler.stop()
            end(mark)
            process.wait()
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{' '.join(command)} failed:\n{errors.read()[-3000:]}")
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    result["startup"] = result.pop("began") - started
    if sample_seconds is not None:
        result |= {"peak_bytes": sampler.peak_bytes, "processes": sampler.processes}
    return result

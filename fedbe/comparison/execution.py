"""Carries out the runs of a comparison: several at a time, each in a process of its own, none of them twice."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import yaml

from fedbe.errors import ConfigError
from fedbe.evaluation.dial import recorded_points
from fedbe.storage.checkpoint import Checkpoints, read_checkpoint
from fedbe.storage.run_folder import RunFolder


@dataclass(frozen=True)
class Job:
    """One run of a comparison.

    Attributes:
        arm: The arm it belongs to.
        learning_rate: Its learning rate.
        seed: Its seed.
        config: Its configuration.
        folder: Where it goes; configuration and log stand beside it.
    """

    kind: ClassVar[str] = "runs"

    arm: str
    learning_rate: float
    seed: int
    config: Mapping[str, Any]
    folder: Path

    @property
    def config_file(self) -> Path:
        """The configuration that the run is started with."""
        return self.folder.with_name(f"{self.folder.name}.yaml")

    @property
    def log(self) -> Path:
        """What the run prints."""
        return self.folder.with_name(f"{self.folder.name}.log")

    @property
    def arguments(self) -> list[str]:
        """The command that carries it out, or goes on with it, without the program's name."""
        return ["fit", f"--config={self.config_file}", f"--output={self.folder}", "--ckpt_path=last"]

    @property
    def finished(self) -> bool:
        """Whether it has been run to its end with just this configuration."""
        try:
            json.loads(RunFolder(self.folder).summary.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return False
        return self.begun

    @property
    def begun(self) -> bool:
        """Whether what is there was begun with just this configuration."""
        try:
            return bool(yaml.safe_load(self.config_file.read_text(encoding="utf-8")) == self.config)
        except (OSError, yaml.YAMLError):
            return False

    @property
    def continuable(self) -> bool:
        """Whether what is there can go on: with this configuration, from a checkpoint that is whole, or from none."""
        folder = RunFolder(self.folder)
        if not (self.begun and folder.config.is_file()):
            return False
        newest = next(Checkpoints(folder.checkpoints).newest_first(), None)
        try:
            if newest is not None:
                read_checkpoint(newest)
        except ConfigError:
            return False
        return True

    def make_room(self) -> None:
        """Set aside what is there and cannot go on, and write the configuration."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        if self.folder.exists() and not self.continuable:
            aside = self.folder.parent / "set_aside"
            aside.mkdir(exist_ok=True)
            place = RunFolder.next_free(aside, self.folder.name)
            for source in (self.folder, self.config_file, self.log):
                if source.exists():
                    source.rename(aside / source.name.replace(self.folder.name, place.name, 1))
        self.config_file.write_text(yaml.safe_dump(dict(self.config), sort_keys=False), encoding="utf-8")

    def __str__(self) -> str:
        return f"{self.arm}, learning rate {self.learning_rate:g}, seed {self.seed}"


@dataclass(frozen=True)
class DialJob(Job):
    """The measurement of a finished run's dial.

    Attributes:
        factors: Places of the dial.
    """

    kind: ClassVar[str] = "dials"
    factors: tuple[float, ...] = ()

    @property
    def log(self) -> Path:
        """What the measurement prints."""
        return self.folder.with_name(f"{self.folder.name}.dial.log")

    @property
    def arguments(self) -> list[str]:
        """The command that carries it out, without the program's name."""
        return ["dial", str(self.folder), "--factors", *map(str, self.factors)]

    @property
    def finished(self) -> bool:
        """Whether all the factors have been measured."""
        summary = json.loads(RunFolder(self.folder).summary.read_text(encoding="utf-8"))
        return set(self.factors) <= {point.factor for point in recorded_points(summary)}

    def make_room(self) -> None:
        """Leave the run as it is."""

    def __str__(self) -> str:
        return f"dial of {super().__str__()}"


@dataclass(frozen=True)
class Failure:
    """A job that did not come to its end.

    Attributes:
        job: The job.
        code: Exit code of its process.
    """

    job: Job
    code: int


class Running(Protocol):
    """A run under way; `subprocess.Popen` is one."""

    def poll(self) -> int | None:
        """Return the exit code, or ``None`` while it runs."""
        ...

    def terminate(self) -> None:
        """Ask it to end."""
        ...

    def wait(self) -> int:
        """Wait for its end and return the exit code."""
        ...


Start = Callable[[Job, int], Running]
"""Starts a job, given how many may run at a time."""


def start_process(job: Job, parallel: int) -> "subprocess.Popen[bytes]":
    """Start a job in a process of its own, which prints into the job's log.

    Args:
        job: The job.
        parallel: Jobs at a time; more than one get one thread each, as they would hinder each other.
    """
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} if parallel > 1 else {}
    with job.log.open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "fedbe", *job.arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | threads,
        )


def carry_out(
    jobs: Sequence[Job], parallel: int, start: Start = start_process, say: Callable[[str], None] = print
) -> list[Failure]:
    """Run the jobs that are not finished yet, and return those that failed; a failure does not end the rest.

    Args:
        jobs: Of one kind, in the order to start them.
        parallel: Jobs at a time.
        start: Starts a job.
        say: Tells what goes on, a line at a time.
    """
    waiting = [job for job in jobs if not job.finished]
    if len(waiting) < len(jobs):
        say(f"{len(jobs) - len(waiting)} of {len(jobs)} {jobs[0].kind} are done already")
    failures = []
    for number, (job, code, seconds) in enumerate(_ends(waiting, parallel, start), 1):
        failed = code != 0 or not job.finished
        outcome = f"FAILED with exit code {code}, see {job.log}" if failed else f"{seconds:.0f} s"
        say(f"[{number}/{len(waiting)}] {job}: {outcome}")
        failures += [Failure(job, code)] if failed else []
    return failures


def _ends(jobs: Sequence[Job], parallel: int, start: Start) -> Iterator[tuple[Job, int, float]]:
    """Start the jobs, at most `parallel` at a time, and yield each with exit code and seconds when it ends."""
    waiting = list(jobs)
    running: dict[int, tuple[Job, Running, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                next_job = waiting.pop(0)
                next_job.make_room()
                running[id(next_job)] = (next_job, start(next_job, parallel), time.perf_counter())
            for key, (job, process, began) in list(running.items()):
                code = process.poll()
                if code is not None:
                    del running[key]
                    yield job, code, time.perf_counter() - began
            if running:
                time.sleep(0.05)
    finally:
        for _, process, _ in running.values():
            process.terminate()
            process.wait()

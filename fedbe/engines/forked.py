"""Clients side by side, in processes that share the one resident model's memory."""

import gc
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess

import torch

from fedbe.engines.in_process import InProcessEngine
from fedbe.errors import ConfigError, Problem
from fedbe.expansion.probe import ProbeReport
from fedbe.messages import ClientTask, Failure, FailureKind, Outcome
from fedbe.prefix.store import PrefixReuse, Store
from fedbe.system.machine import Trimming

_AHEAD = 2
"""Clients that are begun, per process, before the update that is next in the cohort's order has come in."""

_GRACE_SECONDS = 5.0
"""How long a client may be over its time before its process is ended: it looks at the time itself, between steps."""


def check_workers(workers: int, key: str) -> list[Problem]:
    """Return why clients cannot train in so many processes side by side on this machine."""
    if workers < 1:
        return [Problem(key, workers, "give 1 or more")]
    if workers > 1 and (not hasattr(os, "fork") or torch.accelerator.is_available()):
        remedy = "processes share the model in the memory of a system with fork and without an accelerator: give 1"
        return [Problem(key, workers, remedy)]
    return []


@dataclass
class ForkedEngine:
    """Trains several clients at a time, each in one of a few processes that live for a round.

    They are forked from this process as it is at the start of the round, so that nothing has to be sent to them, and
    what nobody writes, the frozen weights, is in memory once. An update comes back through a pipe. Each process
    computes with one thread; if this one does, too, results do not depend on the number of processes to the bit. A
    process that is ended from outside, for want of memory for example, or that hangs, costs its client's round.

    Attributes:
        clients: What trains a client in each process.
        workers: Number of processes.

    Source: ours.
    """

    clients: InProcessEngine
    workers: int
    _store: Store | None = field(default=None, init=False, repr=False)
    _trimming: Trimming = field(default_factory=Trimming, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if problems := check_workers(self.workers, "federation.workers"):
            raise ConfigError(*problems)

    def store(self, reuse: PrefixReuse) -> Store:
        """Return an empty store for what frozen blocks compute, which the processes fill together."""
        self._store = reuse.store(1 + self.workers)
        return self._store

    def probe(self, client_id: str) -> ProbeReport:
        """Return what a client reports of the base model."""
        return self.clients.probe(client_id)

    def train(self, tasks: Iterable[ClientTask]) -> Iterator[tuple[ClientTask, Outcome]]:
        """Yield each task with what came of it, in their order; all are taken before the first client begins."""
        cohort = list(tasks)
        self._trimming.before_client()
        with self._workers(cohort) as workers:
            done: dict[int, Outcome] = {}
            begun = 0
            for index, task in enumerate(cohort):
                while index not in done:
                    for worker in workers:
                        if worker.client is None and begun < min(len(cohort), index + _AHEAD * len(workers)):
                            worker.begin(begun)
                            begun += 1
                    done |= self._finished(workers)
                yield task, done.pop(index)

    @contextmanager
    def _workers(self, cohort: Sequence[ClientTask]) -> Iterator[list["_Worker"]]:
        workers: list[_Worker] = []
        try:
            # Garbage collection in a process would write to, and so copy, the pages of every Python object.
            gc.freeze()
            try:
                for number in range(min(self.workers, len(cohort))):
                    workers.append(_Worker(self.clients, cohort, self._store, 1 + number))
            finally:
                gc.unfreeze()
            yield workers
        finally:
            for worker in workers:
                worker.end()

    def _finished(self, workers: Sequence["_Worker"]) -> dict[int, Outcome]:
        """Wait until a client is done or over its time, and return what came of it."""
        timeout = self.clients.timeout_seconds
        patience = None if timeout is None else timeout + _GRACE_SECONDS
        busy = {worker.connection: worker for worker in workers if worker.client is not None}
        ready = wait(busy, None if patience is None else min(worker.left(patience) for worker in busy.values()))
        done = dict(busy[connection].receive() for connection in ready if isinstance(connection, Connection))
        late = [w for w in busy.values() if w.client is not None and patience is not None and w.left(patience) <= 0]
        return done | dict(worker.give_up(f"hangs, and was ended after {patience:g} s") for worker in late)


class _Worker:
    """A process, and the client that it trains."""

    def __init__(self, engine: InProcessEngine, cohort: Sequence[ClientTask], store: Store | None, part: int) -> None:
        self.engine, self.cohort, self.store, self.part = engine, cohort, store, part
        self.client: int | None = None
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self.process: ForkProcess = context.Process(target=self._work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe

    def begin(self, client: int) -> None:
        """Let the process train a client, given by its place in the cohort."""
        self.client, self.begun = client, time.monotonic()
        with suppress(OSError):  # a process that is gone is noticed when its answer is received
            self.connection.send(client)

    def left(self, patience: float) -> float:
        """Return how many of so many seconds the client has left, at least 0."""
        return max(0.0, self.begun + patience - time.monotonic())

    def receive(self) -> tuple[int, Outcome]:
        """Return what came of the client; if the process has ended, another takes its place."""
        assert self.client is not None
        try:
            outcome, news = pickle.loads(self.connection.recv_bytes())
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return self._replace("memory" if code == -signal.SIGKILL else "error", f"its process ended with {how}")
        if self.store is not None:
            self.store.learn(news)
        client, self.client = self.client, None
        return client, outcome

    def give_up(self, reason: str) -> tuple[int, Outcome]:
        """End the process with its client, and let another take its place."""
        self.process.kill()
        self.process.join()
        return self._replace("timeout", reason)

    def end(self) -> None:
        """End the process."""
        if self.client is not None:
            self.process.kill()
        with suppress(OSError):
            self.connection.send(None)
        self.process.join()
        self.connection.close()

    def _replace(self, kind: FailureKind, reason: str) -> tuple[int, Outcome]:
        assert self.client is not None
        client, self.client = self.client, None
        self.connection.close()
        self._start()
        return client, Failure(self.cohort[client].client_id, kind, reason)

    def _work(self, connection: Connection) -> None:
        """Train the clients that are asked for, in the process, until it is told to end or nobody is left to ask."""
        self.connection.close()  # the other end, which is inherited: or the death of who asks would go unnoticed
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
        torch.set_num_threads(1)
        if self.store is not None:
            self.store.join(self.part)
        with suppress(EOFError, ConnectionError):
            while (client := connection.recv()) is not None:
                outcome = self.engine.attempt(self.cohort[client])
                if isinstance(outcome, Failure):
                    outcome = replace(outcome, error=None)  # of any class, which need not survive the pipe
                connection.send_bytes(pickle.dumps((outcome, None if self.store is None else self.store.news())))

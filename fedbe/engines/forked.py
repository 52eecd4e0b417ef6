"""Clients side by side, in processes that share the one resident model's memory."""

from __future__ import annotations

import atexit
import gc
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkProcess

import torch
from torch import Tensor

from fedbe.client.plan import LocalPlan
from fedbe.engines.local import LocalEngine
from fedbe.errors import ConfigError, Facts, MessageError, Problem
from fedbe.messages import Failure, FailureKind, FitTask, Outcome, Update, decode, encode
from fedbe.prefix.store import News
from fedbe.storage.packed import pack, unpack

_AHEAD = 2
"""Clients that are begun, per process, before the update that is next in the cohort's order has come in."""

_GRACE_SECONDS = 5.0
"""How long a client may be over its time before its process is ended: it looks at the time itself, between steps."""


def check_workers(workers: int, key: str) -> list[Problem]:
    """Return why clients cannot train side by side in this number of processes on this machine."""
    if workers < 1:
        return [Problem(key, workers, "give 1 or more")]
    if not hasattr(os, "fork") or torch.accelerator.is_available():
        remedy = "processes share the model in the memory of a system with fork and without an accelerator: give "
        return [Problem(key, workers, f"{remedy}fedbe.engines.InProcess in place of this engine")]
    return []


class Forked(LocalEngine):
    """Trains several clients at a time, each in one of a few processes that live for a round.

    They are forked from this process as it is at the start of the round, so that nothing has to be sent to them, and
    what nobody writes, the frozen weights, is in memory once. A client's outcome and what it keeps come back
    through a pipe, as messages. Each process computes with one thread; if this one does, too, results do not depend on
    the number of processes to the bit. A process that is ended from outside, for want of memory for example, or that
    hangs, costs its client's round.

    Args:
        workers: Number of processes, on the CPU.

    Source: ours.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.processes = 1 + workers

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return why clients cannot train in this number of processes on this machine."""
        return check_workers(self.workers, f"{key}.workers")

    def start(self, plan: LocalPlan) -> None:
        """Learn what clients train.

        Raises:
            ConfigError: They cannot train in this number of processes on this machine.
        """
        if problems := check_workers(self.workers, "engine.init_args.workers"):
            raise ConfigError(*problems)
        super().start(plan)

    def fit(self, tasks: Iterable[FitTask]) -> Iterator[tuple[FitTask, Outcome]]:
        """Yield each task with its outcome, in their order; all are taken before the first client begins."""
        cohort = list(tasks)
        self._trimming.before_client()
        self.training.get_ready({task.max_steps for task in cohort})
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
    def _workers(self, cohort: Sequence[FitTask]) -> Iterator[list[_Worker]]:
        workers: list[_Worker] = []
        try:
            # Garbage collection in a process would write to, and so copy, the pages of every Python object.
            gc.freeze()
            try:
                for number in range(min(self.workers, len(cohort))):
                    workers.append(_Worker(self, cohort, 1 + number))
            finally:
                gc.unfreeze()
            yield workers
        finally:
            for worker in workers:
                worker.end()

    def _finished(self, workers: Sequence[_Worker]) -> dict[int, Outcome]:
        """Wait until a client is done or over its time, and return its outcome."""
        timeout = self.plan.timeout_seconds
        patience = None if timeout is None else timeout + _GRACE_SECONDS
        busy = {worker.connection: worker for worker in workers if worker.client is not None}
        ready = wait(busy, None if patience is None else min(worker.left(patience) for worker in busy.values()))
        done = dict(busy[connection].receive() for connection in ready if isinstance(connection, Connection))
        late = [w for w in busy.values() if w.client is not None and patience is not None and w.left(patience) <= 0]
        return done | dict(worker.give_up(f"hangs, and was ended after {patience:g} s") for worker in late)


class _Worker:
    """A process, and the client that it trains."""

    def __init__(self, engine: Forked, cohort: Sequence[FitTask], part: int) -> None:
        self.engine, self.cohort, self.part = engine, cohort, part
        self.store = None if engine.prefix is None else engine.prefix.store
        self.client: int | None = None
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, theirs = context.Pipe()
        self.process: ForkProcess = context.Process(target=self._work, args=(theirs,), daemon=True)
        self.process.start()
        atexit.register(self.process.kill)  # before `multiprocessing` sends SIGTERM and waits
        theirs.close()  # so that the end of the process is the end of the pipe

    def begin(self, client: int) -> None:
        """Let the process train a client, given by its place in the cohort."""
        self.client, self.begun = client, time.monotonic()
        with suppress(OSError):  # a process that is gone is noticed when its answer is received
            self.connection.send_bytes(str(client).encode())

    def left(self, patience: float) -> float:
        """Return how many seconds the client has left of its time, at least 0."""
        return max(0.0, self.begun + patience - time.monotonic())

    def receive(self) -> tuple[int, Outcome]:
        """Return the client's outcome; if the process has ended, another takes its place."""
        assert self.client is not None
        try:
            outcome, kept, news = (self.connection.recv_bytes() for _ in range(3))
        except (EOFError, OSError):
            self._join()
            code = self.process.exitcode or 0
            how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
            return self._replace("memory" if code == -signal.SIGKILL else "error", f"its process ended with {how}")
        if self.store is not None:
            self.store.learn(_news_of(news))
        client, self.client = self.client, None
        return client, self._taken(self.cohort[client], outcome, kept)

    def _taken(self, task: FitTask, outcome: bytes, kept: bytes) -> Outcome:
        try:
            message, own = decode(outcome), unpack(kept)[1]
        except MessageError as error:
            return Failure(task.client_id, "update", str(error))
        if isinstance(message, Update):
            self.engine.restore_kept(task, own)
        assert isinstance(message, Update | Failure)
        return message

    def give_up(self, reason: str) -> tuple[int, Outcome]:
        """End the process with its client, and let another take its place."""
        self.process.kill()
        self._join()
        return self._replace("timeout", reason)

    def end(self) -> None:
        """End the process."""
        if self.client is not None:
            self.process.kill()
        with suppress(OSError):
            self.connection.send_bytes(b"")
        self._join()
        self.connection.close()

    def _join(self) -> None:
        self.process.join()
        atexit.unregister(self.process.kill)

    def _replace(self, kind: FailureKind, reason: str) -> tuple[int, Outcome]:
        assert self.client is not None
        client, self.client = self.client, None
        self.connection.close()
        self._start()
        return client, Failure(self.cohort[client].client_id, kind, reason, self.engine.training.structure)

    def _work(self, connection: Connection) -> None:
        """Train the clients that are asked for, in the process, until it is told to end or nobody is left to ask."""
        self.connection.close()  # the other end, which is inherited: or the death of who asks would go unnoticed
        for interrupt in (signal.SIGINT, signal.SIGTERM):  # which whole groups of processes get
            signal.signal(interrupt, signal.SIG_IGN)  # the process that asks decides what becomes of them
        torch.set_num_threads(1)
        if self.store is not None:
            self.store.join(self.part)
        with suppress(EOFError, ConnectionError):
            while client := connection.recv_bytes():
                task = self.cohort[int(client)]
                for part in _answer(task, self.engine.attempt(task), self.engine.kept(task)):
                    connection.send_bytes(part)
                connection.send_bytes(b"{}" if self.store is None else _text_of(self.store.news()))


def _answer(task: FitTask, outcome: Outcome, kept: Mapping[str, Tensor]) -> tuple[bytes, bytes]:
    """Return a client's outcome and what it keeps as bytes; an outcome that cannot be encoded is a failure."""
    try:
        return encode(outcome), pack({}, kept)
    except MessageError as error:
        return encode(Failure(task.client_id, "update", str(error))), pack({}, {})


def _text_of(news: News) -> bytes:
    places = {
        key.hex(): [start, list(shape), str(dtype).removeprefix("torch.")]
        for key, (start, shape, dtype) in news.places.items()
    }
    ends = {str(part): end for part, end in news.ends.items()}
    return json.dumps({"places": places, "ends": ends, "hits": news.hits, "misses": news.misses}).encode()


def _news_of(text: bytes) -> News:
    """Return what `_text_of` got, from a process of our own."""
    news = json.loads(text)
    places = {
        bytes.fromhex(key): (start, torch.Size(shape), getattr(torch, dtype))
        for key, (start, shape, dtype) in news["places"].items()
    }
    return News(places, {int(part): end for part, end in news["ends"].items()}, news["hits"], news["misses"])

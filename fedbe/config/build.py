"""One run from its configuration: check, connect data and model, run the loop."""

from __future__ import annotations

import importlib
import netrc
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from types import FrameType
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger

from fedbe.algorithms import PooledData
from fedbe.client.trainer import QUIET, trainer_options
from fedbe.config.run import RunConfig
from fedbe.data import FederatedDataModule
from fedbe.engines import CohortEngine, Engine, ForkedEngine, InProcessEngine
from fedbe.errors import ConfigError, Problem
from fedbe.federation.callback import FederatedCallback
from fedbe.federation.cohort import CohortSampler, cohort_count
from fedbe.federation.loop import FederatedLoop
from fedbe.federation.simulation import capabilities_of
from fedbe.seeding import derive_seed, isolated_rng
from fedbe.storage.checkpoint import Checkpoint, check_same_run
from fedbe.storage.run_folder import RunFolder

STANDARD_CALLBACKS = (
    "RetentionCallback",
    "ConvergenceCallback",
    "CommunicationCallback",
    "PlotCallback",
    "LoggingCallback",  # before the checkpoint: a round that is continued may be logged again, none is left out
    "CheckpointCallback",
    "ProgressCallback",
)
"""Classes of `fedbe.callbacks` that every run has, named here so that the framework does not import them."""


def fit(run: RunConfig, config: Mapping[str, Any]) -> RunFolder:
    """Run one federation from its configuration and return its folder.

    Args:
        run: The configuration, its classes instantiated.
        config: The resolved configuration, kept in the folder and shown by loggers.

    Raises:
        ConfigError: The configuration cannot run; nothing was written then.
        QuorumError: Too many clients of a round failed.
    """
    checkpoint = run.checkpoint()
    if checkpoint is not None:
        check_same_run(checkpoint, config)
    loop = build(run, config, checkpoint)
    with stopping_on_interrupt(loop):
        loop.run(checkpoint)
    return loop.folder


@contextmanager
def stopping_on_interrupt(loop: FederatedLoop) -> Iterator[None]:
    """At the first Ctrl-C let the loop end where it can be continued, at the second end it at once.

    Where signals cannot be handled, outside of the main thread, or are ignored, as under ``nohup``, it stays like that.
    """
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        loop.interrupted = True
        signal.signal(signal.SIGINT, before)
        what = "client" if loop.kept_outcomes is not None else "round"
        print(f"fedbe: ends after this {what}; Ctrl-C again to end at once", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread() or before is signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def build(run: RunConfig, config: Mapping[str, Any], checkpoint: Checkpoint | None = None) -> FederatedLoop:
    """Check everything, load data and model, and return the loop ready to run; nothing is written yet.

    Args:
        run: The configuration, its classes instantiated.
        config: The resolved configuration.
        checkpoint: What the run is continued from, if it is.

    Raises:
        ConfigError: The configuration cannot run; it carries every mistake found.
    """
    options = trainer_options(run.trainer)
    problems = run.check()
    if problems:
        raise ConfigError(*problems)
    connect_data(run)
    data, options = pool(run, options)
    processor = run.model.processor
    with isolated_rng(derive_seed(run.seed, "new head")):
        model = run.model.load(run.data.num_labels, getattr(processor, "pad_token_id", None))
    torch.nn.Module.to(model, L.Trainer(**QUIET, **options).strategy.root_device)
    folder = RunFolder(run.folder, begin_again=run.ckpt_path is not None)
    engine = InProcessEngine(
        model,
        run.algorithm,
        data,
        run.client.optimizer,
        run.client.schedule,
        run.federation.rounds,
        options,
        run.seed,
        run.client.objective,
        run.federation.client_timeout_seconds,
    )
    return FederatedLoop(
        model=model,
        tokenizer=processor,
        algorithm=run.algorithm,
        data=data,
        engine=side_by_side(engine, run),
        sampler=CohortSampler("all" if run.algorithm.pooled else run.federation.cohort, run.seed),
        folder=folder,
        rounds=run.federation.rounds,
        quorum=run.federation.quorum,
        averaging=run.federation.averaging,
        server_optimizer=run.federation.server_optimizer,
        objective=run.client.objective,
        evaluate_every_n_rounds=run.federation.evaluate_every_n_rounds,
        general_tasks=run.general_tasks,
        callbacks=with_standard_callbacks(run.callbacks),
        logger=build_logger(run, folder, checkpoint.state["logger"] if checkpoint else None),
        seed=run.seed,
        config=config,
        prefix=run.prefix,
        measure=capabilities_of(run.clock, run.client.optimizer, options) if run.clock else None,
    )


def side_by_side(engine: InProcessEngine, run: RunConfig) -> Engine:
    """Return the engine that trains as many clients at a time as the configuration says, in the way that it says."""
    number, most = run.federation.clients_in_one_pass, cohort_count(run.federation.cohort, len(run.data.client_ids))
    if run.federation.workers > 1:
        return ForkedEngine(engine, run.federation.workers)
    return engine if number == 1 or most == 1 else CohortEngine(engine, number, most)


def connect_data(run: RunConfig) -> None:
    """Set the checked data module up for this model and seed.

    Raises:
        ConfigError: The data cannot be loaded, or does not fit the cohort.
    """
    run.data.prepare_data()
    run.data.setup("fit")
    problems = run.federation.check_cohort(len(run.data.client_ids))
    empty = [client for client in run.data.client_ids if not len(cast(Sized, run.data.client_dataset(client)))]
    problems += [Problem("data", client, "this client has no sample: leave it out of `client_ids`") for client in empty]
    if problems:
        raise ConfigError(*problems)


def pool(run: RunConfig, options: dict[str, Any]) -> tuple[FederatedDataModule, dict[str, Any]]:
    """Return the data and the clients' trainer options; of a pooled run one client and the whole cohort's steps."""
    if not run.algorithm.pooled:
        return run.data, options
    cohort = cohort_count(run.federation.cohort, len(run.data.client_ids))
    steps = options.get("max_steps", -1)
    return PooledData(run.data), options | ({"max_steps": steps * cohort} if steps > 0 else {})


def with_standard_callbacks(given: Sequence[FederatedCallback]) -> list[FederatedCallback]:
    """Return the standard callbacks and those given, which replace standard ones of the same class."""
    module = importlib.import_module("fedbe.callbacks")
    standard = [getattr(module, name) for name in STANDARD_CALLBACKS]
    own = [callback for callback in given if not isinstance(callback, tuple(standard))]
    chosen = [next((c for c in given if isinstance(c, kind)), None) or kind() for kind in standard]
    # Measuring comes first, then what decides by the measurements, then what shows them.
    return [*chosen[:3], *own, *chosen[3:]]


def build_logger(run: RunConfig, folder: RunFolder, version: str | int | None = None) -> Logger | None:
    """Return the logger that the configuration names; W&B stays offline unless a key is present.

    Args:
        run: The configuration.
        folder: Where loggers write.
        version: Which of a logger's runs is continued; ``None`` for a new one.
    """
    if run.logger == "wandb":
        import wandb  # here, so that runs without it do not wait for its import

        quiet = wandb.Settings(silent=True, console="off")
        same: dict[str, Any] = {} if version is None else {"id": str(version), "resume": "allow"}
        offline = not wandb_online()
        return WandbLogger(run.name, str(folder.path), offline=offline, project="fedbe", settings=quiet, **same)
    if run.logger == "csv":
        return CSVLogger(str(folder.path), name="csv", version="")
    if run.logger == "tensorboard":
        return TensorBoardLogger(str(folder.path), name="tensorboard", version="")
    return run.logger if isinstance(run.logger, Logger) else None


def wandb_online() -> bool:
    """Whether W&B is to be contacted: as ``WANDB_MODE`` says, else if a key is in the environment or in ``.netrc``."""
    if "WANDB_MODE" in os.environ:
        return os.environ["WANDB_MODE"] == "online"
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").split("//")[-1].strip("/")
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        known = False
    return known or "WANDB_API_KEY" in os.environ

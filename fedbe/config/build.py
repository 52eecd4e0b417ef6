"""One run from its configuration: check, connect data and model, run the loop."""

from __future__ import annotations

import importlib
import netrc
import os
from collections.abc import Mapping, Sequence, Sized
from typing import Any, cast

import lightning as L
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger

from fedbe.client.plan import LocalPlan
from fedbe.client.trainer import QUIET, epoch_batches, trainer_options
from fedbe.config.run import RunConfig
from fedbe.data import FederatedDataModule, PooledData
from fedbe.engines.remote import RemoteClient
from fedbe.errors import ConfigError, Problem
from fedbe.federation.callback import FederatedCallback
from fedbe.federation.cohort import CohortSampler, cohort_count
from fedbe.federation.interrupts import stopping_on_interrupt
from fedbe.federation.loop import FederatedLoop
from fedbe.modeling.head import weigh_classes
from fedbe.modeling.precision import HALF
from fedbe.seeding import derive_seed, isolated_rng
from fedbe.storage.checkpoint import Checkpoint, check_same_run
from fedbe.storage.csv_log import CSVLog
from fedbe.storage.run_folder import RunFolder
from fedbe.system.notice import say
from fedbe.traits import Trait

STANDARD_CALLBACKS = (
    "RetentionCallback",
    "ConvergenceCallback",
    "CommunicationCallback",
    "PlotCallback",
    "LoggingCallback",
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
        KeyboardInterrupt: Ctrl-C, or SIGTERM (`Terminated`), ended the run; it can be continued.
    """
    checkpoint = run.checkpoint()
    if checkpoint is not None:
        check_same_run(checkpoint, config)
    loop = build(run, config, checkpoint)
    with stopping_on_interrupt(loop):
        loop.run(checkpoint)
    return loop.folder


def build(run: RunConfig, config: Mapping[str, Any], checkpoint: Checkpoint | None = None) -> FederatedLoop:
    """Check everything, load data and model, and return the loop ready to run; nothing is written yet.

    Args:
        run: The configuration, its classes instantiated.
        config: The resolved configuration.
        checkpoint: What the run is continued from, if it is.

    Raises:
        ConfigError: The configuration cannot run; it carries every mistake found.
    """
    problems = run.check()
    if problems:
        raise ConfigError(*problems)
    connect_data(run)
    here = Trait.SHARED_MEMORY in run.engine.offers
    plan = local_plan(run, len(run.data.client_ids) if here else None)
    folder = RunFolder(run.folder, begin_again=run.ckpt_path is not None)
    rounds = run.federation
    return FederatedLoop(
        plan=plan,
        algorithm=run.algorithm,
        engine=run.engine,
        sampler=CohortSampler("all" if run.algorithm.topology.pooled else rounds.cohort, run.seed),
        folder=folder,
        rounds=rounds.rounds,
        quorum=rounds.quorum,
        averaging=rounds.averaging,
        server_optimizer=rounds.server_optimizer,
        evaluate_every_n_rounds=rounds.evaluate_every_n_rounds,
        general_tasks=run.general_tasks,
        callbacks=with_standard_callbacks(run.callbacks),
        logger=build_logger(run, folder, checkpoint),
        config=config,
    )


def connect_data(run: RunConfig) -> None:
    """Set the checked data module up for this model and seed; of clients elsewhere it need hold nothing.

    Raises:
        ConfigError: The data cannot be loaded, or does not fit the cohort.
    """
    run.data.prepare_data()
    run.data.setup("fit")
    if Trait.SHARED_MEMORY not in run.engine.offers:
        return
    problems = run.federation.check_cohort(len(run.data.client_ids))
    empty = [client for client in run.data.client_ids if not len(cast(Sized, run.data.client_dataset(client)))]
    problems += [Problem("data", client, "this client has no sample: leave it out of `client_ids`") for client in empty]
    problems += check_shares(trainer_options(run.trainer), run.data)
    if problems:
        raise ConfigError(*problems)


def check_shares(options: Mapping[str, Any], data: FederatedDataModule) -> list[Problem]:
    """Return a problem where the share of its batches that a client takes leaves one of them nothing.

    Args:
        options: The arguments of a client's `L.Trainer`.
        data: Set up, of clients that hold samples.
    """
    share = options.get("limit_train_batches", 1.0)
    if isinstance(share, int) or share >= 1:
        return []
    batches = {client: len(data.client_dataloader(client, torch.Generator())) for client in data.client_ids}
    left = [client for client, count in batches.items() if count and not epoch_batches(options, count)]
    if not left:
        return []
    remedy = f"leaves {len(left)} of {len(batches)} clients nothing, {left[0]!r} for one, which has {batches[left[0]]} "
    remedy += "batches: give a number of batches, or a larger share"
    return [Problem("trainer.limit_train_batches", share, remedy)]


def remote_client(run: RunConfig, client_id: str) -> RemoteClient:
    """Check a client's own configuration, load its model, and return the client, ready to serve a `RemoteEngine`.

    Args:
        run: The server's configuration, but for `data`: it needs to hold this client's rows alone.
        client_id: The client's name in the data module.

    Raises:
        ConfigError: The configuration cannot run; it carries every mistake found.
    """
    if problems := run.check():
        raise ConfigError(*problems)
    run.data.prepare_data()
    return RemoteClient(local_plan(run, None), client_id)


def local_plan(run: RunConfig, clients: int | None) -> LocalPlan:
    """Load the model, and return what clients need to train it on the connected data.

    Of a pooled run there is one client, which takes a whole cohort's steps.

    Args:
        run: The configuration, its classes instantiated.
        clients: Number of the run's clients; ``None`` where they are not known yet.

    Raises:
        ConfigError: The model cannot be loaded.
    """
    options, data = trainer_options(run.trainer), run.data
    cohort = None if clients is None else cohort_count(run.federation.cohort, clients)
    pooled = run.algorithm.topology.pooled
    if pooled and cohort is not None:
        steps = options.get("max_steps", -1)
        data, options = PooledData(data), options | ({"max_steps": steps * cohort} if steps > 0 else {})
    processor = run.model.processor
    with isolated_rng(derive_seed(run.seed, "new head")):
        classes = run.data.class_names or run.data.num_labels
        model = run.model.load(classes, getattr(processor, "pad_token_id", None))
    if run.data.loss_weights is not None:
        weigh_classes(model, run.data.loss_weights)
    if run.model.trained_dtype == "base" and model.dtype in HALF:
        say(f"What is trained is {str(model.dtype)[6:]}: most changes of a step are too small for it, and are lost.")
    torch.nn.Module.to(model, L.Trainer(**QUIET, **options).strategy.root_device)
    return LocalPlan(
        model=model,
        tokenizer=processor,
        adaptation=run.algorithm.adaptation,
        topology=run.algorithm.topology,
        data=data,
        optimizer=run.client.optimizer,
        schedule=run.client.schedule,
        rounds=run.federation.rounds,
        objective=run.client.objective,
        trainer=options,
        seed=run.seed,
        timeout_seconds=run.federation.client_timeout_seconds,
        clock=run.clock,
        prefix=run.prefix,
        float32=run.model.trained_dtype == "float32",
        cohort=1 if pooled else cohort,
    )


def with_standard_callbacks(given: Sequence[FederatedCallback]) -> list[FederatedCallback]:
    """Return the standard callbacks and those given, which replace standard ones of the same class.

    The order is that of the hooks among callbacks of one phase; see `fedbe.federation.callback.Phase`.
    """
    module = importlib.import_module("fedbe.callbacks")
    standard = [getattr(module, name) for name in STANDARD_CALLBACKS]
    own = [callback for callback in given if not isinstance(callback, tuple(standard))]
    chosen = [[callback for callback in given if isinstance(callback, kind)] or [kind()] for kind in standard]
    return [*(callback for of_a_kind in chosen for callback in of_a_kind), *own]


def build_logger(run: RunConfig, folder: RunFolder, checkpoint: Checkpoint | None = None) -> Logger | None:
    """Return the logger that the configuration names; W&B stays offline unless a key is present.

    Args:
        run: The configuration.
        folder: Where loggers write.
        checkpoint: What the run is continued from; ``None`` for a new one.
    """
    version = checkpoint.state["logger"] if checkpoint else None
    hidden = checkpoint.state["progress"]["completed"] + 1 if checkpoint else 0  # from there rounds are logged again
    if run.logger == "wandb":
        import wandb  # here, so that runs without it do not wait for its import

        quiet = wandb.Settings(silent=True, console="off")
        same: dict[str, Any] = {} if version is None else {"id": str(version), "resume": "allow"}
        offline = not wandb_online()
        return WandbLogger(run.name, str(folder.path), offline=offline, project="fedbe", settings=quiet, **same)
    if run.logger == "csv":
        return CSVLog(folder.path / "csv")
    if run.logger == "tensorboard":
        return TensorBoardLogger(str(folder.path), name="tensorboard", version="", purge_step=hidden)
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

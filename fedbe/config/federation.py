"""The front door in Python: a run from objects and keyword arguments, where a configuration has names and keys."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import Logger
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.aggregation import Averaging, Mean, SampleWeighted, ServerOptimizer
from fedbe.algorithms import Algorithm, BlockExpansion
from fedbe.allocation import SimulatedClock
from fedbe.client.plan import OptimizerFactory
from fedbe.client.schedule import Schedule
from fedbe.config.build import fit
from fedbe.config.described import described
from fedbe.config.run import RunConfig
from fedbe.config.sections import Client, Rounds, default_optimizer
from fedbe.data import FederatedDataModule
from fedbe.engines import Engine, InProcess
from fedbe.evaluation.tasks import GeneralTask
from fedbe.federation.callback import FederatedCallback
from fedbe.federation.quorum import Quorum
from fedbe.modeling.base_model import MICRO, BaseModel, GivenModel
from fedbe.objectives import Objective, Plain
from fedbe.prefix.store import PrefixReuse


@dataclass(frozen=True)
class Result:
    """What a finished run left.

    Attributes:
        path: Its folder; the model is in ``path / "model"``, for `fedbe.load`.
        summary: What `summary.json` holds.
    """

    path: Path
    summary: Mapping[str, Any]


class Federation:
    """A run of federated fine-tuning, described by keyword arguments; `fit` carries it out.

    The arguments are the keys of a configuration's sections, with the same defaults: ``optimizer`` is what stands under
    ``client``, ``rounds`` under ``federation``. Objects take the place of classes named by ``class_path``; one that is
    given is used by the run and belongs to it. `fedbe.system.libraries.settle_libraries` silences what Lightning says
    at each client's training, as the command line does.

    Args:
        data: Who has which data: a ready module of `fedbe.datamodules` or one of your own.
        model: The base model: a Hub name, a checkpoint folder, a `BaseModel` with further settings, or a model that is
            loaded; the latter is trained in place.
        tokenizer: The tokenizer, or the image processor, of a model that is loaded.
        algorithm: What is trained and how it is averaged; by default `BlockExpansion`.
        rounds: Number of rounds.
        cohort: Clients in a round: ``all``, a fraction (0.5) or a number (5).
        name: Name of the run; names its folder and its W&B run.
        output: The run's folder, which must not exist; ``None`` for ``runs/<name>``, numbered when that is taken.
        seed: Everything random in the run follows from it.
        optimizer: Builds a client's optimizer from parameters; by default AdamW at 1e-3 without weight decay.
        schedule: The learning-rate schedule of each client.
        objective: What clients minimise.
        trainer: Arguments of each client's `L.Trainer`, for example ``{"max_steps": 10}``.
        evaluate_every_n_rounds: Validate downstream every n rounds, and after the last.
        averaging: How updates are averaged.
        server_optimizer: How the mean of the updates moves the global model.
        quorum: How many clients of a round must not fail, and what happens if more do.
        client_timeout_seconds: How long a client may train; ``None`` to wait.
        engine: Where clients train.
        general_tasks: What the base model could do, scored before and after.
        callbacks: Added to the standard ones; one of a standard class takes that one's place.
        prefix: Keep what the frozen blocks below the lowest trained one compute of each sequence.
        clock: The clients' simulated devices.
        logger: ``wandb`` (offline unless a key is present), ``csv``, ``tensorboard``, ``none``, or a Lightning logger.
        ckpt_path: Continue a run: ``last``, or the path of a checkpoint.
    """

    def __init__(
        self,
        data: FederatedDataModule,
        model: str | BaseModel | PreTrainedModel = MICRO,
        algorithm: Algorithm | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        rounds: int = 20,
        cohort: int | float | Literal["all"] = "all",
        name: str = "run",
        output: Path | str | None = None,
        seed: int = 0,
        optimizer: OptimizerFactory = default_optimizer,
        schedule: Schedule | None = None,
        objective: Objective | None = None,
        trainer: Mapping[str, Any] | None = None,
        evaluate_every_n_rounds: int = 1,
        averaging: Averaging | None = None,
        server_optimizer: ServerOptimizer | None = None,
        quorum: Quorum | None = None,
        client_timeout_seconds: float | None = None,
        engine: Engine | None = None,
        general_tasks: Sequence[GeneralTask] = (),
        callbacks: Sequence[FederatedCallback] = (),
        prefix: PrefixReuse | None = None,
        clock: SimulatedClock | None = None,
        logger: Literal["wandb", "csv", "tensorboard", "none"] | Logger = "wandb",
        ckpt_path: str | None = None,
    ) -> None:
        self.run = RunConfig(
            data=data,
            name=name,
            output=None if output is None else Path(output),
            seed=seed,
            model=base_model(model, tokenizer),
            algorithm=algorithm or BlockExpansion(),
            client=Client(optimizer, schedule or Schedule(), objective or Plain()),
            federation=Rounds(
                rounds,
                cohort,
                evaluate_every_n_rounds,
                averaging or SampleWeighted(),
                server_optimizer or Mean(),
                quorum or Quorum(),
                client_timeout_seconds,
            ),
            engine=engine or InProcess(),
            general_tasks=general_tasks,
            callbacks=callbacks,
            trainer=trainer or {},
            prefix=prefix,
            clock=clock,
            logger=logger,
            ckpt_path=ckpt_path,
        )

    def fit(self) -> Result:
        """Run it to its end and return what it left.

        Raises:
            ConfigError: It cannot run; with every mistake, by the key that it has in a configuration.
            QuorumError: Too many clients of a round failed.
            KeyboardInterrupt: Ctrl-C ended it; it can be continued with ``ckpt_path="last"``.
        """
        folder = fit(self.run, described(self.run))
        return Result(folder.path, json.loads(folder.summary.read_text(encoding="utf-8")))


def base_model(model: str | BaseModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> BaseModel:
    """Return the section ``model`` for a name, or for a model that is loaded with its tokenizer."""
    if isinstance(model, PreTrainedModel):
        return GivenModel(model, tokenizer)
    return BaseModel(model) if isinstance(model, str) else model

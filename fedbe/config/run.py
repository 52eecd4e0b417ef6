"""The sections of a run's configuration."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import Logger

from fedbe.algorithms import Algorithm, BlockExpansion
from fedbe.allocation import SimulatedClock
from fedbe.config.rules import check_sections
from fedbe.config.sections import Client, Rounds
from fedbe.data import FederatedDataModule
from fedbe.engines import Engine, InProcess
from fedbe.errors import Problem
from fedbe.evaluation.tasks import GeneralTask
from fedbe.federation.callback import FederatedCallback
from fedbe.modeling.base_model import BaseModel
from fedbe.prefix.store import PrefixReuse
from fedbe.storage.checkpoint import LAST, Checkpoint, Checkpoints, read_checkpoint
from fedbe.storage.metrics_file import MetricsFile
from fedbe.storage.run_folder import RUNS, RunFolder


@dataclass
class RunConfig:
    """One run, but for the clients' `L.Trainer`.

    Attributes:
        data: Who has which data: a ready module of `fedbe.datamodules` or one of your own.
        name: Name of the run; names its folder and its W&B run.
        output: The run's folder, which must not exist; ``null`` for ``runs/<name>``, numbered when that is taken.
        seed: Everything random in the run follows from it.
        model: The base model.
        algorithm: What is trained and how it is averaged.
        client: How each client trains.
        federation: Rounds and cohorts.
        engine: Where clients train: a class of `fedbe.engines` by ``class_path``. ``Forked`` and ``InProcess`` come to
            the same result, and a run may go on with the other one.
        general_tasks: What the base model could do, scored before and after to see what was kept.
        callbacks: Added to the standard ones; one of a standard class takes that one's place.
        trainer: Arguments of each client's `L.Trainer`; loggers, checkpoints and progress bars are the run's.
        prefix: Keep what the frozen blocks below the lowest trained one compute of each sequence; ``null`` to compute
            it each time.
        clock: The clients' simulated devices and the time they take; ``null`` to take each client's measured time.
        logger: ``wandb`` (offline unless a key is present), ``csv``, ``tensorboard``, ``none``, or a Lightning logger.
        ckpt_path: Continue a run: ``last`` for the newest checkpoint of the run of this name or in `output`, or the
            path of one; ``null`` to begin. With ``last`` and no checkpoint yet, the run begins.
    """

    data: FederatedDataModule
    name: str = "run"
    output: Path | None = None
    seed: int = 0
    model: BaseModel = field(default_factory=BaseModel)
    algorithm: Algorithm = field(default_factory=BlockExpansion)
    client: Client = field(default_factory=Client)
    federation: Rounds = field(default_factory=Rounds)
    engine: Engine = field(default_factory=InProcess)
    general_tasks: Sequence[GeneralTask] = ()
    callbacks: Sequence[FederatedCallback] = ()
    trainer: Mapping[str, Any] = field(default_factory=dict)
    prefix: PrefixReuse | None = None
    clock: SimulatedClock | None = None
    logger: Literal["wandb", "csv", "tensorboard", "none"] | Logger = "wandb"
    ckpt_path: str | None = None

    @cached_property
    def folder(self) -> Path:
        """Where the run goes, or where the one is that is continued: looked for on the disk once."""
        if self.ckpt_path not in (None, LAST):
            return Path(str(self.ckpt_path)).parent.parent
        if self.output is not None:
            return self.output
        latest = RunFolder.latest(RUNS, self.name) if self.ckpt_path == LAST else None
        return latest or RunFolder.next_free(RUNS, self.name)

    def checkpoint(self) -> Checkpoint | None:
        """Return the checkpoint to continue from, if there is one.

        Raises:
            ConfigError: It cannot be used; the one before it is offered.
        """
        if self.ckpt_path is None:
            return None
        if self.ckpt_path != LAST:
            return read_checkpoint(Path(self.ckpt_path))
        folder = RunFolder(self.folder)
        last = Checkpoints(folder.checkpoints).last(MetricsFile(folder.metrics).fits)
        return None if last is None else read_checkpoint(last)

    def check(self) -> list[Problem]:
        """Return all mistakes that can be seen before the weights are loaded and data is encoded."""
        return check_sections(vars(self))

"""Each client's `L.Trainer`: its arguments, what keeps one from training a client, and how one is run."""

from __future__ import annotations

import copy
import inspect
import math
import signal
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import lightning as L
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from fedbe.errors import Problem, Terminated

QUIET: Mapping[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""What every client's Trainer leaves to the run."""

STEPS = frozenset({"max_steps", "max_epochs", "limit_train_batches", "accumulate_grad_batches"})
"""Arguments that decide which steps a client takes, see `local_steps`."""

CLIPPING = frozenset({"gradient_clip_val", "gradient_clip_algorithm"})
"""Arguments that decide what a client does with its gradients."""

PLACE = frozenset({"accelerator", "devices", "precision", "deterministic", "benchmark", "detect_anomaly",
                   "default_root_dir"})  # fmt: skip
"""Arguments that say where and how steps are computed, the same for all clients."""


def trainer_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a client's `L.Trainer`: those given, on one device, one epoch where nothing else is said.

    Args:
        given: The configuration's section ``trainer``; ``None`` stands for Lightning's default.
    """
    options = {key: value for key, value in given.items() if value is not None}
    if options.get("devices", "auto") == "auto":
        options["devices"] = 1
    if options.get("max_steps", -1) == -1 and "max_time" not in options:
        options.setdefault("max_epochs", 1)
    return options


def local_steps(options: Mapping[str, Any], batches: int) -> int:
    """Return how many optimizer steps a client takes in a round.

    Args:
        options: The arguments of its `L.Trainer`: ``max_steps``, ``max_epochs``, ``limit_train_batches`` and
            ``accumulate_grad_batches`` count.
        batches: Number of its batches.
    """
    per_epoch = math.ceil(epoch_batches(options, batches) / options.get("accumulate_grad_batches", 1))
    steps, epochs = options.get("max_steps", -1), options.get("max_epochs", -1)
    limits = [steps] if steps > 0 else []
    return int(min([*limits, *([epochs * per_epoch] if epochs > 0 else [])]))


def batches_per_step(options: Mapping[str, Any], batches: int) -> float:
    """Return how many batches a client's local steps accumulate on the average: the last of an epoch may be short.

    Args:
        options: See `local_steps`.
        batches: Number of the client's batches.
    """
    accumulate, taken = options.get("accumulate_grad_batches", 1), epoch_batches(options, batches)
    steps = local_steps(options, batches)
    if not steps:
        return 0.0
    epochs, rest = divmod(steps, math.ceil(taken / accumulate))
    return float(epochs * taken + min(rest * accumulate, taken)) / steps


def most_samples(options: Mapping[str, Any], samples: float, batch_size: int) -> float:
    """Return how many samples a client can see in a round at most; infinity where nothing limits it.

    Args:
        options: The arguments of its `L.Trainer`.
        samples: Number of its training samples.
        batch_size: Samples in a batch.
    """
    if not samples:
        return 0.0
    steps, epochs = options.get("max_steps", -1), options.get("max_epochs", -1)
    of_epochs: float = epochs * samples if epochs > 0 else math.inf
    if steps <= 0 or not math.isfinite(samples):
        return of_epochs
    whole, batches = divmod(steps * options.get("accumulate_grad_batches", 1), math.ceil(samples / batch_size))
    return float(min(whole * samples + min(batches * batch_size, samples), of_epochs))


def epoch_batches(options: Mapping[str, Any], batches: int) -> int:
    """Return how many of a client's batches it takes in an epoch, as ``limit_train_batches`` says."""
    limit = options.get("limit_train_batches", 1.0)
    return min(batches, limit) if isinstance(limit, int) else int(limit * batches)


def check_trainer(options: Mapping[str, Any], dtype: str, schedule: str) -> list[Problem]:
    """Return what keeps an `L.Trainer` with these arguments from training a client.

    Args:
        options: As `trainer_options` gives them.
        dtype: Type of the resident weights.
        schedule: Name of the learning-rate schedule.
    """
    problems = [*_check_length(options, schedule), *_check_precision(options, dtype)]
    try:
        trainer = L.Trainer(**QUIET, **options)
    except Exception as error:  # Lightning raises several kinds, none of them its own
        given = inspect.signature(L.Trainer).parameters
        chosen = {name: value for name, value in options.items() if value != given[name].default}
        named = {name: value for name, value in chosen.items() if name in str(error) or str(value) in str(error)}
        return [*problems, Problem("trainer", named or chosen, str(error))]
    if not isinstance(trainer.strategy, SingleDeviceStrategy):
        kind = type(trainer.strategy).__name__
        remedy = f"gives {kind}; a client trains on one device: set trainer.devices to 1 and leave the strategy out"
        problems.append(Problem("trainer.devices", options.get("devices"), remedy))
    return problems


def _check_length(options: Mapping[str, Any], schedule: str) -> list[Problem]:
    steps, epochs = options.get("max_steps", -1), options.get("max_epochs", -1)
    problems = []
    if steps == 0 or steps < -1:
        problems.append(Problem("trainer.max_steps", steps, "give 1 or more, or leave it out for whole epochs"))
    if steps == -1 and epochs == 0:
        problems.append(Problem("trainer.max_epochs", epochs, "give 1 or more"))
    if steps == -1 and epochs == -1 and "max_time" not in options:
        problems.append(Problem("trainer.max_epochs", epochs, "never ends: give max_steps, max_epochs or max_time"))
    if "max_time" in options and steps == -1 and epochs == -1 and schedule != "constant":
        remedy = "a schedule that ends needs a number of steps: give trainer.max_steps, or schedule.name: constant"
        problems.append(Problem("trainer.max_time", options["max_time"], remedy))
    for name in ("accumulate_grad_batches", "gradient_clip_val"):
        if options.get(name, 1) < 0 or (name.startswith("acc") and options.get(name, 1) < 1):
            problems.append(Problem(f"trainer.{name}", options[name], "give a number above 0, or leave it out"))
    if options.get("limit_train_batches") == 0:
        problems.append(Problem("trainer.limit_train_batches", 0, "leaves nothing to train on: leave it out"))
    return problems


def _check_precision(options: Mapping[str, Any], dtype: str) -> list[Problem]:
    whole = {"bf16-true": "bfloat16", "16-true": "float16", "32-true": "float32", "64-true": "float64"}
    wanted = whole.get(str(options.get("precision", "")))
    if wanted in (None, dtype) or (wanted == "float32" and dtype != "float32"):
        return []
    remedy = f"would cast the resident {dtype} weights: set model.dtype to {wanted}, or use a `-mixed` precision"
    return [Problem("trainer.precision", options["precision"], remedy)]


class Trainers:
    """Makes the Trainer of each client.

    Every client gets one of its own, so that no callback's state passes between clients: a copy of one that never
    trains, which is made in a tenth of the time.

    Args:
        options: The arguments of each client's `L.Trainer`.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = options
        self._templates: dict[int | None, L.Trainer] = {}

    def new(self, max_steps: int | None = None) -> L.Trainer:
        """Return a Trainer for one client, with these local steps at most in place of those of the options."""
        return copy.deepcopy(self.template(max_steps))

    def template(self, max_steps: int | None) -> L.Trainer:
        """Return the Trainer of which clients get copies."""
        if max_steps not in self._templates:
            steps = {} if max_steps is None else {"max_steps": max_steps}
            self._templates[max_steps] = quiet_trainer(dict(self._options) | steps)
        return self._templates[max_steps]


def quiet_trainer(options: Mapping[str, Any]) -> L.Trainer:
    """Return a Trainer that writes, shows and saves nothing and leaves signals alone."""
    trainer = L.Trainer(**QUIET, **options)
    trainer._signal_connector = _NoSignals(trainer)  # type: ignore[assignment]
    trainer.fit_loop._warn_if_modules_in_eval_mode = _do_nothing  # type: ignore[method-assign]
    return trainer


def _do_nothing() -> None:
    """Take the place of a walk over the model for modules in evaluation mode: frozen blocks are, on purpose."""


class _NoSignals:
    """Takes the place of what would handle signals in a Trainer: the run handles them.

    Lightning would end a client in its middle at SIGTERM, where the run ends after it and can be continued; and it
    reads and writes the handlers of all signals for each fit.

    Args:
        trainer: The Trainer.
    """

    received_sigterm = False

    def __init__(self, trainer: L.Trainer) -> None:
        self.trainer = trainer

    def register_signal_handlers(self) -> None:
        """Leave all handlers as they are."""

    def teardown(self) -> None:
        """Leave all handlers as they are."""


def fit(trainer: L.Trainer, module: L.LightningModule, batches: Iterable[Any]) -> None:
    """Train; Ctrl-C and SIGTERM are interrupts of the run, where Lightning would exit the process and say nothing.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed.
        Terminated: The process is to end.
    """
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(module, batches)
    except SIGTERMException:
        raise Terminated from None
    except SystemExit as exit_:
        if isinstance(exit_.__context__, KeyboardInterrupt):
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, handler)
            raise exit_.__context__ from None
        raise

"""General tasks: what the base model could do before fine-tuning, scored again after it."""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fedbe.errors import Facts, Problem, under

RESERVED_NAME = "mean"

KEY = "general_tasks"
"""Where a run's general tasks stand in a configuration."""


@dataclass(frozen=True)
class TaskScore:
    """The result of one general task.

    Attributes:
        score: Accuracy in [0, 1]; higher is better. Retention is the ratio of two of these.
        standard_error: Standard error of `score` over the task's items.
        cross_entropy: Mean loss in nats per token, where the task has one; ΔCE is a difference of these.
    """

    score: float
    standard_error: float
    cross_entropy: float | None = None

    @classmethod
    def of_items(cls, scores: Tensor) -> "TaskScore":
        """Return the mean of the items' scores with its standard error. Shape ``[n]``."""
        error = scores.double().std().item() / len(scores) ** 0.5 if len(scores) > 1 else 0.0
        return cls(scores.double().mean().item(), error)


class GeneralTask(ABC):
    """Base class of general tasks: subclass it in a file of your own and name it by ``class_path``.

    Attributes:
        name: Key of the task in `metrics.jsonl`, tables and plots; unique within a run.
    """

    name: str

    @abstractmethod
    def prepare(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, seed: int) -> None:
        """Load and tokenise the items once, before round 1; `model` is still the base model.

        Raises:
            ConfigError: They cannot be scored with this model; keys are those of this task's arguments.
        """

    @abstractmethod
    def evaluate(self, model: PreTrainedModel) -> TaskScore:
        """Score the model as it is now, on exactly the same items at every call."""

    def check(self, key: str, facts: Facts) -> list[Problem]:
        """Return the mistakes in this task's configuration, found before work starts; see `Facts`."""
        return []


def prepare_tasks(
    tasks: Sequence[GeneralTask], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, seed: int
) -> None:
    """Prepare a run's general tasks on the base model.

    Raises:
        ConfigError: One cannot be scored with this model.
    """
    for index, task in enumerate(tasks):
        with under(f"{KEY}[{index}].init_args"):
            task.prepare(model, tokenizer, seed)


def check_tasks(tasks: Sequence[GeneralTask], facts: Facts) -> list[Problem]:
    """Return the mistakes of a run's general tasks, in the order of the configuration, their names among them."""
    counts = Counter(task.name for task in tasks)
    problems = []
    for index, task in enumerate(tasks):
        place = f"{KEY}[{index}].init_args"
        if counts[task.name] > 1:
            problems.append(Problem(f"{place}.name", task.name, "give each general task a name of its own."))
        if task.name in ("", RESERVED_NAME) or "/" in task.name:
            remedy = f"a task's name is not empty, not {RESERVED_NAME!r} and has no '/'; choose another."
            problems.append(Problem(f"{place}.name", task.name, remedy))
        problems.extend(task.check(place, facts))
    return problems

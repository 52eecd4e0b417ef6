"""What goes with what in a configuration, checked before work starts."""

from collections.abc import Mapping
from importlib.util import find_spec
from itertools import permutations
from typing import Any, Protocol

import torch
from torch import nn

from fedbe.algorithms import Algorithm
from fedbe.allocation import SimulatedClock
from fedbe.client.trainer import check_trainer, trainer_options
from fedbe.config.sections import Client, Rounds
from fedbe.data import FederatedDataModule
from fedbe.errors import ConfigError, Facts, Problem
from fedbe.evaluation.tasks import check_tasks
from fedbe.federation.record import metric_paths
from fedbe.modeling.base_model import BaseModel
from fedbe.storage.run_folder import RUNS, RunFolder
from fedbe.traits import Trait, Traits

SENTENCES: Mapping[Trait, str] = {
    Trait.GLOBAL_MODEL: "it needs one global model, and with {other} clients have models of their own",
    Trait.AGGREGATION: "with {other} nothing that clients train becomes part of a global model",
    Trait.LASTING_TENSORS: "{other} starts its tensors afresh in every round, which leaves nothing to carry over",
    Trait.PLAIN_MEAN: "it has a rule of its own for what clients send, which {other} would replace",
    Trait.SERVER_SEES_UPDATES: "it looks at each client's update, which {other} hides from the server",
    Trait.SERVER_SEES_REPORTS: "the server acts on what clients send besides tensors, which {other} does not cover",
    Trait.EQUAL_SHAPES: "it averages tensors of equal shapes, and with {other} clients send different ones",
    Trait.FIXED_STRUCTURE: "it goes back to an earlier round, which a model that grows cannot, and {other} may grow it",
    Trait.UNCHANGED_BASE: "it stands beside base weights that nothing changes, and {other} changes them",
    Trait.COPIED_IN_AND_OUT: "a client of {other} needs the model to itself",
    Trait.SEVERAL_CLIENTS: "with {other} there is one client, and none to train beside it",
    Trait.SHARED_MEMORY: "it needs clients and their data in this process, and with {other} they are elsewhere",
    Trait.SINGLE_CLIENT_STEPS: "it acts on one client's model, and {other} trains several clients in one pass",
}
"""Trait → why what needs it does not go with what does not offer it."""

INSTEAD: Mapping[str, str] = {
    "client.objective": "fedbe.objectives.Plain",
    "federation.averaging": "fedbe.aggregation.SampleWeighted",
    "federation.server_optimizer": "fedbe.aggregation.Mean",
    "engine": "fedbe.engines.InProcess",
}
"""Key → the class that goes with everything."""

FURTHER: Mapping[Trait, str] = {
    Trait.SERVER_SEES_REPORTS: "a placement and a score that read no reports, such as fedbe.expansion.FixedPlacement "
    "and fedbe.allocation.RandomScore",
    Trait.FIXED_STRUCTURE: "leave the plateau out",
}
"""Trait → what else an algorithm could be given."""


class HasTraits(Protocol):
    """What `conflicts` asks of a part of a run; see `fedbe.traits.Part`."""

    @property
    def needs(self) -> Traits:
        """What must hold in a run."""
        ...

    @property
    def offers(self) -> Traits:
        """What still holds in a run."""
        ...


def conflicts(parts: Mapping[str, HasTraits]) -> list[Problem]:
    """Return a problem for each two parts of a run of which one needs what the other does not offer.

    Args:
        parts: Key in the configuration → the part.
    """
    found = []
    for (key, part), (other_key, other) in permutations(parts.items(), 2):
        missing = next((trait for trait in Trait if trait in part.needs - other.offers), None)
        if missing is not None:
            reason = SENTENCES[missing].format(other=type(other).__name__)
            found.append(Problem(key, type(part).__name__, f"{reason}: {_remedy(missing, key, other_key)}"))
    return found


def _remedy(missing: Trait, key: str, other_key: str) -> str:
    remedies = [f"give {INSTEAD[key]}"] if key in INSTEAD else []
    remedies += [f"give {other_key}: {INSTEAD[other_key]}"] if other_key in INSTEAD else []
    further = [FURTHER[missing]] if missing in FURTHER and "algorithm" in (key, other_key) else []
    return ", or ".join([*(remedies or ["leave it out"]), *further])


def check_data(data: FederatedDataModule, model: BaseModel | None, seed: int, facts: Facts) -> list[Problem]:
    """Give the data module its tokenizer, if the model can be read, and return its mistakes."""
    problems = []
    if model is not None:
        try:
            data.connect(model.processor, model.config, seed)
        except ConfigError as error:
            problems = list(error.problems)
    known = {problem.key for problem in problems}
    problems += [problem for problem in data.check(data.key, facts) if problem.key not in known]
    if model is None or problems:
        return problems
    classes, wants = data.num_labels, model.task.endswith("classification")
    if wants != (classes is not None):
        remedy = f"the data has {'no' if classes is None else classes} classes: choose the task that fits it"
        return [Problem("model.task", model.task, remedy)]
    return []


def check_pooling(algorithm: Algorithm, rounds: Rounds, options: Mapping[str, Any]) -> list[Problem]:
    """Return a problem when a pooled run would not take as many steps as a cohort."""
    counted = options.get("max_steps", -1) > 0
    whole_epochs = rounds.cohort == "all" and not {"max_time", "limit_train_batches"} & options.keys()
    if not algorithm.topology.pooled or counted or whole_epochs:
        return []
    remedy = f"{type(algorithm).__name__} takes as many steps as a cohort does: say how many each client takes"
    return [Problem("trainer.max_steps", options.get("max_steps"), remedy)]


def check_clock(clock: SimulatedClock | None, facts: Facts) -> list[Problem]:
    """Return the mistakes in the simulated clock, and what keeps it from knowing how long a client trains."""
    if clock is None:
        return []
    problems = clock.check("clock", facts)
    if "max_time" in facts.trainer:
        remedy = "simulated devices take a number of steps, not a time: give max_steps or max_epochs"
        problems.append(Problem("trainer.max_time", facts.trainer["max_time"], remedy))
    return problems


def facts_of(sections: Mapping[str, Any], model_known: bool) -> Facts:
    """Return what is known of a run by its configuration."""
    callbacks, tasks = sections["callbacks"], sections["general_tasks"]
    logged = [name for callback in callbacks for name in callback.logs]
    return Facts(
        depth=sections["model"].depth if model_known else 0,
        metrics=[*metric_paths([task.name for task in tasks]), *logged],
        optimizer=sections["client"].optimizer,
        trainer=trainer_options(sections["trainer"]),
        timeout_seconds=sections["federation"].client_timeout_seconds,
    )


def check_trained_type(model: BaseModel, client: Client) -> list[Problem]:
    """Return a problem where weights are trained in float16 by an optimizer that then divides by zero."""
    if model.trained_dtype == "float32" or model.resident_dtype != "float16":
        return []
    eps = client.optimizer([nn.Parameter(torch.zeros(1))]).defaults.get("eps")
    if eps is None or torch.tensor(eps, dtype=torch.float16) > 0:
        return []
    remedy = "is 0 in float16: give 1e-4, or leave model.trained_dtype at float32"
    return [Problem("client.optimizer.init_args.eps", eps, remedy)]


def check_sections(sections: Mapping[str, Any]) -> list[Problem]:
    """Return the mistakes in the sections of a `RunConfig` that are there; ``data`` may be missing.

    Args:
        sections: The attributes of a `RunConfig` by name.
    """
    model: BaseModel = sections["model"]
    client: Client = sections["client"]
    rounds: Rounds = sections["federation"]
    algorithm, callbacks = sections["algorithm"], sections["callbacks"]
    problems = model.check("model", Facts())
    known = not problems
    facts = facts_of(sections, model_known=known)
    if known:
        problems += algorithm.check("algorithm.init_args", facts)
    if "data" in sections:
        problems += check_data(sections["data"], model if not problems else None, sections["seed"], facts)
    client_problems = client.check("client", facts)
    if known and not client_problems:
        problems += check_trained_type(model, client)
    problems += [*client_problems, *rounds.check("federation", facts)]
    parts: dict[str, HasTraits] = {
        "algorithm": algorithm,
        "client.objective": client.objective,
        "federation.averaging": rounds.averaging,
        "federation.server_optimizer": rounds.server_optimizer,
        "engine": sections["engine"],
    }
    problems += conflicts(parts | {f"callbacks[{index}]": callback for index, callback in enumerate(callbacks)})
    if known:
        problems += check_trainer(facts.trainer, model.resident_dtype, client.schedule.name)
    problems += check_clock(sections["clock"], facts)
    problems += sections["prefix"].check("prefix", facts) if sections["prefix"] else []
    problems += sections["engine"].check("engine.init_args", facts)
    problems += check_pooling(algorithm, rounds, facts.trainer)
    problems += check_tasks(sections["general_tasks"], facts)
    for index, callback in enumerate(callbacks):
        problems += callback.check(f"callbacks[{index}].init_args", facts)
    if sections["logger"] == "tensorboard" and not (find_spec("tensorboard") or find_spec("tensorboardX")):
        problems.append(Problem("logger", "tensorboard", "is not installed: pip install 'fedbe[tensorboard]'"))
    name_problem = RunFolder.name_problem(RUNS, sections["name"])
    problems += [name_problem] if name_problem else []
    begins = sections["output"] and not sections.get("ckpt_path")
    folder_problem = RunFolder.problem(sections["output"]) if begins else None
    return problems + ([folder_problem] if folder_problem else [])

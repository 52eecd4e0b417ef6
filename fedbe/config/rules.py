"""What goes with what in a configuration, checked before work starts."""

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from fedbe.aggregation import Averaging, Mean
from fedbe.algorithms import Algorithm
from fedbe.allocation import SimulatedClock
from fedbe.client.trainer import check_trainer, trainer_options
from fedbe.config.sections import Client, Federation
from fedbe.data import FederatedDataModule
from fedbe.engines.one_pass.engine import check_one_pass
from fedbe.errors import ConfigError, Problem
from fedbe.evaluation.tasks import check_tasks
from fedbe.federation.record import metric_paths
from fedbe.modeling.base_model import BaseModel
from fedbe.objectives import Objective
from fedbe.storage.run_folder import RunFolder


def check_data(data: FederatedDataModule, model: BaseModel | None, seed: int) -> list[Problem]:
    """Give the data module its tokenizer, if the model can be read, and return its mistakes."""
    problems = []
    if model is not None:
        try:
            data.connect(model.processor, model.config, seed)
        except ConfigError as error:
            problems = list(error.problems)
    known = {problem.key for problem in problems}
    problems += [problem for problem in data.check("data") if problem.key not in known]
    if model is None or problems:
        return problems
    classes, wants = data.num_labels, model.task.endswith("classification")
    if wants != (classes is not None):
        remedy = f"the data has {'no' if classes is None else classes} classes: choose the task that fits it"
        return [Problem("model.task", model.task, remedy)]
    return []


def check_combination(algorithm: Algorithm, client: Client, federation: Federation) -> list[Problem]:
    """Return why this algorithm makes no sense with this local objective or this server optimizer."""
    objective, server, name = client.objective, federation.server_optimizer, type(algorithm).__name__
    alone = "nothing is aggregated" if not algorithm.aggregates else "clients keep tensors of their own"
    restarts = f"{name} starts its tensors anew in every round, which leaves nothing to carry over"
    problems = []
    if objective.needs_global_model and (algorithm.personalised or not algorithm.aggregates):
        remedy = f"it needs one global model, and with {name} {alone}: give fedbe.objectives.Plain"
        problems.append(Problem("client.objective", type(objective).__name__, remedy))
    elif objective.needs_lasting_tensors and algorithm.restarts:
        remedy = f"{restarts}: give fedbe.objectives.Plain or FedProx"
        problems.append(Problem("client.objective", type(objective).__name__, remedy))
    if not isinstance(server, Mean) and (algorithm.restarts or not algorithm.aggregates):
        remedy = f"{restarts if algorithm.restarts else f'with {name} {alone}'}: give fedbe.aggregation.Mean"
        problems.append(Problem("federation.server_optimizer", type(server).__name__, remedy))
    return problems + check_averaging(algorithm, objective, federation.averaging)


def check_averaging(algorithm: Algorithm, objective: Objective, averaging: Averaging) -> list[Problem]:
    """Return why updates of this algorithm cannot be averaged by this rule."""
    key, value, name = "federation.averaging", type(averaging).__name__, type(algorithm).__name__
    problems = []
    if not averaging.exact and (algorithm.own_average or not algorithm.aggregates):
        does = "has a rule of its own for what clients send" if algorithm.aggregates else "aggregates nothing"
        problems.append(Problem(key, value, f"{name} {does}: give fedbe.aggregation.SampleWeighted"))
    if not averaging.covers_reports and algorithm.reports:
        problems.append(Problem(key, value, f"does not cover what clients report to {name}: {algorithm.reports}"))
    if not averaging.covers_reports and objective.needs_lasting_tensors:
        remedy = f"does not cover what clients send for {type(objective).__name__}: give fedbe.objectives.Plain"
        problems.append(Problem(key, value, remedy))
    return problems


def check_pooling(algorithm: Algorithm, federation: Federation, options: Mapping[str, Any]) -> list[Problem]:
    """Return a problem when a pooled run would not take as many steps as a cohort."""
    counted = options.get("max_steps", -1) > 0
    whole_epochs = federation.cohort == "all" and not {"max_time", "limit_train_batches"} & options.keys()
    if not algorithm.pooled or counted or whole_epochs:
        return []
    remedy = f"{type(algorithm).__name__} takes as many steps as a cohort does: say how many each client takes"
    return [Problem("trainer.max_steps", options.get("max_steps"), remedy)]


def check_cohort_engine(
    algorithm: Algorithm, client: Client, federation: Federation, options: Mapping[str, Any]
) -> list[Problem]:
    """Return why clients cannot be trained in one pass, where a number of them is given."""
    number = federation.clients_in_one_pass
    if number in ("auto", 1):
        return []
    return check_one_pass(number, algorithm, client.objective, options, federation.client_timeout_seconds)


def check_clock(clock: SimulatedClock | None, options: Mapping[str, Any], key: str = "clock") -> list[Problem]:
    """Return the mistakes in the simulated clock, and what keeps it from knowing how long a client trains."""
    if clock is None:
        return []
    problems = clock.check(key)
    if "max_time" in options:
        remedy = "simulated devices take a number of steps, not a time: give max_steps or max_epochs"
        problems.append(Problem("trainer.max_time", options["max_time"], remedy))
    return problems


def check_sections(sections: Mapping[str, Any]) -> list[Problem]:
    """Return the mistakes in the sections of a `RunConfig` that are there; ``data`` may be missing.

    Args:
        sections: The attributes of a `RunConfig` by name.
    """
    model: BaseModel = sections["model"]
    client: Client = sections["client"]
    problems = model.check()
    if not problems:
        problems += sections["algorithm"].check(model.depth)
    if "data" in sections:
        problems += check_data(sections["data"], model if not problems else None, sections["seed"])
    problems += [*client.check(), *sections["federation"].check()]
    problems += check_combination(sections["algorithm"], client, sections["federation"])
    options = trainer_options(sections["trainer"])
    problems += check_trainer(options, model.dtype, client.schedule.name)
    problems += check_clock(sections["clock"], options)
    problems += sections["prefix"].check() if sections["prefix"] else []
    problems += check_cohort_engine(sections["algorithm"], client, sections["federation"], options)
    problems += check_pooling(sections["algorithm"], sections["federation"], options)
    problems += check_tasks(sections["general_tasks"], "general_tasks")
    metrics = metric_paths([task.name for task in sections["general_tasks"]])
    for index, callback in enumerate(sections["callbacks"]):
        problems += callback.check(f"callbacks[{index}].init_args", metrics)
        if callback.restores_rounds and sections["algorithm"].grows:
            remedy = "goes back to an earlier round, which a model that grows cannot: leave the plateau out, or this"
            problems.append(Problem(f"callbacks[{index}]", type(callback).__name__, remedy))
    if sections["logger"] == "tensorboard" and not (find_spec("tensorboard") or find_spec("tensorboardX")):
        problems.append(Problem("logger", "tensorboard", "is not installed: pip install 'fedbe[tensorboard]'"))
    begins = sections["output"] and not sections.get("ckpt_path")
    folder_problem = RunFolder.problem(sections["output"]) if begins else None
    return problems + ([folder_problem] if folder_problem else [])

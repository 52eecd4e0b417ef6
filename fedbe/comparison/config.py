"""What to compare: one base configuration, the arms' differences from it, learning rates and seeds."""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from fedbe.config.mistakes import collect
from fedbe.config.parser import run_of
from fedbe.config.raw import load_yaml, read_yaml
from fedbe.config.run import RunConfig
from fedbe.dial import NEEDS as DIAL_NEEDS
from fedbe.errors import ConfigError, Problem
from fedbe.storage.nested import leaves, merge, nest

LEARNING_RATE = ("client", "optimizer", "init_args", "lr")
"""Where the learning rate stands in a run's configuration."""

BUDGET = (
    "model", "data", "federation", "trainer", "engine", "general_tasks", "callbacks", "clock", "seed", "name", "output",
    "logger",
)  # fmt: skip
"""Sections that are the same for every arm: base model, data, cohorts, local steps, rounds, and what is measured."""

FREE = ("federation.server_optimizer",)
"""Keys inside those sections that belong to the method, not to the budget."""

_PLACEHOLDER = re.compile(r"\$\{(\w+)\}")


@dataclass
class ComparisonConfig:
    """A comparison under one budget.

    Attributes:
        base: A run's configuration, which all arms share; in a file also the path of one, relative to that file.
        arms: Name → what differs from the base, nested or with dotted keys. ``learning_rates`` there replaces the
            comparison's for this arm and must be as long.
        learning_rates: Tried for each arm; the best on validation data is taken.
        output: Folder of the results, with every run under ``runs/``.
        seeds: Seeds of the runs that count.
        tuning_seeds: Seeds of the runs that choose the learning rate.
        parallel: Runs at a time, with one thread each if more than one.
        target: Downstream validation accuracy to which convergence is timed; ``null`` for the matched one.
        matched_level: Downstream validation accuracy at which retention is compared; ``null`` for the highest that all
            arms reach.
        baseline: Arm over which acceleration is counted; ``null`` for the first.
        allow: Dotted keys that arms may set although they change the budget.
        dial: Places of the dial, in [0, 1], at which the runs that count are measured after training, 0 and 1 besides;
            none for no measurement.
    """

    base: dict[str, Any]
    arms: dict[str, dict[str, Any]]
    learning_rates: list[float]
    output: Path
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    tuning_seeds: list[int] = field(default_factory=lambda: [0])
    parallel: int = 1
    target: float | None = None
    matched_level: float | None = None
    baseline: str | None = None
    allow: list[str] = field(default_factory=list)
    dial: list[float] = field(default_factory=list)

    def rates(self, arm: str) -> list[float]:
        """Return the learning rates to try for an arm, in ascending order."""
        return sorted(self.arms[arm].get("learning_rates", self.learning_rates))

    def run_config(self, arm: str, learning_rate: float, seed: int) -> dict[str, Any]:
        """Return the configuration of one run."""
        config = deepcopy(self.base)
        for key, value in _overrides(self.arms[arm]).items():
            merge(config, nest(key, deepcopy(value)))
        merge(config, nest(".".join(LEARNING_RATE), learning_rate))
        return config | {"name": f"{slug(arm)}-{learning_rate:g}-{seed}", "seed": seed}

    def can_be_dialled(self, arm: str) -> bool:
        """Whether what an arm trains can be scaled down after training."""
        return self._run(arm).algorithm.offers >= DIAL_NEEDS

    def check(self) -> list[Problem]:
        """Return every mistake, those in each arm's run configuration included."""
        problems = [*self._check_values(), *self._check_names()]
        for arm in self.arms:
            problems += [*self._check_rates(arm), *self._check_budget(arm)]
        return problems or self._check_runs()

    def _check_values(self) -> Iterator[Problem]:
        for name in ("arms", "learning_rates", "seeds", "tuning_seeds"):
            values = getattr(self, name)
            if not values:
                yield Problem(name, values, "give at least one")
            elif len(set(values)) < len(values):
                yield Problem(name, values, "give each only once")
        if self.parallel < 1:
            yield Problem("parallel", self.parallel, "give 1 or more")
        for name in ("target", "matched_level"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                yield Problem(name, value, "an accuracy is above 0 and at most 1")
        if not all(0 <= factor <= 1 for factor in self.dial):
            yield Problem("dial", self.dial, "a factor lies from 0, the base model, to 1, the trained one")
        if self.dial and not self.base.get("general_tasks"):
            yield Problem("dial", self.dial, "there is nothing to see what is kept: give `base` general tasks")

    def _check_names(self) -> Iterator[Problem]:
        counts = Counter(map(slug, self.arms))
        for arm in self.arms:
            if counts[slug(arm)] > 1 or not slug(arm).strip("_"):
                yield Problem("arms", arm, "give each arm a name of its own, in letters and digits")
        if self.baseline is not None and self.baseline not in self.arms:
            yield Problem("baseline", self.baseline, f"is no arm; there are {', '.join(self.arms)}")

    def _check_rates(self, arm: str) -> Iterator[Problem]:
        key, rates = f"arms.{arm}.learning_rates", self.arms[arm].get("learning_rates", self.learning_rates)
        if not isinstance(rates, list) or not all(isinstance(rate, float | int) and rate > 0 for rate in rates):
            yield Problem(key, rates, "give a list of positive numbers, such as [1.0e-3, 3.0e-3]")
        elif len(rates) != len(self.learning_rates) or len(set(rates)) < len(rates):
            remedy = f"give {len(self.learning_rates)} different ones, as many as every arm has: tuning is budget too"
            yield Problem(key, rates, remedy)

    def _check_budget(self, arm: str) -> Iterator[Problem]:
        for key, value in leaves(_overrides(self.arms[arm]), lists="none"):
            allowed = any(f"{key}.".startswith(f"{name}.") for name in (*FREE, *self.allow))
            if key.split(".")[0] in BUDGET and not allowed:
                remedy = f"arms share one budget: set it in `base`, or list `{key}` under `allow`"
                yield Problem(f"arms.{arm}.{key}", value, remedy)
            if key == ".".join(LEARNING_RATE):
                yield Problem(f"arms.{arm}.{key}", value, "would be overwritten: give it in `learning_rates`")

    def _check_runs(self) -> list[Problem]:
        """Return what a run of each arm would refuse; what all refuse alike is the base's."""
        found = {arm: self._check_run(arm) for arm in self.arms}
        first, *others = ({str(problem): problem for problem in problems} for problems in found.values())
        shared = {text for text in first if all(text in other for other in others)}
        problems = [Problem(f"base.{first[text].key}", first[text].value, first[text].remedy) for text in shared]
        for arm, own in found.items():
            problems += [Problem(f"arms.{arm}.{p.key}", p.value, p.remedy) for p in own if str(p) not in shared]
        return problems

    def _check_run(self, arm: str) -> Sequence[Problem]:
        config = self._first_config(arm)
        if "class_path" not in config["client"]["optimizer"]:
            return [Problem("client.optimizer.class_path", None, "name the optimizer, such as torch.optim.AdamW")]
        try:
            return self._run(arm).check()
        except ConfigError as error:
            return error.problems

    def _first_config(self, arm: str) -> dict[str, Any]:
        return self.run_config(arm, self.rates(arm)[0], self.seeds[0])

    def _run(self, arm: str) -> RunConfig:
        """Return an arm's run with its classes instantiated.

        Raises:
            ConfigError: It cannot be read.
        """
        return run_of(self._first_config(arm))


def read_comparison(path: Path, variables: Mapping[str, str], options: Mapping[str, Any]) -> ComparisonConfig:
    """Return the comparison that a YAML file describes, all of it checked.

    Args:
        path: The file.
        variables: What to put in place of ``${name}`` in its texts.
        options: Keys of `ComparisonConfig` that replace the file's.

    Raises:
        ConfigError: It cannot be run; with every mistake.
    """
    raw = read_yaml(path, "config") | dict(options)
    if isinstance(raw.get("base"), str):
        raw["base"] = read_yaml(path.parent / raw["base"], "base")
    missing: dict[str, Problem] = {}
    raw = _filled_in(raw, variables, missing)
    problems = [*missing.values(), *_unused(path, variables, raw)]
    config = _parsed(raw, problems)
    problems = config.check()
    if problems:
        raise ConfigError(*problems)
    return config


def slug(name: str) -> str:
    """Return a name with which a file can be named."""
    return re.sub(r"[^\w.+-]+", "_", name)


def _parsed(raw: dict[str, Any], problems: list[Problem]) -> ComparisonConfig:
    found, _ = collect(ComparisonConfig, raw)
    if problems or found:
        raise ConfigError(*problems, *found)
    parser = ArgumentParser(prog="fedbe compare", exit_on_error=False)
    parser.add_class_arguments(ComparisonConfig)
    values = parser.parse_object(deepcopy(raw)).as_dict()
    # The parser may read run configurations in its own way: they are kept to the letter.
    return ComparisonConfig(**(values | {key: raw[key] for key in ("base", "arms")}))


def _filled_in(node: Any, variables: Mapping[str, str], missing: dict[str, Problem]) -> Any:
    """Return `node` with each ``${name}`` replaced, noting the names that have no value."""
    if isinstance(node, dict):
        return {key: _filled_in(value, variables, missing) for key, value in node.items()}
    if isinstance(node, list):
        return [_filled_in(value, variables, missing) for value in node]
    if not isinstance(node, str):
        return node
    for name in _PLACEHOLDER.findall(node):
        if name not in variables:
            missing[name] = Problem(name, None, f"is left open in the file: add --set {name}=VALUE")
    return _PLACEHOLDER.sub(lambda match: variables.get(match[1], match[0]), node)


def _unused(path: Path, variables: Mapping[str, str], raw: Mapping[str, Any]) -> Iterator[Problem]:
    """Yield the variables that no text of the files asks for."""
    text = path.read_text(encoding="utf-8")
    base = load_yaml(text).get("base")
    if isinstance(base, str):
        text += (path.parent / base).read_text(encoding="utf-8")
    asked = set(_PLACEHOLDER.findall(text))
    for name in variables.keys() - asked:
        yield Problem(f"--set {name}", variables[name], f"the file has no ${{{name}}}; it has {sorted(asked)}")


def _overrides(arm: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arm.items() if key != "learning_rates"}

"""A run's configuration from files and the command line, with every mistake found at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from fedbe.config.mistakes import collect, read_raw
from fedbe.config.rules import check_sections
from fedbe.config.run import RunConfig
from fedbe.errors import ConfigError, Problem

LISTS = ("general_tasks", "callbacks")
MAPPINGS = ("model", "client", "federation", "trainer")
PARTITION = ("plot", "samples")
"""Options of `fedbe partition` that are no part of a run."""

SET_BY_ENGINE = {"logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "barebones"}


def shipped_config(name: str) -> Path:
    """Return the path of a configuration that comes with fedbe."""
    return Path(str(files("fedbe.configs") / f"{name}.yaml"))


def run_parser(command: str, description: str | None = None, skip: frozenset[str] = frozenset()) -> ArgumentParser:
    """Return the parser of a run's configuration.

    Args:
        command: ``fit`` or ``partition``; the latter has ``--plot`` and ``--samples`` besides.
        description: Shown by ``--help``.
        skip: Sections to leave out.
    """
    parser = ArgumentParser(prog=f"fedbe {command}", description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="A YAML file; given again, the later one counts.")
    parser.add_class_arguments(RunConfig, skip={"trainer", *skip})
    defaults = {
        "algorithm": "fedbe.algorithms.BlockExpansion",
        "client.objective": "fedbe.objectives.Plain",
        "federation.averaging": "fedbe.aggregation.SampleWeighted",
        "federation.server_optimizer": "fedbe.aggregation.Mean",
        "engine": "fedbe.engines.InProcess",
    }
    chosen = {key: {"class_path": path} for key, path in defaults.items() if key.split(".")[0] not in skip}
    if chosen:
        parser.set_defaults(chosen)
    if "trainer" not in skip:
        parser.add_class_arguments(L.Trainer, "trainer", instantiate=False, skip=SET_BY_ENGINE)
    if command == "partition":
        parser.add_argument("--plot", type=Path, default=Path("partition.png"), help="Where the picture goes.")
        parser.add_argument("--samples", type=int, default=0, help="How many samples to show, with what is predicted.")
    return parser


def read_run(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[RunConfig, dict[str, Any]]:
    """Return the run and its resolved configuration.

    Raises:
        ConfigError: A key, a type or a value does not fit; then with every mistake that can be seen so far.
    """
    loose = [word for word in arguments if not word.startswith("-") and Path(word).suffix in (".yaml", ".yml")]
    if loose and "--config" not in arguments[: list(arguments).index(loose[0])][-1:]:
        raise ConfigError(Problem("command line", loose[0], f"name a configuration with --config {loose[0]}"))
    if no_mappings(read_raw(arguments)):
        raise ConfigError(*all_problems(parser, arguments, None))
    try:
        namespace = parser.parse_args(list(arguments))
    except ArgumentError as first:
        raise ConfigError(*all_problems(parser, arguments, first)) from first
    return RunConfig(**instantiate(parser, namespace)), resolved(parser, namespace, arguments)


def all_problems(parser: ArgumentParser, arguments: Sequence[str], first: Exception | None) -> list[Problem]:
    """Return every mistake of keys, types and values, once the parser has found a first."""
    raw = read_raw(arguments)
    problems = no_mappings(raw)
    raw = {key: value for key, value in raw.items() if key not in {problem.key for problem in problems}}
    problems += [problem for section in LISTS for problem in collect_list(raw, section)]
    found, rest = collect(parser, raw)
    problems += found
    if not problems:
        return [Problem("command line", " ".join(arguments), " ".join(str(first).split()))]
    if "data" not in rest:
        parser = run_parser("fit", skip=frozenset({"data"}))
    for option in PARTITION:
        rest.pop(option, None)
    try:
        found = check_sections(instantiate(parser, parser.parse_object(rest)))
    except ConfigError as error:
        found = list(error.problems)
    except ArgumentError:  # what is left is no configuration that could be checked further
        found = []
    known = {problem.key for problem in problems}
    return problems + [problem for problem in found if problem.key not in known]


def no_mappings(raw: dict[str, Any]) -> list[Problem]:
    """Return the sections that should be mappings and are not; the parser would pass over some of them."""
    remedy = "give a mapping of keys and values"
    given = {section: raw[section] for section in MAPPINGS if section in raw}
    return [Problem(key, value, remedy) for key, value in given.items() if not isinstance(value, dict)]


def collect_list(raw: dict[str, Any], section: str) -> list[Problem]:
    """Return the mistakes in each element of a list of classes, and leave in `raw` the list without them."""
    if not isinstance(raw.get(section), list):
        return []
    names = {item.name for item in fields(RunConfig)}
    parser = run_parser("fit", skip=frozenset(names - {section}))
    problems, kept = [], []
    for index, element in enumerate(raw[section]):
        found, rest = collect(parser, {section: [element]})
        whole = f"{section}[0]"
        for problem in found:
            name = element.get("class_path", element) if isinstance(element, dict) else element
            value = name if problem.key in (section, whole) else problem.value
            tail = problem.key.removeprefix(section).removeprefix("[0]")
            problems.append(Problem(f"{section}[{index}]{tail}", value, problem.remedy))
        kept += rest.get(section, [])
    raw[section] = kept
    return problems


def instantiate(parser: ArgumentParser, namespace: Namespace) -> dict[str, Any]:
    """Return the objects of each section of `RunConfig`."""
    values = parser.instantiate(namespace).as_dict()
    return {key: value for key, value in values.items() if key not in ("config", *PARTITION)}


def resolved(parser: ArgumentParser, namespace: Namespace, arguments: Sequence[str]) -> dict[str, Any]:
    """Return the configuration with every default filled in; it runs again as it is, into a new folder."""
    again = namespace.clone()
    again.output = None
    again.ckpt_path = None
    again.pop("config", None)
    try:
        config: dict[str, Any] = yaml.safe_load(parser.dump(again, skip_unset=False))
    except (ValueError, TypeError):  # an argument that has no form in YAML: keep what the user wrote
        config = read_raw(arguments) | {"output": None, "ckpt_path": None}
    return config

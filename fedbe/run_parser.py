"""A run's configuration from files and the command line, with every mistake found at once."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from fedbe.config import RunConfig, check_sections
from fedbe.config_errors import collect, read_raw
from fedbe.errors import ConfigError, Problem

SET_BY_ENGINE = {"logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "barebones"}


def shipped_config(name: str) -> Path:
    """Return the path of a configuration that comes with fedbe."""
    return Path(str(files("fedbe.configs") / f"{name}.yaml"))


def run_parser(command: str, description: str | None = None, skip: frozenset[str] = frozenset()) -> ArgumentParser:
    """Return the parser of a run's configuration.

    Args:
        command: ``fit`` or ``partition``; the latter has ``--plot`` besides.
        description: Shown by ``--help``.
        skip: Sections to leave out.
    """
    parser = ArgumentParser(prog=f"fedbe {command}", description=description, exit_on_error=False)
    parser.add_argument("--config", action="config", help="A YAML file; given again, the later one counts.")
    parser.add_class_arguments(RunConfig, skip=set(skip))
    defaults = {
        "algorithm": "fedbe.algorithms.BlockExpansion",
        "client.objective": "fedbe.objectives.Plain",
        "federation.server_optimizer": "fedbe.aggregation.Mean",
    }
    parser.set_defaults({key: {"class_path": path} for key, path in defaults.items()})
    parser.add_class_arguments(L.Trainer, "trainer", instantiate=False, skip=SET_BY_ENGINE)
    if command == "partition":
        parser.add_argument("--plot", type=Path, default=Path("partition.png"), help="Where the picture goes.")
    return parser


def read_run(parser: ArgumentParser, arguments: Sequence[str]) -> tuple[RunConfig, dict[str, Any], dict[str, Any]]:
    """Return the run, the arguments of its clients' `L.Trainer`, and the resolved configuration.

    Raises:
        ConfigError: A key, a type or a value does not fit; then with every mistake that can be seen so far.
    """
    try:
        namespace = parser.parse_args(list(arguments))
    except ArgumentError as first:
        raise ConfigError(*all_problems(parser, arguments, first)) from first
    sections, trainer = instantiate(parser, namespace)
    return RunConfig(**sections), trainer, resolved(parser, namespace)


def all_problems(parser: ArgumentParser, arguments: Sequence[str], first: ArgumentError) -> list[Problem]:
    """Return every mistake of keys, types and values, once the parser has found a first."""
    problems, rest = collect(parser, read_raw(arguments))
    if not problems:
        return [Problem("command line", " ".join(arguments), " ".join(str(first).split()))]
    if "data" not in rest:
        parser = run_parser("fit", skip=frozenset({"data"}))
    rest.pop("plot", None)
    try:
        sections, _ = instantiate(parser, parser.parse_object(rest))
        found = check_sections(sections)
    except ConfigError as error:
        found = list(error.problems)
    known = {problem.key for problem in problems}
    return problems + [problem for problem in found if problem.key not in known]


def instantiate(parser: ArgumentParser, namespace: Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the objects of each section of `RunConfig`, and the arguments of the clients' `L.Trainer`."""
    values = parser.instantiate(namespace).as_dict()
    trainer = values.pop("trainer")
    return {key: value for key, value in values.items() if key not in ("config", "plot")}, trainer


def resolved(parser: ArgumentParser, namespace: Namespace) -> dict[str, Any]:
    """Return the configuration with every default filled in; it runs again as it is, into a new folder."""
    again = namespace.clone()
    again.output = None
    again.pop("config", None)
    config: dict[str, Any] = yaml.safe_load(parser.dump(again, skip_unset=False))
    return config

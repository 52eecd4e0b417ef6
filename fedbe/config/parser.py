"""A run's configuration from files and the command line, with every mistake found at once."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace

from fedbe.config.classes import guard_imports
from fedbe.config.instances import check_called, instantiate
from fedbe.config.mistakes import MISSING, collect
from fedbe.config.raw import Raw, only_shows, read_raw
from fedbe.config.rules import check_sections
from fedbe.config.run import RunConfig
from fedbe.errors import ConfigError, Problem

PARTITION = ("plot", "samples")
"""Options of `fedbe partition` that are no part of a run."""

SET_BY_ENGINE = {"logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "barebones"}


def shipped_config(name: str) -> Path:
    """Return the path of a configuration that comes with fedbe."""
    return Path(str(files("fedbe.configs") / f"{name}.yaml"))


@cache
def run_parser(command: str, description: str | None = None, skip: frozenset[str] = frozenset()) -> ArgumentParser:
    """Return the parser of a run's configuration.

    Args:
        command: ``fit`` or ``partition``; the latter has ``--plot`` and ``--samples`` besides.
        description: Shown by ``--help``.
        skip: Sections to leave out.
    """
    parser = ArgumentParser(prog=f"fedbe {command}", description=description, exit_on_error=False, allow_abbrev=False)
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
    raw = read_raw(arguments)
    guard_imports(raw)
    if any(map(only_shows, arguments)):
        _show(parser, arguments, raw)
    namespace = _parsed(parser, raw)
    return RunConfig(**_sections(parser, namespace)), resolved(parser, namespace, raw)


def _show(parser: ArgumentParser, arguments: Sequence[str], raw: Raw) -> None:
    """Print the help or the configuration, and leave; mistakes in what is given are told in its place.

    Raises:
        ConfigError: There are mistakes.
        SystemExit: It is printed.
    """
    if problems := [problem for problem in mistakes(raw)[0] if problem.remedy != MISSING]:
        raise ConfigError(*problems)
    try:
        parser.parse_args(list(arguments))
    except Exception as error:  # ArgumentError, or whatever the parser stumbles over
        raise ConfigError(Problem("command line", " ".join(arguments), " ".join(str(error).split()))) from error


def _parsed(parser: ArgumentParser, raw: Raw) -> Namespace:
    """Return what the parser makes of a configuration in which there is no mistake, and no function.

    The parser gets the plain values, not the files: it reads some of them otherwise, ``1e-3`` for one.

    Raises:
        ConfigError: With every mistake that can be seen so far.
    """
    _refuse(raw)  # first: the parser passes over some mistakes, such as a null or a list for a section
    try:
        namespace: Namespace = parser.parse_object(deepcopy(raw))
    except Exception as error:  # ArgumentError, or whatever the parser stumbles over
        raise ConfigError(Problem("config", sorted(raw), " ".join(str(error).split()))) from error
    check_called(namespace.as_dict())
    return namespace


def run_of(raw: Raw, apart: Path | None = None) -> RunConfig:
    """Return the run that a configuration of plain values describes.

    Args:
        raw: Its sections.
        apart: A folder whose modules are not imported, whatever the configuration says.

    Raises:
        ConfigError: With every mistake that can be seen so far.
    """
    guard_imports(raw, apart)
    parser = run_parser("fit")
    return RunConfig(**_sections(parser, _parsed(parser, raw)))


def mistakes(raw: Raw) -> tuple[list[Problem], Raw]:
    """Return every mistake of keys, types and classes in a run's configuration, and what is left of it without them."""
    given = {key: value for key, value in raw.items() if key not in (*PARTITION, "trainer")}
    problems, rest = collect(RunConfig, given, skip={"trainer"})
    if "trainer" in raw:
        if isinstance(raw["trainer"], dict):
            found, rest["trainer"] = collect(L.Trainer, raw["trainer"], "trainer", SET_BY_ENGINE)
        else:
            found = [Problem("trainer", raw["trainer"], "give a mapping of keys and values")]
        problems += found
    return problems, rest


def _refuse(raw: Raw) -> None:
    """Raise with the mistakes in a configuration, if it has any, and with those that show in what is left without them.

    Raises:
        ConfigError: There are mistakes.
    """
    problems, rest = mistakes(raw)
    if not problems:
        return
    known = {problem.key for problem in problems}
    raise ConfigError(*problems, *(problem for problem in _further(rest) if problem.key not in known))


def _further(rest: Raw) -> Sequence[Problem]:
    """Return the mistakes that show once a configuration, or what is left of it, is put together."""
    parser = run_parser("fit", skip=frozenset() if "data" in rest else frozenset({"data"}))
    try:
        namespace = parser.parse_object(rest)
        check_called(namespace.as_dict())
        return check_sections(_sections(parser, namespace))
    except ConfigError as error:
        return error.problems
    except ArgumentError:  # what is left is no configuration that could be checked further
        return []


def _sections(parser: ArgumentParser, namespace: Namespace) -> dict[str, Any]:
    """Return the objects of each section of `RunConfig`."""
    return {key: value for key, value in instantiate(parser, namespace).items() if key not in ("config", *PARTITION)}


def resolved(parser: ArgumentParser, namespace: Namespace, raw: Raw) -> dict[str, Any]:
    """Return the configuration with every default filled in; it runs again as it is, into a new folder."""
    again = namespace.clone()
    again.output = None
    again.ckpt_path = None
    again.pop("config", None)
    try:
        config: dict[str, Any] = yaml.safe_load(parser.dump(again, skip_unset=False))
    except (ValueError, TypeError):  # an argument that has no form in YAML: keep what the user wrote
        config = raw | {"output": None, "ckpt_path": None}
    return config
